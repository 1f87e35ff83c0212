"""What notebooks and shells show of a model: a table, names to complete, and decoding options in signatures."""

from __future__ import annotations

import inspect
from dataclasses import fields
from html import escape
from typing import Protocol

from sightloop.ranking.options import Ranking
from sightloop.tasks.generate import Decoding
from sightloop.types import ImageSpec

# Verb -> its capability, where the names differ; the others are called as what they do.
_CAPABILITY_OF = {"read_text": "read", "embed_images": "embed", "embed_texts": "embed"}
_VERBS = frozenset(
    "embed_images embed_texts similarity classify match rank caption answer detect locate segment read_text chat "
    "explain draw".split()
)


class ShownModel(Protocol):
    """What of a model is shown."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def image_spec(self) -> ImageSpec: ...
    @property
    def device(self) -> object: ...
    @property
    def dtype(self) -> object: ...


def model_html(model: ShownModel) -> str:
    """A table of one row: name, family, what it can do, image size, device and precision."""
    height, width = model.image_spec.crop or model.image_spec.resize or (0, 0)
    cells = {
        "model": model.name,
        "family": model.family,
        "can": ", ".join(sorted(model.capabilities)),
        "images": f"{width} x {height}" if width else "any size",
        "on": f"{model.device}, {str(model.dtype).removeprefix('torch.')}",
    }
    head = "".join(f"<th>{escape(name)}</th>" for name in cells)
    body = "".join(f"<td>{escape(text)}</td>" for text in cells.values())
    return f"<table><tr>{head}</tr><tr>{body}</tr></table>"


def public_names(model: ShownModel) -> list[str]:
    """Public names of a model, without the verbs that it lacks, for completion."""
    can = model.capabilities | ({"explain"} if model.capabilities & {"match", "similarity"} else set[str]())
    lacking = {verb for verb in _VERBS if _CAPABILITY_OF.get(verb, verb) not in can}
    return sorted(name for name in set(object.__dir__(model)) - lacking if not name.startswith("_"))


def show_decoding_options(kind: type) -> None:
    """Puts the fields of `Decoding` in place of `**decoding` into the signatures that `help` and shells show.

    In place of `**options` come those of sample and rank too. A default reads as None: the checkpoint's own.
    """
    keyword = inspect.Parameter.KEYWORD_ONLY
    decoding = [_shown(field.name, str(field.type)) for field in fields(Decoding)]
    ranking = [_shown(field.name, str(field.type)) for field in fields(Ranking)]
    shown = {"decoding": decoding, "options": [*ranking, _shown("details", "bool"), *decoding]}
    for verb in vars(kind).values():
        if not inspect.isfunction(verb) or verb.__name__.startswith("_"):
            continue
        signature = inspect.signature(verb)
        for name, options in shown.items():
            parameter = signature.parameters.get(name)
            if parameter is not None and parameter.kind is keyword.VAR_KEYWORD:
                own = [each for each in signature.parameters.values() if each.name != name]
                verb.__signature__ = signature.replace(parameters=[*own, *options])  # pyright: ignore


def _shown(name: str, annotation: str) -> inspect.Parameter:
    text = f"{annotation.removesuffix(' | None')} | None"
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=text)
