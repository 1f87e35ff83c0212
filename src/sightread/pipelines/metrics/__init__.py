"""Scores as pure functions over predictions and references: numpy and text, no torch, no model, no file.

import sightread
sightread.metrics.caption_scores(["a dog runs"], [["a dog is running", "the dog runs"]])
"""

from __future__ import annotations

from sightread.pipelines.metrics.captions import CaptionScores, caption_facts, caption_scores, score_captions

__all__ = ["CaptionScores", "caption_facts", "caption_scores", "score_captions"]
