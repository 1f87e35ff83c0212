"""Networks that judge answers in a dialogue, and what they say of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from sightloop.protocols import NetworkConfig
from sightloop.types import Encoded, Floats32

if TYPE_CHECKING:
    from torch import Tensor, nn


class AnswerScores(NamedTuple):
    """What a model says of C answers to one question.

    Attributes:
        match: log-odds that each is true (ITM: true less false), float32 `[C]`.
        attributes: name -> probability that each has it, float32 `[C]`.
    """

    match: Floats32
    attributes: dict[str, Floats32]


class DialogueConfig(NetworkConfig, Protocol):
    """Config of a network that may judge answers in a dialogue.

    Attributes:
        dialogue: whether it was trained to.
        attributes: names of what it says of an answer beside whether it is true.
    """

    @property
    def dialogue(self) -> bool: ...
    @property
    def attributes(self) -> tuple[str, ...]: ...


@runtime_checkable
class DialogueNetwork(Protocol):
    """Network that judges answers in a dialogue (BLIP).

    Methods:
        read_caption: B encoded images followed by their captions, ids `[B, L]`, lengths `[B]`: a memory.
        judge_answers: texts "history question? answer", ids `[R, L]`, over B memories, R a multiple of B -> ITM logits
            `[R, 2]` (false, true) and logits of the attributes `[R, A]`.
        learn_dialogue: prepares it for training; returns a new head for these attributes, to be initialized, or None
            where it has them already.
    """

    @property
    def config(self) -> DialogueConfig: ...
    def read_caption(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded: ...
    def judge_answers(self, memory: Encoded, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]: ...
    def learn_dialogue(self, attributes: tuple[str, ...]) -> nn.Module | None: ...


def judges_dialogues(network: object) -> bool:
    """Whether a network was trained to judge answers in a dialogue."""
    return isinstance(network, DialogueNetwork) and network.config.dialogue
