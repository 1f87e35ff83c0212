"""For benchmarks only: lets open_clip be imported where torchvision is not installed.

open_clip needs torchvision for its image transforms, which the benchmarks never run, not for its networks. The names
that it imports are there while it is imported and gone afterwards; whoever calls one gets an error.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

_TRANSFORMS = "Normalize Compose RandomResizedCrop ToTensor Resize CenterCrop ColorJitter Grayscale".split()
_FILTERS = "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS".split()


class Absent:
    """In the place of a class of torchvision."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{type(self).__name__}: torchvision is not installed; this is a stub of the benchmarks"
        )


@contextmanager
def torchvision_where_absent() -> Generator[None]:
    """Inside the block `import torchvision` works, with the installed one or else with empty names."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # asked now, the answer stays the truth: there is none
    modules = _modules()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


def _modules() -> dict[str, ModuleType]:
    parts = ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")
    modules = {f"torchvision{part}": ModuleType(f"torchvision{part}") for part in parts}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    transforms = modules["torchvision.transforms"]
    for name in _TRANSFORMS:
        setattr(transforms, name, type(name, (Absent,), {}))
    transforms.InterpolationMode = Enum("InterpolationMode", _FILTERS)  # type: ignore[attr-defined]
    misc = modules["torchvision.ops.misc"]
    misc.FrozenBatchNorm2d = type("FrozenBatchNorm2d", (Absent,), {})  # type: ignore[attr-defined]
    return modules
