"""Vision-language models on your own images: caption, score, filter, train, evaluate.

    import sightloop
    model = sightloop.load("Salesforce/blip-image-captioning-base")
    model.caption("photo.jpg")

`import sightloop` loads neither torch nor numpy: a public name imports its module on first use.
"""

from __future__ import annotations

TYPE_CHECKING = (
    False  # as `typing.TYPE_CHECKING`, without the import, which the start of a command would wait for
)
if TYPE_CHECKING:
    from sightloop import metrics
    from sightloop.capfilt.bootstrap import bootstrap
    from sightloop.data.datasets.dataset import Dataset, open_dataset
    from sightloop.dialogue.collection_chat import CollectionChat
    from sightloop.errors import (
        CheckpointError,
        ImageError,
        SightloopError,
        TokenizerError,
        UnsupportedError,
        UsageError,
    )
    from sightloop.evaluation.evaluate import evaluate
    from sightloop.evaluation.results import Evaluation
    from sightloop.inference.load import load
    from sightloop.inference.model import Model
    from sightloop.search.index import Index, open_index
    from sightloop.training.trainer import train
    from sightloop.types import Message, Video

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CollectionChat",
    "Dataset",
    "Evaluation",
    "ImageError",
    "Index",
    "Message",
    "Model",
    "SightloopError",
    "TokenizerError",
    "UnsupportedError",
    "UsageError",
    "Video",
    "__version__",
    "bootstrap",
    "evaluate",
    "load",
    "metrics",
    "open_dataset",
    "open_index",
    "train",
]

# Public name -> the module that defines it. The imports for type checkers above say the same, which a test compares.
_MODULES = {
    **dict.fromkeys(
        (
            *("CheckpointError", "ImageError", "SightloopError"),
            *("TokenizerError", "UnsupportedError", "UsageError"),
        ),
        "sightloop.errors",
    ),
    "CollectionChat": "sightloop.dialogue.collection_chat",
    "Dataset": "sightloop.data.datasets.dataset",
    "Evaluation": "sightloop.evaluation.results",
    "Index": "sightloop.search.index",
    "Message": "sightloop.types",
    "Video": "sightloop.types",
    "Model": "sightloop.inference.model",
    "bootstrap": "sightloop.capfilt.bootstrap",
    "evaluate": "sightloop.evaluation.evaluate",
    "load": "sightloop.inference.load",
    "metrics": "sightloop.metrics",
    "open_dataset": "sightloop.data.datasets.dataset",
    "open_index": "sightloop.search.index",
    "train": "sightloop.training.trainer",
}


def __getattr__(name: str) -> object:
    """The public object `name`, imported on first use (PEP 562)."""
    from importlib import import_module

    if name not in _MODULES:
        raise AttributeError(f"module 'sightloop' has no attribute {name!r}")
    module = import_module(_MODULES[name])
    return module if module.__name__ == f"sightloop.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    """The public names, for `dir(sightloop)` and completion; imports nothing."""
    return list(__all__)
