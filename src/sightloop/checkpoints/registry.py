"""The families that `load` knows, and how each of their checkpoint layouts is recognized."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from sightloop.checkpoints import (
    blip,
    blip2,
    clip,
    clip_resnet,
    florence,
    llava,
    painter,
    paligemma,
    siglip,
    stable_diffusion,
)
from sightloop.checkpoints.config_types import check_config
from sightloop.checkpoints.hub import CheckpointFiles
from sightloop.checkpoints.key_map import KeyMap, PartTensors, RenamedTensors, load_weights
from sightloop.checkpoints.layout import ConfigType, Family, Layout, WeightHook
from sightloop.checkpoints.llava_original import as_hub_layout, is_original
from sightloop.checkpoints.pipeline_files import PIPELINE_FILE
from sightloop.checkpoints.tensors import read_tensors
from sightloop.errors import CheckpointError
from sightloop.nn.blocks import ACTIVATIONS
from sightloop.types import JsonDict, JsonMapping

# In the order in which `recognize` tries them: BLIP-2 before BLIP, which has an image tower of the same names.
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        clip.FAMILY,
        clip_resnet.FAMILY,
        blip2.FAMILY,
        blip.FAMILY,
        siglip.FAMILY,
        florence.FAMILY,
        llava.FAMILY,
        paligemma.FAMILY,
        painter.FAMILY,
        stable_diffusion.FAMILY,
    )
}


def read_checkpoint(located: CheckpointFiles, dtype: torch.dtype) -> tuple[JsonMapping, Mapping[str, Tensor]]:
    """A checkpoint's config ({} without one) and tensors, each read when it is asked for.

    LLaVA in the layout of its original code comes as the hub has it, with its image tower. Raises CheckpointError.
    """
    config = located.config or {}
    if (located.folder / PIPELINE_FILE).is_file() and "_class_name" in config:
        return config, _read_parts(located, config, dtype)
    tensors = read_tensors(located.weights, dtype)
    return (
        as_hub_layout(located, config, tensors, dtype) if is_original(config, tensors) else (config, tensors)
    )


def _read_parts(located: CheckpointFiles, config: JsonMapping, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint of parts; an autoencoder whose activations leave float16's range in float32."""
    files: dict[str, list[Path]] = {}
    for path in located.weights:
        files.setdefault(path.parent.name, []).append(path)
    is_wide = dtype == torch.float16 and config["vae"].get("force_upcast", True)
    return PartTensors(
        {
            part: read_tensors(own, torch.float32 if part == "vae" and is_wide else dtype)
            for part, own in files.items()
        }
    )


def recognize(tensors: Mapping[str, Tensor], source: str, model_type: object = None) -> tuple[Family, str]:
    """The family and layout of a checkpoint, by the names of its tensors.

    Args:
        tensors: of the checkpoint.
        source: its name, for messages.
        model_type: of its config.json; None without one. Other models have tensors of the same names (MetaCLIP 2 those
            of CLIP), and other tokenizers.

    Raises:
        CheckpointError: no family reads it.
    """
    known = _recognize(tensors)
    if known is None and any(".mm_projector." in name for name in tensors):
        raise CheckpointError(
            f"{source}: is LLaVA in the layout of its original code, without a config.json that names its image tower "
            "(mm_vision_tower); put the checkpoint's own beside its weights, or load the same model from the hub, such "
            "as llava-hf/llava-1.5-7b-hf"
        )
    types = [kind for family in FAMILIES.values() for kind in family.model_types]
    if isinstance(model_type, str) and model_type not in (
        types if known is None else known[0].model_types or types
    ):
        raise CheckpointError(
            f"{source}: config.json: a model of type {model_type!r} is not supported; supported: {', '.join(types)}. "
            "`sightloop models` lists checkpoints to take instead"
        )
    if known is None:
        raise CheckpointError(
            f"{source}: no known kind of checkpoint (known: {', '.join(_known_layouts())}). "
            f"Its first tensors are {', '.join(sorted(tensors)[:4])}"
        )
    return known


def unwrap(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors without the names of modules around the network: "model.visual.proj" -> "visual.proj".

    A name in front of all tensors is removed as long as they are of no known kind (a LightningModule, a trainer's own
    class around the network). Unchanged if that does not help.
    """
    inner = tensors
    while inner and _recognize(inner) is None:
        prefix = next(iter(inner)).partition(".")[0] + "."
        if not all(name.startswith(prefix) and name != prefix for name in inner):
            return tensors
        inner = RenamedTensors(inner, {name.removeprefix(prefix): name for name in inner})
    return inner


def _recognize(tensors: Mapping[str, Tensor]) -> tuple[Family, str] | None:
    return next(
        (
            (family, name)
            for family in FAMILIES.values()
            for name, layout in family.layouts.items()
            if all(marker in tensors for marker in layout.markers)
        ),
        None,
    )


def build_network(
    family: Family,
    config: Any,
    tensors: Mapping[str, Tensor],
    layout: Layout | None,
    *,
    source: str,
    weight_hook: WeightHook | None = None,
) -> nn.Module:
    """The network with its weights; layout None: our own. Raises CheckpointError that names what does not fit.

    taking: puts weights elsewhere than in the network, as few bits.
    """
    check_config(config, source)
    try:
        if _max_layers(config) > len(tensors):  # before any is made
            raise ValueError(f"{_max_layers(config)} layers of {len(tensors)} tensors")
        with torch.device("meta"):
            net: nn.Module = family.network(config)
    except KeyError as error:
        raise CheckpointError(
            f"{source}: the activation {error} in its config is not known; known: {', '.join(ACTIVATIONS)}"
        ) from error
    except (IndexError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(
            f"{source}: its config describes no {family.name} model that can be built ({error!r})"
        ) from error
    take = None if weight_hook is None else weight_hook(net)
    if layout is None:
        load_weights(net, tensors, None, source=source, weight_hook=take)
    else:
        load_weights(
            net, tensors, key_map_of(layout, config), ignore=layout.ignored, source=source, weight_hook=take
        )
    return net.eval()


def _max_layers(config: Any) -> int:
    """How many layers a config asks for, of the part of it that asks for most."""
    most = 0
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            most = max(most, _max_layers(value))
        elif field.name in ("layers", "depths"):
            most = max(most, *(value if isinstance(value, tuple) else (value,)))
    return most


def key_map_of(layout: Layout, config: Any) -> KeyMap:
    """The key map of a checkpoint of this layout and config."""
    return layout.keys(config) if callable(layout.keys) else layout.keys


def config_from_dict(
    kind: ConfigType, data: JsonMapping, towers: Mapping[str, ConfigType | UnionType] | None = None
) -> Any:
    """A (nested) frozen dataclass from what `dataclasses.asdict` and JSON made of it. Raises TypeError or KeyError.

    towers: types of the fields that the class declares by a protocol.
    """
    hints = {**typing.get_type_hints(kind), **(towers or {})}
    values: JsonDict = {}
    for name, value in data.items():
        parts = [
            part for part in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(part)
        ]
        if parts and value is not None:
            # Of several kinds of tower the one with these names; else the first, which says what it lacks.
            fitting = [part for part in parts if _fits(typing.cast(ConfigType, part), value)]
            value = config_from_dict(typing.cast(ConfigType, [*fitting, *parts][0]), value)
        values[name] = as_tuples(value)
    return kind(**values)


def _fits(kind: ConfigType, data: JsonMapping) -> bool:
    """Whether the dataclass knows all of these names, and lacks none that it needs."""
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    return needed <= set(data) <= {f.name for f in fields}


def as_tuples(value: Any) -> Any:
    """Lists, of lists too, as tuples: JSON knows none."""
    return tuple(map(as_tuples, cast("list[Any]", value))) if isinstance(value, list) else value


def _known_layouts() -> list[str]:
    return [f"{family.name} as {name} writes it" for family in FAMILIES.values() for name in family.layouts]
