"""Vision-language models on your own images: caption, score, filter, train, evaluate.

    import sightloop
    model = sightloop.load("Salesforce/blip-image-captioning-base")
    model.caption("photo.jpg")

Importing this package loads no torch: the heavy parts come with the first call that needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sightloop.errors import (
    CheckpointError,
    ImageError,
    SightloopError,
    TokenizerError,
    UnsupportedError,
    UsageError,
)
from sightloop.types import Message

if TYPE_CHECKING:
    from sightloop import metrics
    from sightloop.capfilt.bootstrap import bootstrap
    from sightloop.data.datasets.dataset import Dataset, open_dataset
    from sightloop.evaluation.evaluate import evaluate
    from sightloop.evaluation.results import Evaluation
    from sightloop.inference.load import Model, load
    from sightloop.training.trainer import train

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Dataset",
    "Evaluation",
    "ImageError",
    "Message",
    "Model",
    "SightloopError",
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
        from sightloop.inference import load as home
    elif name in ("Dataset", "open_dataset"):
        from sightloop.data.datasets import dataset as home
    elif name == "bootstrap":
        from sightloop.capfilt import bootstrap as home
    elif name in ("Evaluation", "evaluate"):
        from sightloop.evaluation import evaluate as home
    elif name == "train":
        from sightloop.training import trainer as home
    elif name == "metrics":
        from sightloop import metrics

        return metrics
    else:
        raise AttributeError(f"module 'sightloop' has no attribute {name!r}")
    return getattr(home, name)
