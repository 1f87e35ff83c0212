"""Options of sample and rank for the commands that write text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from sightloop.apps.cli.checks import check_checkpoint
from sightloop.apps.cli.options import DECODING_GROUP, DecodingOptions, integer
from sightloop.errors import UsageError
from sightloop.ranking.options import Ranking, RankWeights
from sightloop.ranking.policy import read_policy
from sightloop.types import JsonDict

_RANKING_GROUP = Group(
    "Sample and rank",
    help="Several texts are drawn, those that loop, repeat or break the policy are dropped, the best of the others is "
    "kept.",
    sort_key=31,
)


@Parameter(name="*", group=DECODING_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class WritingOptions(DecodingOptions):
    """`DecodingOptions` of commands whose texts can be ranked."""

    samples: Annotated[int | None, Parameter(converter=integer, group=_RANKING_GROUP)] = None
    """Draw this many texts and keep the best, such as 16. Default: off."""

    rank_by: Annotated[str | None, Parameter(metavar="MODEL", group=_RANKING_GROUP)] = None
    """Model that compares the texts with the image (ITM, or cosine). Default: the model that writes, if it can; else
    likelihood alone."""

    weights: Annotated[Path | None, Parameter(metavar="FILE", group=_RANKING_GROUP)] = None
    """Weights of likelihood, ITM, cosine, votes and attributes of answers: weights.json of `sightloop evaluate vqa
    --rank-samples`. Default: likelihood and ITM alike, attributes as LaMDA has them."""

    abstain: Annotated[float | None, Parameter(group=_RANKING_GROUP)] = None
    """Say "I am not sure" below this probability, above 0 and below 1; needs --weights. Default: off."""

    policy: Annotated[Path | None, Parameter(metavar="FILE", group=_RANKING_GROUP)] = None
    """TOML file of words that no text may have, and of the least probability of being safe. Default: none, 0.5."""

    def as_kwargs(self) -> JsonDict:
        """The options that were given, by their names in Python.

        Raises:
            UsageError: A value is out of range, options contradict each other, or a file is wrong.
        """
        options = DecodingOptions.as_kwargs(self)
        judge = options.pop("rank_by", None)
        if judge is not None:
            options["judge"] = judge
        options |= {name: str(options[name]) for name in ("weights", "policy") if name in options}
        others = [
            name for name in ("rank_by", "weights", "abstain", "policy") if getattr(self, name) is not None
        ]
        if self.samples is None:
            if others:
                raise UsageError(f"--{others[0].replace('_', '-')}: goes with --samples; add --samples 16.")
            return options
        if self.num_beams is not None and self.num_beams > 1:
            raise UsageError("--num-beams and --samples: choose beams or samples, not both.")
        weights = RankWeights() if self.weights is None else RankWeights.read(self.weights)
        if self.policy is not None:
            read_policy(self.policy)
        try:
            Ranking(samples=self.samples, weights=weights, abstain=self.abstain)
        except UsageError as error:
            raise UsageError(f"--{error}") from error
        if judge is not None:
            check_checkpoint(judge)
        return options
