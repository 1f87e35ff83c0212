"""sightread reads pictures at sight: caption, judge, search, train and evaluate on your own pictures.

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
from sightread.types import Message

if TYPE_CHECKING:
    from sightread.data.samples import Dataset, open_dataset
    from sightread.pipelines import metrics
    from sightread.pipelines.capfilt import bootstrap
    from sightread.pipelines.engine import Model, load
    from sightread.pipelines.evaluate import evaluate
    from sightread.pipelines.evaluation.measures import Evaluation
    from sightread.pipelines.train import train

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Dataset",
    "Evaluation",
    "ImageError",
    "Message",
    "Model",
    "SightreadError",
    "TokenizerError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "bootstrap",
    "evaluate",
    "load",
    "metrics",
    "open_dataset",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from sightread.pipelines import engine as home
    elif name in ("Dataset", "open_dataset"):
        from sightread.data import samples as home
    elif name == "bootstrap":
        from sightread.pipelines import capfilt as home
    elif name in ("Evaluation", "evaluate"):
        from sightread.pipelines import evaluate as home
    elif name == "train":
        from sightread.pipelines import train as home
    elif name == "metrics":
        from sightread.pipelines import metrics

        return metrics
    else:
        raise AttributeError(f"module 'sightread' has no attribute {name!r}")
    return getattr(home, name)
