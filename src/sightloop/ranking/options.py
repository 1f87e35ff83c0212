"""Ranked texts and the options of sample and rank. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sightloop.errors import UsageError, check_options
from sightloop.ranking.policy import Policy
from sightloop.types import JsonDict, JsonMapping

ABSTENTION = "I am not sure"
SIGNALS = ("log_prob", "itm", "match", "itc", "sensible", "specific", "grounded", "votes")


@dataclass(frozen=True, slots=True)
class RankWeights:
    """Weights of the signals of a candidate; the score is their weighted sum plus `bias`.

    Fitted weights make the score the log-odds that the text is right. The defaults count a nat of likelihood as much as
    a unit of the ITM logit, the attributes of answers as LaMDA does (section 6.1: three times sensible), and are fitted
    to nothing. What the judge does not say counts nothing.

    Args:
        log_prob: of the mean log-probability of the text's tokens.
        itm: of the ITM logit of the statement, match less no match.
        itc: of the ITC cosine of the statement.
        votes: of the logarithm of the share of the samples that say the same.
        bias: constant; None where the weights are not fitted.
        match: of the log-odds that the answer is true after history and question; in place of `itm`, by a judge that
            was trained for dialogues.
        sensible, specific, grounded: of the probabilities of these attributes of an answer, by the same judge.
    """

    log_prob: float = 1.0
    itm: float = 1.0
    itc: float = 0.0
    votes: float = 0.0
    bias: float | None = None
    match: float = 1.0
    sensible: float = 3.0
    specific: float = 1.0
    grounded: float = 1.0

    def score(self, signals: Mapping[str, float]) -> float:
        """Weighted sum of a candidate's signals, plus the bias; those without a weight, as "safe", count nothing."""
        values = asdict(self)
        return (self.bias or 0.0) + sum(values.get(name, 0.0) * value for name, value in signals.items())

    @classmethod
    def read(cls, source: str | Path | JsonMapping) -> RankWeights:
        """Weights of a JSON file that `sightloop evaluate --rank-samples` wrote, or of a mapping.

        Of fitted ones (with a bias) those that are left out are 0.

        Raises:
            UsageError: they are none.
        """
        where, values = "weights", source
        if isinstance(source, (str, Path)):
            where = str(source)
            try:
                values = json.loads(Path(source).read_text("utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise UsageError(f"{where}: no file of weights ({error})") from error
        if not isinstance(values, Mapping):
            raise UsageError(f"{where}: must be an object of {', '.join((*SIGNALS, 'bias'))}")
        check_options(cls, values, f"weight in {where}")
        fitted = values.get("bias") is not None
        weights = cls(**{**(dict.fromkeys(SIGNALS, 0.0) if fitted else {}), **values})
        if not all(math.isfinite(value) for value in asdict(weights).values() if value is not None):
            raise UsageError(f"{where}: weights must be finite")
        return weights


@dataclass(frozen=True, slots=True)
class Candidate:
    """One text that was drawn.

    Attributes:
        text: as the model wrote it.
        statement: what the judge compared with the image.
        draws: which of the samples say so, from 0, in order.
        signals: name in `SIGNALS`, or of another attribute of answers, -> its value; without those that the judge
            cannot give.
        score: weighted sum of the signals; NaN of a dropped one.
        dropped: why it was dropped, "" if it was not.
    """

    text: str
    statement: str
    draws: tuple[int, ...]
    signals: Mapping[str, float]
    score: float = math.nan
    dropped: str = ""

    @property
    def count(self) -> int:
        """How many of the samples say so."""
        return len(self.draws)

    def as_json(self) -> JsonDict:
        """The candidate as JSON values."""
        score = None if math.isnan(self.score) else self.score
        return {**asdict(self), "draws": list(self.draws), "signals": dict(self.signals), "score": score}


class RankedText(str):
    """The winner of the candidates: a string that knows where it comes from.

    Attributes:
        candidates: best first, then those that were dropped.
        probability: that the winner is right; None where the weights are not fitted.
        abstained: whether the string is `ABSTENTION`, as no candidate was kept or the winner's probability is below
            `abstain`.
    """

    candidates: tuple[Candidate, ...]
    probability: float | None
    abstained: bool

    @classmethod
    def of(
        cls, text: str, candidates: Sequence[Candidate], probability: float | None = None, *, abstained: bool
    ) -> RankedText:
        """The text with its attributes."""
        one = cls(text)
        one.candidates, one.probability, one.abstained = tuple(candidates), probability, abstained
        return one

    def as_json(self) -> JsonDict:
        """All of it as JSON values."""
        return {
            "text": str(self),
            "probability": self.probability,
            "abstained": self.abstained,
            "candidates": [candidate.as_json() for candidate in self.candidates],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Options of sample and rank.

    Args:
        samples: texts drawn for each image, 1 to 256.
        judge: what compares statements with the image, a loaded model or what `load` takes; None for the model that
            writes, where it can.
        weights: of the signals: `RankWeights`, a mapping, or a JSON file.
        abstain: probability below which `ABSTENTION` is answered, in (0, 1); needs fitted weights. None for never.
        policy: what must not be said.

    Raises:
        UsageError: a value that is not allowed.
    """

    samples: int
    judge: object = None
    weights: RankWeights = field(default_factory=RankWeights)
    abstain: float | None = None
    policy: Policy = field(default_factory=Policy)

    def __post_init__(self) -> None:
        if not 1 <= self.samples <= 256:
            raise UsageError(f"samples={self.samples}: must be 1 to 256")
        if self.abstain is not None and not 0 < self.abstain < 1:
            raise UsageError(f"abstain={self.abstain}: must be a probability between 0 and 1")
        if self.abstain is not None and self.weights.bias is None:
            raise UsageError(
                "abstain: needs fitted weights; `sightloop evaluate vqa --rank-samples 16` fits them"
            )
