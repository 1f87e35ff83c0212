"""Metrics as pure functions of predictions and references: numpy and text, no torch, no model.

    from sightloop.metrics import caption_scores

    caption_scores(["a dog runs"], [["a dog is running", "the dog runs"]])  # {"BLEU-1": ..., "CIDEr": ...}

Each `..._scores` function returns numbers by name. `score_captions` and `score_retrieval` return them together with the
scores of every sample, which `bootstrap_interval` and `paired_bootstrap` turn into confidence intervals. Each
`..._not_computed` function gives the reason why a metric of an optional dependency cannot be computed.
"""

from __future__ import annotations

from sightloop.metrics.bootstrap_ci import (
    Difference,
    Interval,
    RowStatistic,
    Statistic,
    bootstrap_interval,
    bootstrap_rows,
    paired_bootstrap,
    paired_bootstrap_rows,
)
from sightloop.metrics.captions import CaptionScores, bleu, caption_scores, caption_statistics, score_captions
from sightloop.metrics.chair import (
    ChairCounts,
    Mention,
    ObjectNames,
    chair_counts,
    chair_scores,
    coco_objects,
    present_objects,
)
from sightloop.metrics.detection import (
    detection_not_computed,
    detection_scores,
    grounding_scores,
    label_map_scores,
    mask_intersection_union,
    mask_scores,
    paired_iou,
)
from sightloop.metrics.dialogue import (
    answer_ranks,
    dialogue_ndcg,
    dialogue_scores,
    rank_metrics,
    truth_rank,
)
from sightloop.metrics.draw import cmmd, kid
from sightloop.metrics.matching import (
    MatchingCurves,
    calibration_error,
    equal_error_threshold,
    fit_temperature,
    matching_curves,
    matching_scores,
    roc_auc,
)
from sightloop.metrics.meteor_spice import meteor_spice_not_computed
from sightloop.metrics.pope import pope_counts, pope_metrics, pope_question, pope_scores, says_yes
from sightloop.metrics.ptb_tokenizer import ptb_tokenize
from sightloop.metrics.retrieval import RetrievalScores, retrieval_scores, score_retrieval
from sightloop.metrics.vqa import (
    exact_match,
    normalize_answer,
    vqa_accuracies,
    vqa_accuracy,
    wups,
    wups_not_computed,
)

__all__ = [
    "CaptionScores",
    "ChairCounts",
    "Difference",
    "Interval",
    "MatchingCurves",
    "Mention",
    "ObjectNames",
    "RetrievalScores",
    "RowStatistic",
    "Statistic",
    "answer_ranks",
    "bleu",
    "bootstrap_interval",
    "bootstrap_rows",
    "calibration_error",
    "caption_scores",
    "caption_statistics",
    "chair_counts",
    "chair_scores",
    "cmmd",
    "coco_objects",
    "detection_not_computed",
    "detection_scores",
    "dialogue_ndcg",
    "dialogue_scores",
    "equal_error_threshold",
    "exact_match",
    "fit_temperature",
    "grounding_scores",
    "kid",
    "label_map_scores",
    "mask_intersection_union",
    "mask_scores",
    "matching_curves",
    "matching_scores",
    "meteor_spice_not_computed",
    "normalize_answer",
    "paired_bootstrap",
    "paired_bootstrap_rows",
    "paired_iou",
    "pope_counts",
    "pope_metrics",
    "pope_question",
    "pope_scores",
    "present_objects",
    "ptb_tokenize",
    "rank_metrics",
    "retrieval_scores",
    "roc_auc",
    "says_yes",
    "score_captions",
    "score_retrieval",
    "truth_rank",
    "vqa_accuracies",
    "vqa_accuracy",
    "wups",
    "wups_not_computed",
]
