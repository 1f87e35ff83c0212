"""Visual dialogue as an evaluation task: candidates ranked by the model (Das et al. 2017; VisDial's metrics)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sightloop.data.datasets.synthetic import exchange_of, label_answer
from sightloop.evaluation.predictions import Records
from sightloop.evaluation.ranked_answers import (
    CountText,
    Measure,
    RankedQuestion,
    TextCounts,
    ranked_question,
    ranking_metrics,
)
from sightloop.evaluation.results import ExampleCase, MetricTable, TaskScores, ratio_of_means
from sightloop.evaluation.task import EvalOptions, Events, TaskContext, TaskPhase, over_images
from sightloop.evaluation.writing import draw_replies, table_settings, write_replies
from sightloop.metrics import (
    dialogue_ndcg,
    exact_match,
    matching_curves,
    normalize_answer,
    rank_metrics,
    roc_auc,
    truth_rank,
)
from sightloop.ranking.dialogue_network import AnswerScores, judges_dialogues
from sightloop.ranking.dialogue_text import true_answer
from sightloop.types import Floats, Floats32, JsonDict, Pixels, Round, Sample

if TYPE_CHECKING:
    from sightloop.inference.model import Model

_PROTOCOLS = {
    "MRR": "mean reciprocal rank of the true answer",
    "R@1": "share of true answers ranked first",
    "R@5": "share of true answers among the first 5",
    "R@10": "share of true answers among the first 10",
    "mean rank": "mean rank of the true answer; lower is better",
}
_NDCG = (
    "normalized discounted cumulative gain by people's relevance, over as many candidates as have any (VisDial "
    "challenge)"
)
_SCORES: dict[str, str] = {
    "likelihood": "the log-likelihood of the answer after image, caption, rounds before and question",
    "itm": 'the ITM logit of image and "caption rounds question answer"',
    "both": "the sum of its ITM logit and its log-likelihood",
}
_OTHERS = "the scores of another program"
_AREA = (
    "area under the ROC curve of the probability that an answer is {}, against its label, over all candidates; ties "
    "count half"
)
_NO_RELEVANCE = (
    "no round has relevance by people: name the dense annotations beside the dialogues "
    "(visdial_1.0_val_dense_annotations.json)"
)


_KEPT = "the answer that the model itself gives, kept of those drawn (top-k 40); the rounds before as people have them"
_MEASURES = (
    Measure(
        "exact match",
        f"equal to the true answer, both normalized as for VQA; {_KEPT}",
        "images",
        (0, 1),
        ratio_of_means,
    ),
    Measure(
        "grounded",
        "true of the image: in dialogues of the synthetic world by its rules whatever the wording, elsewhere by the "
        f"label `grounded` of the candidate that says the same, and no other text is; {_KEPT}",
        "images",
        (2, 3),
        ratio_of_means,
    ),
)


class _Scored(NamedTuple):
    """A round and the scores `[C]` of its candidates."""

    round: Round
    scores: list[float]


class DialogueTask:
    """Scores of the candidate answers of every round."""

    def __init__(self, options: EvalOptions) -> None:
        self.options = options
        self.settings: JsonDict = {"score_by": options.score_by, "history": options.history}
        if options.rank_samples is not None:
            self.settings |= {"decoding": dict(options.decoding), **table_settings(options)}

    def wants(self, sample: Sample) -> bool:
        """It needs rounds with candidates of which one is true, or with relevance."""
        return any(_is_ranked(one) for dialogue in sample.dialogues for one in dialogue.rounds)

    def phases(self) -> Sequence[TaskPhase]:
        """All rounds of an image together: candidates scored, and where asked for answers written, drawn and ranked."""
        capability = {"likelihood": "answer", "itm": "match", "both": "answer", None: ""}[
            self.options.score_by
        ]
        phases = [TaskPhase("scoring answers", "scores", self._score, capability)]
        if self.options.rank_samples is not None:
            phases.append(TaskPhase("answering", "answers", over_images(self._answer), "answer"))
            phases.append(TaskPhase("drawing and ranking", "ranked", over_images(self._draw), "answer"))
        return phases

    def _answer(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        return write_replies(model, images, [sample.dialogues for sample in samples], self.options)

    def _draw(self, model: Model, samples: list[Sample], images: list[Pixels]) -> list[JsonDict]:
        return draw_replies(model, images, [sample.dialogues for sample in samples], self.options)

    def _score(self, work: TaskContext, samples: list[Sample]) -> Events:
        from sightloop.evaluation import answer_scores  # imports torch

        method = answer_scores.score_method(work.model, self.options.score_by)
        judges = method != "likelihood" and judges_dialogues(work.model.network)

        def predict(batch: list[Sample], images: list[Pixels]) -> list[JsonDict]:
            dialogues = [sample.dialogues for sample in batch]
            if judges:
                read = work.model, images, dialogues
                judged = answer_scores.judge_dialogues(*read, self.options.history)
                if method == "itm":
                    return [_as_record(own, None) for own in judged]
                likelihoods = answer_scores.score_dialogues(*read, "likelihood", self.options.history)
                return [_as_record(own, rows) for own, rows in zip(judged, likelihoods, strict=True)]
            scored = answer_scores.score_dialogues(
                work.model, images, dialogues, method, self.options.history
            )
            return [{"scores": [_as_numbers(row) for row in own], "scored_by": method} for own in scored]

        return work.map_images(samples, predict)

    def score(self, samples: Sequence[Sample], records: Records) -> TaskScores:
        """VisDial's metrics; images are resampled with all of their rounds."""
        scored = {sample.key: _scored_rounds(sample, records) for sample in samples}
        known = {
            key: own
            for key, rows in scored.items()
            if (own := [r for r in rows if r.round.truth is not None])
        }
        ranks = {key: np.array([_rank(each) for each in own]) for key, own in known.items()}
        gains = {key: own for key, rows in scored.items() if (own := _gains(rows))}
        ending = self._ending(records[samples[0].key], scored)
        keys = list(ranks)
        tables: list[MetricTable] = []
        not_computed: dict[str, str] = {}
        for name, protocol in _PROTOCOLS.items() if keys else ():
            rows = np.array([[rank_metrics(ranks[key])[name].sum(), len(ranks[key])] for key in keys])
            count = f"{int(rows[:, 1].sum()):,} rounds"
            tables.append(_mean_of_rounds(name, f"{protocol}; {count}; {ending}", keys, rows))
        if not keys:
            not_computed |= dict.fromkeys(_PROTOCOLS, "no round says which candidate is the true answer")
        if gains:
            rows = np.array([[sum(own), len(own)] for own in gains.values()])
            protocol = f"{_NDCG}; {int(rows[:, 1].sum()):,} rounds; {ending}"
            tables.append(_mean_of_rounds("NDCG", protocol, list(gains), rows))
        else:
            not_computed["NDCG"] = _NO_RELEVANCE
        tables += _attribute_tables(samples, records)
        weights: JsonDict = {}
        if self.options.rank_samples is not None:
            answered = _ranked_rounds(samples, records)
            measures = [one for one in _MEASURES if any(each.greedy[one.columns[1]] for each in answered)]
            if answered:
                more, weights = ranking_metrics(answered, self.options.rank_samples, measures)
                tables += more
        cases = tuple(_case(sample, scored[sample.key]) for sample in samples)
        ranked = "mean reciprocal rank of an image's true answers, the worst round shown; disputed: NDCG says otherwise"
        return TaskScores(tuple(tables), not_computed, cases, ranked, weights=weights)

    def _ending(self, record: JsonDict, scored: dict[str, list[_Scored]]) -> str:
        """The end of every protocol."""
        sizes = sorted({len(each.scores) for own in scored.values() for each in own})
        count = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        how = next((text for name, text in _SCORES.items() if name == record.get("scored_by")), _OTHERS)
        history = self.options.history
        read = {None: "", 0: ", the question alone"}.get(history, f", the {history} rounds before alone")
        return f"{count} candidates, ranked by {how}{read}; of equal scores the earlier candidate comes first"


def _as_record(judged: Sequence[AnswerScores], likelihoods: Sequence[Floats32] | None) -> JsonDict:
    """What a line of the predictions keeps of the rounds of an image; log-likelihoods are added to ITM's logits."""
    attributes = [{name: _as_numbers(row) for name, row in one.attributes.items()} for one in judged]
    rows = [one.match for one in judged]
    if likelihoods is not None:
        rows = [match + own for match, own in zip(rows, likelihoods, strict=True)]
    return {
        "scores": [_as_numbers(row) for row in rows],
        "scored_by": "itm" if likelihoods is None else "both",
        "attributes": attributes,
    }


def _attribute_tables(samples: Sequence[Sample], records: Records) -> list[MetricTable]:
    """The area under the ROC curve of each attribute that model and data have, over all candidates."""
    scores: dict[str, dict[str, list[float]]] = {}  # attribute -> image -> scores
    labels: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        rounds = [one for dialogue in sample.dialogues for one in dialogue.rounds]
        rows = records[sample.key].get("attributes", [])
        for one, row in zip(rounds, rows, strict=False):
            for name in one.attributes.keys() & row.keys():
                scores.setdefault(name, {}).setdefault(sample.key, []).extend(row[name])
                labels.setdefault(name, {}).setdefault(sample.key, []).extend(one.attributes[name])
    tables: list[MetricTable] = []
    for name in sorted(scores):
        keys, width = list(scores[name]), max(map(len, scores[name].values()))
        rows = np.full((len(keys), 2, width), np.nan)
        for table, key in zip(rows, keys, strict=True):
            table[0, : len(scores[name][key])] = scores[name][key]
            table[1, : len(labels[name][key])] = labels[name][key]
        count = int(np.isfinite(rows[:, 0]).sum())
        protocol = f"{_AREA.format(name)}; {count:,} candidates of {len(keys):,} images"
        rows = rows.reshape(len(keys), -1)
        tables.append(
            MetricTable(f"ROC AUC ({name})", protocol, "images", keys, rows, of_rows=_roc_area, resamples=100)
        )
    return tables


def _ranked_rounds(samples: Sequence[Sample], records: Records) -> list[RankedQuestion]:
    """The rounds whose true answer is known, with the answers that were drawn."""
    ranked: list[RankedQuestion] = []
    for sample in samples:
        rounds = [one for dialogue in sample.dialogues for one in dialogue.rounds]
        record, key = records[sample.key], sample.key
        for one, greedy, drawn in zip(rounds, record["answers"], record["ranked"], strict=True):
            if (truth := true_answer(one)) is not None:
                ranked.append(ranked_question(key, key, drawn, str(greedy), _counting(one, truth)))
    return ranked


def _counting(one: Round, truth: str) -> CountText:
    """What an answer to a round counts for: equal to the true one, 1, grounded, 1; of an unknown one 0 and 0."""
    exchange = exchange_of(one)
    labels = one.attributes.get("grounded")
    texts = [normalize_answer(text) for text in one.candidates]

    def count(text: str) -> TextCounts:
        same = exact_match([text], [[truth]])
        if exchange is not None:
            grounded = float(label_answer(exchange, text).grounded)
        elif labels is not None:
            own = normalize_answer(text)
            grounded = float(labels[texts.index(own)]) if own in texts else same
        else:
            return TextCounts((same, 1.0, 0.0, 0.0), same)
        return TextCounts((same, 1.0, grounded, 1.0), grounded)

    return count


def _roc_area(rows: Floats) -> float:
    """Of rows `[N, 2 M]`: M scores, then M labels, NaN for none."""
    scores, labels = np.split(rows, 2, axis=1)
    known = np.isfinite(scores)
    if not 0 < labels[known].sum() < known.sum():
        return float("nan")
    return roc_auc(matching_curves(scores[known], labels[known]))


def _is_ranked(one: Round) -> bool:
    return len(one.candidates) > 1 and (one.truth is not None or any(one.relevance))


def _as_numbers(scores: Floats32) -> list[float]:
    """float32 scores as the shortest numbers that give them back."""
    return [float(f"{score:.9g}") for score in scores.tolist()]


def _scored_rounds(sample: Sample, records: Records) -> list[_Scored]:
    """The rounds that count, with their scores. Raises ValueError for scores of other rounds."""
    rounds = [one for dialogue in sample.dialogues for one in dialogue.rounds]
    rows = records[sample.key]["scores"]
    pairs = [_Scored(one, row) for one, row in zip(rounds, rows, strict=True) if _is_ranked(one)]
    for one, row in pairs:
        if len(row) != len(one.candidates):
            raise ValueError(f"{sample.key}: {len(row)} scores for {len(one.candidates)} candidates")
    return pairs


def _rank(each: _Scored) -> int:
    assert each.round.truth is not None
    return truth_rank(each.scores, each.round.truth)


def _gains(rows: Sequence[_Scored]) -> list[float]:
    return [dialogue_ndcg(each.scores, each.round.relevance) for each in rows if any(each.round.relevance)]


def _mean_of_rounds(name: str, protocol: str, keys: Sequence[str], rows: object) -> MetricTable:
    """A mean over rounds: rows `[N, 2]`, an image's sum and its number of rounds."""
    return MetricTable(name, protocol, "images", keys, np.asarray(rows, np.float64), of_means=ratio_of_means)


def _case(sample: Sample, rows: Sequence[_Scored]) -> ExampleCase:
    """The image with the round whose true answer is ranked last."""
    known = [each for each in rows if each.round.truth is not None]
    worst = max(known, key=_rank, default=rows[0])
    best = worst.round.candidates[int(np.argmax(worst.scores))]
    lines = [("caption", sample.dialogues[0].caption), ("question", worst.round.question), ("model", best)]
    if worst.round.truth is not None:
        answer = worst.round.candidates[worst.round.truth]
        lines.append(("people", f"{answer} (rank {_rank(worst)} of {len(worst.scores)})"))
    mean_reciprocal = float(np.mean([1 / _rank(each) for each in known])) if known else 0.0
    gains = _gains(rows)
    disputed = abs(float(np.mean(gains)) - mean_reciprocal) if gains else 0.0
    return ExampleCase(sample.key, mean_reciprocal, disputed, tuple(line for line in lines if line[1]))
