"""Scores as pure functions over predictions and references: numpy and text, no torch, no model.

import sightloop
sightloop.metrics.caption_scores(["a dog runs"], [["a dog is running", "the dog runs"]])
"""

from __future__ import annotations

from sightloop.metrics.bootstrap_ci import (
    Difference,
    Interval,
    Statistic,
    bootstrap_interval,
    paired_bootstrap,
)
from sightloop.metrics.captions import CaptionScores, bleu, caption_facts, caption_scores, score_captions
from sightloop.metrics.detection import (
    detection_not_computed,
    detection_scores,
    grounding_scores,
    label_map_scores,
    mask_overlap,
    mask_scores,
    paired_iou,
)
from sightloop.metrics.matching import (
    MatchingCurves,
    balanced_threshold,
    calibration_error,
    fitted_temperature,
    matching_curves,
    matching_scores,
    roc_area,
)
from sightloop.metrics.meteor_spice import meteor_spice_not_computed
from sightloop.metrics.ptb_tokenizer import tokenize
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
    "Difference",
    "Interval",
    "MatchingCurves",
    "RetrievalScores",
    "Statistic",
    "balanced_threshold",
    "bleu",
    "bootstrap_interval",
    "calibration_error",
    "caption_facts",
    "caption_scores",
    "detection_not_computed",
    "detection_scores",
    "exact_match",
    "fitted_temperature",
    "grounding_scores",
    "label_map_scores",
    "mask_overlap",
    "mask_scores",
    "matching_curves",
    "matching_scores",
    "meteor_spice_not_computed",
    "normalize_answer",
    "paired_bootstrap",
    "paired_iou",
    "retrieval_scores",
    "roc_area",
    "score_captions",
    "score_retrieval",
    "tokenize",
    "vqa_accuracies",
    "vqa_accuracy",
    "wups",
    "wups_not_computed",
]
