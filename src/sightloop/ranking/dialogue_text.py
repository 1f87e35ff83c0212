"""Text of a dialogue up to a question, as models read it, with or without the caption and the first rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from sightloop.protocols import ChatNetwork
from sightloop.ranking.dialogue_network import judges_dialogues
from sightloop.types import Dialogue, ImageSource, Message, Round


class Reading(NamedTuple):
    """What is read with the question of a round.

    Attributes:
        first: index of the first round.
        captioned: whether the caption is read before it.
    """

    first: int
    captioned: bool


def readings(
    dialogue: Dialogue, index: int, history: int | None = None, *, captioned: bool = True
) -> list[Reading]:
    """What may be read with the question of a round, from the most to the question alone.

    Args:
        dialogue: of the round.
        index: of the round.
        history: how many rounds before it may be read; None for all, 0: the question alone.
        captioned: whether the caption may be read too.
    """
    alone = Reading(index, False)
    if history == 0:
        return [alone]
    first = 0 if history is None else max(0, index - history)
    captioned = captioned and bool(dialogue.caption.strip())
    return list(dict.fromkeys([*(Reading(i, captioned) for i in range(first, index + 1)), alone]))


def context_text(dialogue: Dialogue, index: int, reading: Reading) -> str:
    """What is said up to the question of a round: "a dog on a beach. is it sunny? yes. any people?"."""
    caption = [ended(dialogue.caption, ".")] if reading.captioned else []
    earlier = [
        f"{ended(one.question, '?')} {ended(one.answer or '', '.')}".strip()
        for one in dialogue.rounds[reading.first : index]
    ]
    return " ".join([*caption, *earlier, ended(dialogue.rounds[index].question, "?")])


def fitting_context(
    has_room: Callable[[str], bool], dialogue: Dialogue, index: int, longest: str, history: int | None = None
) -> str:
    """What is said up to the question of a round without the caption, as much as leaves room for an answer.

    Args:
        has_room: whether a text is short enough.
        dialogue: of the round.
        index: of the round.
        longest: the longest answer.
        history: how many rounds before it are read at most.
    """
    text = ""
    for reading in readings(dialogue, index, history, captioned=False):
        text = context_text(dialogue, index, reading)
        if has_room(f"{text} {longest}".strip()):
            break
    return text


def dialogue_of(messages: Sequence[Message]) -> Dialogue:
    """A conversation as a dialogue: each message of the user with the answer to it, the last one without.

    What a system message says is left out.
    """
    rounds: list[Round] = []
    for message in messages:
        if message.role == "user":
            rounds.append(Round(message.text))
        elif message.role == "assistant" and rounds:
            rounds[-1] = Round(rounds[-1].question, message.text)
    return Dialogue(tuple(rounds))


def conversation(
    network: object, image: ImageSource, dialogue: Dialogue, index: int, history: int | None = None
) -> list[Message]:
    """A dialogue about an image up to a question, as a network reads it.

    A chat template has the caption before the first question, a network that was trained for dialogues as its own, and
    another one reads the question alone.

    Args:
        network: that answers.
        image: what the dialogue is about.
        dialogue: of the round.
        index: of the round.
        history: see `readings`.
    """
    reading = readings(dialogue, index, history)[0]
    if isinstance(network, ChatNetwork):
        return as_messages(image, dialogue, index, reading)
    messages = as_messages(image, dialogue, index, reading._replace(captioned=False))
    if reading.captioned and judges_dialogues(network):
        return [Message("system", dialogue.caption), *messages]
    return messages


def as_messages(image: ImageSource, dialogue: Dialogue, index: int, reading: Reading) -> list[Message]:
    """A dialogue about an image up to a question, as a conversation; the caption stands before the first question."""
    messages: list[Message] = []
    for number in range(reading.first, index + 1):
        one = dialogue.rounds[number]
        is_first = number == reading.first
        caption = f"{ended(dialogue.caption, '.')} " if is_first and reading.captioned else ""
        messages.append(Message("user", caption + ended(one.question, "?"), (image,) * is_first))
        if number < index:
            messages.append(Message("assistant", one.answer or ""))
    return messages


def true_answer(one: Round) -> str | None:
    """What a person answered in a round; None where the set keeps it secret."""
    return one.answer if one.answer is not None or one.truth is None else one.candidates[one.truth]


def ended(text: str, mark: str) -> str:
    """The text with a mark at its end, if it has none there."""
    text = text.strip()
    return text if not text or text[-1] in ".?!" else text + mark
