"""Captions, answers and replies by sample and rank; see `sample_rank`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sightloop.data.video.pixels import ANSWERING
from sightloop.errors import UsageError
from sightloop.inference.answering import answer_questions
from sightloop.inference.arguments import ImageInput, VisualSource, as_images, prompts_from
from sightloop.inference.chat import chat_options, reply_parts, turn_parts, write_turn
from sightloop.inference.image_encoding import ImageEncoder
from sightloop.inference.judges import Judge
from sightloop.inference.sample_rank import TOP_K, rank_texts
from sightloop.inference.text_generation import TextGenerator, WrittenText, sampling_key, select_rows
from sightloop.protocols import ChatNetwork
from sightloop.ranking.dialogue_text import dialogue_of
from sightloop.ranking.options import RankedText, Ranking, RankWeights
from sightloop.ranking.policy import Policy, read_policy
from sightloop.ranking.statements import statement
from sightloop.tasks.decoding_options import Decoding
from sightloop.types import Dialogue, Encoded, JsonDict, JsonMapping, Message, Pixels, Round

OPTIONS = ("samples", "judge", "weights", "abstain", "policy", "details")


def split_options(options: JsonMapping) -> tuple[Ranking | None, bool, JsonDict]:
    """Options of a verb, as those of sample and rank, whether details are wanted, and those of decoding.

    Args:
        options: fields of `Ranking` and of `Decoding`, and `details`.

    Raises:
        UsageError: options that exclude each other.
    """
    ours = {name: options[name] for name in OPTIONS if options.get(name) is not None}
    decoding = {name: value for name, value in options.items() if name not in OPTIONS}
    if "samples" not in ours:
        if others := [name for name in ours if name != "details" or ours[name]]:
            raise UsageError(f"{others[0]}: goes with samples; give samples=16 too")
        return None, False, decoding
    samples = ours["samples"]
    if not isinstance(samples, int) or isinstance(samples, bool):
        raise UsageError(f"samples={samples!r}: must be a whole number")
    for name in ("num_return", "num_beams"):
        if decoding.get(name) not in (None, 1):
            raise UsageError(
                f"{name}: goes without samples; samples={samples} texts are drawn and one is kept"
            )
        decoding.pop(name, None)
    if all(decoding.get(name) is None for name in ("top_k", "top_p", "temperature")):
        decoding |= {"top_k": TOP_K, "temperature": 1.0}
    weights, policy = ours.get("weights", RankWeights()), ours.get("policy", Policy())
    ranking = Ranking(
        samples=samples,
        judge=ours.get("judge"),
        weights=weights if isinstance(weights, RankWeights) else RankWeights.read(weights),
        abstain=ours.get("abstain"),
        policy=policy if isinstance(policy, Policy) else read_policy(policy),
    )
    return ranking, bool(ours.get("details")), decoding | {"num_return": samples}


def check_caption_options(prompt: object, length: object, region: object, ranking: Ranking | None) -> None:
    """Raises UsageError for options of `caption` that exclude each other."""
    if (prompt is not None) + (length is not None) + (region is not None) > 1:
        raise UsageError("prompt, length and region exclude each other; give one")
    if ranking is not None and (length is not None or region is not None):
        raise UsageError("samples: goes without length and region")


class SampledVerbs:
    """The verbs that write, by sample and rank.

    Args:
        own: the model that writes.
        judge: the model that judges, None for likelihood alone.
        encoder: of the model that writes.
        generator: likewise.
        ranking: options.
    """

    def __init__(
        self,
        own: Judge,
        judge: Judge | None,
        encoder: ImageEncoder,
        generator: TextGenerator,
        ranking: Ranking,
    ) -> None:
        self.own, self.generator, self.ranking = own, generator, ranking
        self.encoder = replace(encoder, remember=True)
        self.judge = judge

    def caption(
        self, images: ImageInput, prompts: Sequence[str] | None, options: Decoding
    ) -> list[RankedText]:
        """One caption an image; prompts: the words that it starts with, one for all or one an image."""
        captions: list[RankedText] = []
        sources = list(as_images(images))
        for batch in self.encoder.preprocessor.batches(sources):
            start = len(captions)
            own = None if prompts is None else prompts_from(list(prompts), start, len(batch))
            written = write_captions(self.encoder, self.generator, batch, own, options, scored=True)
            texts = [[one.text for one in texts] for texts in written]
            image = self._judge_image(batch, sources[start : start + len(batch)])
            captions += rank_texts(self.ranking, self.judge, image, written, texts)
        check_prompts(prompts, len(captions))
        return captions

    def answer(
        self, images: Sequence[VisualSource], questions: Sequence[str], options: Decoding
    ) -> list[RankedText]:
        """An answer for each of R pairs of an image and a question."""
        encoder = self.encoder.sampling(ANSWERING)
        answers: dict[int, RankedText] = {}
        for batch, encoded, rows_of in encoder.distinct_batches(images):
            owners = [b for b, rows in enumerate(rows_of) for _ in rows]
            rows = [int(row) for own in rows_of for row in own]
            asked = [questions[row] for row in rows]
            pixels = [batch[b] for b in owners]
            written = answer_questions(
                encoder, self.generator, pixels, asked, None, options, top=1, scored=True
            )
            claims = [
                [statement(question, one.text) for one in texts]
                for question, texts in zip(asked, written, strict=True)
            ]
            image = self._judge_image(batch, [images[own[0]] for own in rows_of], encoded)
            repeated = None if image is None else select_rows(image, torch.tensor(owners))
            turns = [Dialogue((Round(question),)) for question in asked]
            ranked = rank_texts(self.ranking, self.judge, repeated, written, claims, turns=turns)
            answers |= dict(zip(rows, ranked, strict=True))
        return [answers[row] for row in range(len(questions))]

    def reply(self, messages: Sequence[Message], decoding: JsonMapping) -> RankedText:
        """The answer to the last message; the judge sees the last image of the conversation.

        Answers of a model without a chat template are a few words, which may be said again of another question.
        """
        options = chat_options(self.generator, decoding)
        if isinstance(self.generator.network, ChatNetwork):
            prompt, pixels, key = reply_parts(self.encoder, self.generator, messages)
            images = self.encoder.encode_each(pixels)
            written = self.generator.answer_prompts([images], [prompt], options, [key], scored=True)
            turn = dialogue_of(messages)
            sources = [image for message in messages for image in message.images]
            image = self._judge_image(pixels[-1:], sources[-1:]) if sources else None
            earlier = [message.text for message in messages if message.role == "assistant"]
        else:
            turn, own, source = turn_parts(self.encoder, self.generator, messages)
            written = [write_turn(self.encoder, self.generator, own, turn, options, scored=True)]
            image, earlier = self._judge_image([own], [source]), list[str]()
        claims = [[statement(turn.rounds[-1].question, one.text) for one in written[0]]]
        return rank_texts(self.ranking, self.judge, image, written, claims, earlier, [turn])[0]

    def _judge_image(
        self, batch: Sequence[Pixels], sources: Sequence[VisualSource], encoded: Encoded | None = None
    ) -> Encoded | None:
        """The images as the judge encodes them; those of its own model are not encoded again."""
        if self.judge is None:
            return None
        if self.judge is self.own:
            return encoded or self.encoder.encode(batch)
        return self.judge.encode(self.judge.preprocessor.read_distinct(list(sources)))


def write_captions(
    encoder: ImageEncoder,
    generator: TextGenerator,
    batch: Sequence[Pixels],
    prompts: Sequence[str] | None,
    options: Decoding,
    *,
    scored: bool = False,
) -> list[list[WrittenText]]:
    """`num_return` captions for each image of a batch, in the network's own way.

    Args:
        encoder: of the model.
        generator: of the model.
        batch: B images.
        prompts: B texts that the captions start with, None for none.
        options: how text is chosen.
        scored: whether log-probabilities are wanted.
    """
    keys = [sampling_key(pixels) for pixels in batch]
    if generator.is_prompted:
        forms = [generator.format_prompt("caption", text) for text in prompts or [None] * len(batch)]
        images = [[image] for image in encoder.encode_each(batch)]
        return generator.answer_prompts(images, forms, options, keys, scored=scored)
    return generator.continue_texts(encoder.encode(batch), prompts, keys, options, scored=scored)


def write_all_captions(
    encoder: ImageEncoder,
    generator: TextGenerator,
    images: ImageInput,
    prompts: Sequence[str] | None,
    options: Decoding,
) -> list[list[WrittenText]]:
    """`num_return` captions for each image, batch by batch; prompts: one for all images, or one an image."""
    captions: list[list[WrittenText]] = []
    for batch in encoder.preprocessor.batches(images):
        own = None if prompts is None else prompts_from(list(prompts), len(captions), len(batch))
        captions += write_captions(encoder, generator, batch, own, options)
    check_prompts(prompts, len(captions))
    return captions


def check_prompts(prompts: Sequence[str] | None, images: int) -> None:
    """Raises UsageError unless there is one prompt, or one an image."""
    if prompts is not None and len(prompts) not in (1, images):
        raise UsageError(f"prompt: {len(prompts)} prompts for {images} images; give one, or one an image")


def results(ranked: Sequence[RankedText], *, details: bool) -> list[str]:
    """The winners, as `RankedText` if their details are wanted, else as plain strings."""
    return list(ranked) if details else [str(one) for one in ranked]
