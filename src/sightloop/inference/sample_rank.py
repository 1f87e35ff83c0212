"""Sample and rank: several texts are drawn for an image, filtered, and ranked by likelihood and by a judge.

LaMDA (Thoppilan et al. 2022, sections 3 and 5) draws 16 answers, drops those that a classifier finds unsafe and ranks
the others. Here the judge is an image-text model: ITM and ITC say how well a statement fits the image, which marks
made-up objects better than likelihood does (Deng et al. 2024, arXiv 2402.15300). A judge that was trained for dialogues
says of an answer after its question and history whether it is true and, as LaMDA's discriminators do, whether it is
sensible, specific, grounded and safe.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from sightloop.inference.arrays import as_numpy
from sightloop.inference.dialogue import judge_rounds
from sightloop.inference.judges import Judge
from sightloop.inference.matching import TokenizedTexts
from sightloop.inference.text_generation import WrittenText
from sightloop.protocols import Embedder, require
from sightloop.ranking.dialogue_network import DialogueNetwork, judges_dialogues
from sightloop.ranking.options import ABSTENTION, Candidate, RankedText, Ranking
from sightloop.ranking.policy import Policy
from sightloop.tasks import embed
from sightloop.types import Dialogue, Encoded, ImageSource, Integers, Round

TOP_K = 40  # of sampling (LaMDA, section 3)


def rank_texts(
    ranking: Ranking,
    judge: Judge | None,
    image: Encoded | None,
    written: Sequence[Sequence[WrittenText]],
    statements: Sequence[Sequence[str]],
    earlier: Iterable[str] = (),
    turns: Sequence[Dialogue] | None = None,
) -> list[RankedText]:
    """The best of the texts of B images.

    Args:
        ranking: options.
        judge: as of `Judges.choose`.
        image: B images as the judge encodes them, tokens `[B, N, D]`; None without a judge.
        written: for each image its samples.
        statements: what each sample says of its image.
        earlier: texts of a conversation so far, which are not to be repeated.
        turns: for each image the dialogue whose last question its samples answer; None where nothing was asked.
    """
    earlier_texts = {_normalized(text) for text in earlier}
    candidates: list[list[Candidate]] = []
    for texts, claims in zip(written, statements, strict=True):
        merged: dict[str, Candidate] = {}
        for draw, (one, claim) in enumerate(zip(texts, claims, strict=True)):
            known = merged.get(name := _normalized(one.text))
            best = known
            if known is None or best is None or one.log_prob > known.signals.get("log_prob", 0.0):
                # An empty text has no tokens, so no likelihood.
                signals = {} if math.isnan(one.log_prob) else {"log_prob": one.log_prob}
                best = Candidate(one.text, claim, (), signals)
            merged[name] = replace(best, draws=(*(known.draws if known else ()), draw))
        candidates.append(
            [
                _with_votes(one, len(texts), _reason(one.text, earlier_texts, ranking.policy))
                for one in merged.values()
            ]
        )
    if judge is not None and image is not None:
        candidates = _judged(judge, image, candidates, turns)
        candidates = [[_if_safe(one, ranking.policy) for one in own] for own in candidates]
    return [_ranked(ranking, own) for own in candidates]


def _with_votes(one: Candidate, drawn: int, reason: str) -> Candidate:
    return replace(one, signals={**one.signals, "votes": math.log(one.count / drawn)}, dropped=reason)


def _if_safe(one: Candidate, policy: Policy) -> Candidate:
    """The candidate, dropped where the judge calls it unsafe."""
    safe = one.signals.get("safe", 1.0)
    if one.dropped or safe >= policy.safe:
        return one
    return replace(
        one, dropped=f"the judge calls it safe with a probability of {safe:.2f}, below {policy.safe:g}"
    )


def _judged(
    judge: Judge, image: Encoded, candidates: list[list[Candidate]], turns: Sequence[Dialogue] | None
) -> list[list[Candidate]]:
    """The candidates with the judge's signals; dropped ones are not judged."""
    open_rows = [[i for i, one in enumerate(own) if not one.dropped] for own in candidates]
    texts = [own[i].statement for own, rows in zip(candidates, open_rows, strict=True) for i in rows]
    if not texts:
        return candidates
    ends = np.cumsum([len(rows) for rows in open_rows])
    rows_of = [np.arange(end - len(rows), end) for end, rows in zip(ends, open_rows, strict=True)]
    asked = turns is not None and judges_dialogues(judge.network)
    signals = _signals(judge, image, judge.tokenize(texts), rows_of, matches=not asked)
    if turns is not None and asked:
        answers = [tuple(own[i].text for i in rows) for own, rows in zip(candidates, open_rows, strict=True)]
        for signal, others in zip(signals, _answer_signals(judge, image, turns, answers), strict=True):
            signal.update(others)
    judged = [list(own) for own in candidates]
    for b, (rows, where) in enumerate(zip(open_rows, rows_of, strict=True)):
        for i, row in zip(rows, where.tolist(), strict=True):
            judged[b][i] = replace(judged[b][i], signals={**judged[b][i].signals, **signals[row]})
    return judged


def _answer_signals(
    judge: Judge, image: Encoded, turns: Sequence[Dialogue], answers: Sequence[tuple[str, ...]]
) -> list[dict[str, float]]:
    """Signals of the answers to the last question of each of B dialogues, by a judge that was trained for dialogues.

    Returns:
        For each answer "match", the log-odds that it is true, and its attributes; one dialogue after the other.
    """
    asked = [
        replace(turn, rounds=(*turn.rounds[:-1], Round(turn.rounds[-1].question, None, own)))
        for turn, own in zip(turns, answers, strict=True)
    ]
    network = require(judge.network, DialogueNetwork)
    last = [rounds[-1] for rounds in judge_rounds(network, judge.tokenizer, image, asked)]
    return [
        {**{name: float(values[i]) for name, values in scores.attributes.items()}, "match": float(match)}
        for scores in last
        for i, match in enumerate(scores.match)
    ]


def judge_signals(
    judge: Judge, images: Sequence[ImageSource], texts: Sequence[str]
) -> list[dict[str, float]]:
    """Signals of pairs of an image and a text: "itm", a logit, and "itc", a cosine, as far as the judge has them."""
    tokens, signals = judge.tokenize(texts), list[dict[str, float]]()
    for batch in judge.preprocessor.batches(images):
        start, encoded = len(signals), judge.encode(batch)
        rows_of = [np.array([start + b]) for b in range(len(batch))]
        signals += _signals(judge, encoded, tokens, rows_of)
    return signals


def _signals(
    judge: Judge,
    image: Encoded,
    tokens: TokenizedTexts,
    rows_of: Sequence[Integers],
    *,
    matches: bool = True,
) -> list[dict[str, float]]:
    """Signals of B encoded images with their own texts, in the order of `rows_of`; matches: whether ITM is asked."""
    signals: list[dict[str, float]] = [{} for rows in rows_of for _ in rows]
    if matches and "match" in judge.capabilities:
        logits = np.concatenate(judge.match_scores(image, tokens, rows_of))
        for signal, (no, yes) in zip(signals, logits.tolist(), strict=True):
            signal["itm"] = yes - no
    if isinstance(judge.network, Embedder) and "similarity" in judge.capabilities:
        cosines = as_numpy(
            embed.similarities(embed.embed_images(judge.network, image), tokens.embed(judge.network))
        )
        own = [float(cosines[b, row]) for b, rows in enumerate(rows_of) for row in rows]
        for signal, cosine in zip(signals, own, strict=True):
            signal["itc"] = cosine
    return signals


def _ranked(ranking: Ranking, candidates: Sequence[Candidate]) -> RankedText:
    kept = [replace(one, score=ranking.weights.score(one.signals)) for one in candidates if not one.dropped]
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


def _reason(text: str, earlier_texts: set[str], policy: Policy) -> str:
    """Why a text is dropped, "" if it is not."""
    name = _normalized(text)
    if not name:
        return "it is empty"
    if name in earlier_texts:
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
