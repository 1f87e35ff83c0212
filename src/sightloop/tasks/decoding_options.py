"""Options of text generation. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sightloop.errors import UsageError


@dataclass(frozen=True, slots=True)
class Decoding:
    """Options of text generation. Sampling is on when any of `top_p`, `top_k` and `temperature` is set.

    Args:
        num_beams: hypotheses of beam search; 1 is greedy decoding.
        top_p: nucleus sampling (Holtzman et al. 2020): sample from the smallest set of tokens with this probability,
            in (0, 1].
        top_k: sample from this many of the likeliest tokens.
        temperature: divides the logits before sampling, above 0.
        min_new_tokens: least length of a text, in tokens after the prompt; EOS counts.
        max_new_tokens: greatest length of a text, in tokens after the prompt; EOS counts.
        repetition_penalty: divides (or, below 0, multiplies) the logits of tokens already in the text; above 1
            discourages repetition (CTRL, Keskar et al. 2019).
        length_penalty: a beam's score is its log-probability / length ** length_penalty.
        num_return: texts per prompt.
        seed: seed of sampling.
        no_repeat_ngram: no n-gram of this size occurs twice in a text, prompt included; 0 allows all.
        early_stopping: when beam search ends. True: as soon as `num_beams` hypotheses have ended. False: when the best
            running hypothesis, scored at its present length, can no longer win. "never": when it could not win at
            `max_new_tokens` either.
        forced_bos_id: id of the first new token, None for a free choice.
        force_eos: whether the token at `max_new_tokens` is EOS.
        end_ids: ids that end a text, in place of the network's own EOS.
        suppress_tokens: ids that are never generated.
        begin_suppress_tokens: ids that are not generated as the first new token (after `forced_bos_id`, if set).

    Raises:
        UsageError: an option is out of range, or beams and sampling are combined.
    """

    num_beams: int = 1
    top_p: float | None = None
    top_k: int | None = None
    temperature: float | None = None
    min_new_tokens: int = 0
    max_new_tokens: int = 20
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0
    num_return: int = 1
    seed: int = 0
    no_repeat_ngram: int = 0
    early_stopping: bool | Literal["never"] = False
    forced_bos_id: int | None = None
    force_eos: bool = False
    end_ids: Sequence[int] = ()
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        rules = {
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "temperature": (self.temperature is None or self.temperature > 0, "above 0"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "0 to max_new_tokens"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "num_return": (self.num_return >= 1, "at least 1"),
            "no_repeat_ngram": (self.no_repeat_ngram >= 0, "at least 0"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise UsageError(f"{name}={getattr(self, name)}: must be {allowed}")
        if self.num_beams > 1 and self.samples:
            raise UsageError(
                "num_beams goes without sampling: leave out top_p, top_k and temperature, or num_beams"
            )
        if not self.samples and self.num_return > self.num_beams:
            raise UsageError(
                f"num_return={self.num_return}: greedy search gives one text and beam search at most num_beams; "
                "raise num_beams, or sample (top_p=0.9)"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are sampled."""
        return not (self.top_p is None and self.top_k is None and self.temperature is None)
