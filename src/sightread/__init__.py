"""sightread reads pictures at sight: caption, judge, classify, ask and embed your own pictures with CLIP and BLIP.

    import sightread
    model = sightread.load("Salesforce/blip-image-captioning-base")
    model.caption("photo.jpg")

Importing this package loads no torch: the heavy parts come with the first call that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sightread.errors import (
    CheckpointError,
    ImageError,
    SightreadError,
    TokenizerError,
    UnsupportedError,
    UsageError,
)

if TYPE_CHECKING:
    from sightread.data.samples import Dataset, open_dataset
    from sightread.pipelines import metrics
    from sightread.pipelines.engine import Model, load
    from sightread.pipelines.evaluate import evaluate
    from sightread.pipelines.evaluation.measures import Evaluation

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Dataset",
    "Evaluation",
    "ImageError",
    "Model",
    "SightreadError",
    "TokenizerError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "evaluate",
    "load",
    "metrics",
    "open_dataset",
]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from sightread.pipelines import engine

        return getattr(engine, name)
    if name in ("Dataset", "open_dataset"):
        from sightread.data import samples

        return getattr(samples, name)
    if name in ("Evaluation", "evaluate"):
        from sightread.pipelines import evaluate

        return getattr(evaluate, name)
    if name == "metrics":
        from sightread.pipelines import metrics

        return metrics
    raise AttributeError(f"module 'sightread' has no attribute {name!r}")
