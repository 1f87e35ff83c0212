"""Sample and rank: several texts are drawn for an image, filtered, and ranked by likelihood and by a judge.

LaMDA (Thoppilan et al. 2022, sections 3 and 5) draws 16 answers, drops those that a classifier finds unsafe and ranks
the others. Here the judge is an image-text model: ITM and ITC say how well a statement fits the image, which marks
made-up objects better than likelihood does (Deng et al. 2024, arXiv 2402.15300).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Protocol

import numpy as np

from sightloop.errors import UsageError
from sightloop.inference.arrays import as_numpy
from sightloop.inference.image_encoding import Preprocessor
from sightloop.inference.matching import TokenizedTexts
from sightloop.inference.policy import Policy
from sightloop.inference.ranking import ABSTENTION, Candidate, RankedText, Ranking, RankWeights
from sightloop.inference.text_generation import WrittenText
from sightloop.protocols import Embedder, Network
from sightloop.tasks import embed
from sightloop.types import Encoded, Floats32, Integers, Pixels

TOP_K = 40  # of sampling (LaMDA, section 3)


class Judge(Protocol):
    """What of a model reads images and compares statements with them; `Model` is one."""

    @property
    def name(self) -> str: ...
    @property
    def network(self) -> Network: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def preprocessor(self) -> Preprocessor: ...
    def encode(self, batch: Sequence[Pixels]) -> Encoded: ...
    def tokenize(self, texts: Sequence[str], *, first_id: int | None = None) -> TokenizedTexts: ...
    def match_scores(
        self, image: Encoded, texts: TokenizedTexts, rows_of: Sequence[Integers]
    ) -> list[Floats32]: ...


def check_judge(judge: Judge, *, given: bool) -> Judge | None:
    """The judge if it compares texts with images, else None.

    Raises:
        UsageError: it does not, and somebody gave it.
    """
    if judge.capabilities & {"match", "similarity"}:
        return judge
    if given:
        raise UsageError(f"judge: {judge.name} compares no text with an image; load a model that can match")
    return None


def rank_texts(
    ranking: Ranking,
    judge: Judge | None,
    image: Encoded | None,
    written: Sequence[Sequence[WrittenText]],
    statements: Sequence[Sequence[str]],
    earlier: Iterable[str] = (),
) -> list[RankedText]:
    """The best of the texts of B images.

    Args:
        ranking: options.
        judge: as of `check_judge`.
        image: B images as the judge encodes them, tokens `[B, N, D]`; None without a judge.
        written: for each image its samples.
        statements: what each sample says of its image.
        earlier: texts of a conversation so far, which are not to be repeated.
    """
    said = {_normalized(text) for text in earlier}
    candidates: list[list[Candidate]] = []
    for texts, claims in zip(written, statements, strict=True):
        merged: dict[str, Candidate] = {}
        for one, claim in zip(texts, claims, strict=True):
            known = merged.get(name := _normalized(one.text))
            if known is None or one.log_prob > known.signals["log_prob"]:
                merged[name] = Candidate(one.text, claim, 0, {"log_prob": one.log_prob})
            merged[name] = replace(merged[name], count=(known.count if known else 0) + 1)
        candidates.append(
            [_with_votes(one, len(texts), _reason(one.text, said, ranking.policy)) for one in merged.values()]
        )
    if judge is not None and image is not None:
        candidates = _judged(judge, image, candidates)
    return [_ranked(ranking, own) for own in candidates]


def _with_votes(one: Candidate, drawn: int, reason: str) -> Candidate:
    return replace(one, signals={**one.signals, "votes": math.log(one.count / drawn)}, dropped=reason)


def _judged(judge: Judge, image: Encoded, candidates: list[list[Candidate]]) -> list[list[Candidate]]:
    """The candidates with the judge's signals; dropped ones are not judged."""
    open_rows = [[i for i, one in enumerate(own) if not one.dropped] for own in candidates]
    texts = [own[i].statement for own, rows in zip(candidates, open_rows, strict=True) for i in rows]
    if not texts:
        return candidates
    tokens = judge.tokenize(texts)
    ends = np.cumsum([len(rows) for rows in open_rows])
    rows_of = [np.arange(end - len(rows), end) for end, rows in zip(ends, open_rows, strict=True)]
    signals: list[dict[str, float]] = [{} for _ in texts]
    if "match" in judge.capabilities:
        logits = np.concatenate(judge.match_scores(image, tokens, rows_of))
        for signal, (no, yes) in zip(signals, logits.tolist(), strict=True):
            signal["itm"] = yes - no
    if isinstance(judge.network, Embedder) and "similarity" in judge.capabilities:
        cosines = as_numpy(
            embed.similarities(embed.embed_images(judge.network, image), tokens.embed(judge.network))
        )
        for b, rows in enumerate(rows_of):
            for row in rows:
                signals[row]["itc"] = float(cosines[b, row])
    judged = [list(own) for own in candidates]
    for b, (rows, where) in enumerate(zip(open_rows, rows_of, strict=True)):
        for i, row in zip(rows, where.tolist(), strict=True):
            judged[b][i] = replace(judged[b][i], signals={**judged[b][i].signals, **signals[row]})
    return judged


def weighted(weights: RankWeights, signals: Mapping[str, float]) -> float:
    """Score of a candidate; signals that it lacks count nothing."""
    values = asdict(weights)
    return (weights.bias or 0.0) + sum(values[name] * value for name, value in signals.items())


def _ranked(ranking: Ranking, candidates: Sequence[Candidate]) -> RankedText:
    kept = [
        replace(one, score=weighted(ranking.weights, one.signals)) for one in candidates if not one.dropped
    ]
    kept.sort(key=lambda one: -one.score)
    ordered = (*kept, *(one for one in candidates if one.dropped))
    if not kept:
        return RankedText.of(ABSTENTION, ordered, abstained=True)
    best = kept[0]
    if ranking.weights.bias is None:
        return RankedText.of(best.text, ordered, abstained=False)
    probability = 1 / (1 + math.exp(-max(-700.0, min(700.0, best.score))))
    abstained = ranking.abstain is not None and probability < ranking.abstain
    text = ABSTENTION if abstained else best.text
    return RankedText.of(text, ordered, probability, abstained=abstained)


def _reason(text: str, said: set[str], policy: Policy) -> str:
    """Why a text is dropped, "" if it is not."""
    name = _normalized(text)
    if not name:
        return "it is empty"
    if name in said:
        return "it repeats what was said before"
    if loop := repeated_words(text):
        return f'it repeats "{loop}"'
    return policy.refuse_text(text)


def repeated_words(text: str) -> str:
    """Words that follow on themselves so often that a text loops: three times a word, twice two to eight; "" for none.

    "a man and a man and a man" loops; "a man and a woman" does not.
    """
    words = re.findall(r"\w+", text.lower())
    for size in range(1, 9):
        times = 3 if size == 1 else 2
        for start in range(len(words) - size * times + 1):
            unit = words[start : start + size]
            if unit * times == words[start : start + size * times]:
                return " ".join(unit)
    return ""


def _normalized(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
