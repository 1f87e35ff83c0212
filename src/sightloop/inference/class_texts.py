"""Zero-shot classes: the activation of their logits, and the embeddings of their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from sightloop.errors import UsageError
from sightloop.inference.arrays import Probabilities, as_numpy, stack
from sightloop.inference.matching import weights_dtype
from sightloop.protocols import Embedder, LabelClassifier
from sightloop.tasks import embed
from sightloop.tasks.embed import require_finite
from sightloop.types import Encoded, LogitActivation


def choose_activation(
    name: str, activation: LogitActivation | None, default: LogitActivation
) -> LogitActivation:
    """The activation of class logits: the caller's, else the model's.

    Args:
        name: of the model.
        activation: what the caller asks for, None for the default.
        default: as the model was trained.

    Raises:
        UsageError: no such activation, or one that the model was not trained for.
    """
    if activation not in (None, "softmax", "sigmoid"):
        raise UsageError(f'activation="{activation}": must be "softmax" or "sigmoid"')
    if activation == "sigmoid" and default == "softmax":
        raise UsageError(f'activation="sigmoid": {name} was trained to choose; its logits say nothing alone')
    return activation or default


def label_probabilities(
    head: LabelClassifier, batches: Iterable[Encoded], classes: int, dtype: torch.dtype
) -> Probabilities:
    """Probabilities `[n, classes]` of the fine-tuned classes, of batches of encoded images; dtype: of the weights."""
    rows = [
        require_finite(embed.label_probabilities(head, batch), "label probabilities", dtype)
        for batch in batches
    ]
    return Probabilities.of(stack(map(as_numpy, rows), classes), "softmax")


def class_probabilities(
    network: Embedder, batches: Iterable[Tensor], classes: Tensor, activation: LogitActivation
) -> Probabilities:
    """Zero-shot probabilities `[n, C]` of image embeddings, in batches, for class embeddings `[C, P]`."""
    dtype = weights_dtype(network)
    rows = [
        require_finite(embed.class_probabilities(network, batch, classes, activation), "probabilities", dtype)
        for batch in batches
    ]
    return Probabilities.of(stack(map(as_numpy, rows), len(classes)), activation)


class ClassTexts:
    """Embeddings of classes, kept for the next call with the same labels and templates."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def embeddings(
        self, labels: Sequence[str], templates: Sequence[str], embed_texts: Callable[[list[str]], Tensor]
    ) -> Tensor:
        """Embeddings `[C, P]` of C labels, averaged over the templates.

        Args:
            labels: the classes.
            templates: sentences with "{}" for the label.
            embed_texts: n texts -> `[n, P]`.

        Raises:
            UsageError: a template lacks the "{}".
        """
        for template in templates:
            if "{}" not in template:
                raise UsageError(f'template "{template}": must hold {{}} where the label goes')
        key = (tuple(labels), tuple(templates))
        if self._kept is None or self._kept[0] != key:
            texts = [template.replace("{}", label) for label in labels for template in templates]
            self._kept = (key, embed.ensemble(embed_texts(texts), len(templates)))
        return self._kept[1]
