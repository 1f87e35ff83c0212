"""The families that `load` knows, and how each of their checkpoint layouts is recognised."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sightread.errors import CheckpointError
from sightread.models import (
    blip,
    blip2,
    blip2_checkpoints,
    blip_checkpoints,
    clip,
    clip_checkpoints,
    clip_resnet,
    florence,
    florence_checkpoints,
    llava,
    llava_checkpoints,
    paligemma,
    paligemma_checkpoints,
    siglip,
    siglip_checkpoints,
)
from sightread.models.settings import one_spelling
from sightread.models.weights import KeyMap, fill
from sightread.nn.blocks import ACTIVATIONS

TokenizerKind = typing.Literal["clip", "bert", "pieces", "bart", "language", "llama", "gemma"]
# A network -> what is asked to take each of its weights (see `weights.fill`).
Taking: typing.TypeAlias = "Callable[[nn.Module], Callable[[str, Tensor], bool]]"


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a family's checkpoints are written.

    markers: tensors that every checkpoint of this layout has, and none of another layout or family.
    ignored: patterns of names that carry nothing for us. prepare: brings names with a second spelling to one.
    configure: from the parsed config (may be empty) and the tensors to the family's Config. keys: the map, or what
    makes it of a Config where families have more than one kind of tower.
    """

    keys: KeyMap | Callable[[Any], KeyMap]
    ignored: Sequence[str]
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    markers: Sequence[str]
    configure: Callable[[Mapping[str, Any], Mapping[str, Tensor]], Any]


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its network, its config, its layouts by name, the kind of its tokenizer and image processor."""

    name: str
    network: Callable[[Any], Any]
    config: type[Any]
    layouts: Mapping[str, Layout]
    # A family with several kinds says which one by its config.
    tokenizer: TokenizerKind | Callable[[Any], TokenizerKind]
    image_processor: str
    # Each model that `transformers` makes of it: folder ("" where there is one) -> (config.json, tensor prefixes).
    to_transformers: Callable[[Any], dict[str, tuple[dict[str, Any], tuple[str, ...]]]]
    # The processor settings that original checkpoints were trained with (they carry none themselves).
    default_image: Callable[[Any], dict[str, Any]]

    # Whether the reference reads how it writes in generation_config.json.
    generation: bool = False
    # A processor_config.json and what it adds to the image processor's settings, for readers that need one: from the
    # config, the size of pictures, and the words that stand for no thing.
    processor: (
        Callable[[Any, tuple[int, int], Sequence[str]], tuple[dict[str, Any], dict[str, Any]]] | None
    ) = None

    def tokenizer_of(self, config: Any) -> TokenizerKind:
        """The kind of a checkpoint of this config."""
        return self.tokenizer(config) if callable(self.tokenizer) else self.tokenizer


_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def _clip_image(config: clip.Config | clip_resnet.Config) -> dict[str, Any]:
    side = config.vision.image_size
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    }


def _blip_image(config: blip.Config | blip2.Config) -> dict[str, Any]:
    side = config.vision.image_size
    return {
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "resample": 3,
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
    }


def _siglip_image(config: siglip.Config | paligemma.Config) -> dict[str, Any]:
    side, half = config.vision.image_size, [0.5] * 3
    found = {"resample": 3, "image_mean": half, "image_std": half}
    if config.vision.any_size:
        most = (side // config.vision.patch) ** 2
        return {**found, "image_processor_type": "Siglip2ImageProcessor"} | {
            "patch_size": config.vision.patch,
            "max_num_patches": most,
            "resample": 2,
        }
    return {**found, "image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}


def _florence_image(_: florence.Config) -> dict[str, Any]:
    return {
        "size": {"height": 768, "width": 768},
        "do_center_crop": False,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def as_it_is(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """For layouts in which every name has one spelling."""
    return tensors


def _worded(checkpoints: Any, marker: str) -> Layout:
    """A language model beside an image tower, in the hub's older or newer spelling."""
    return Layout(
        checkpoints.transformers_keys,
        checkpoints.IGNORED,
        one_spelling,
        (marker,),
        checkpoints.config_from_transformers,
    )


FAMILIES: dict[str, Family] = {
    "clip": Family(
        name="clip",
        network=clip.Clip,
        config=clip.Config,
        layouts={
            "transformers": Layout(
                clip_checkpoints.TRANSFORMERS_KEYS,
                clip_checkpoints.IGNORED,
                as_it_is,
                ("text_model.embeddings.token_embedding.weight", "visual_projection.weight"),
                lambda data, _: clip_checkpoints.config_from_transformers(data),
            ),
            "open_clip": Layout(
                clip_checkpoints.OPEN_CLIP_KEYS,
                clip_checkpoints.IGNORED,
                clip_checkpoints.unnest,
                ("visual.conv1.weight", "visual.class_embedding"),
                clip_checkpoints.config_from_open_clip,
            ),
        },
        tokenizer="clip",
        image_processor="CLIPImageProcessor",
        to_transformers=clip_checkpoints.exports,
        default_image=_clip_image,
    ),
    "clip_resnet": Family(
        name="clip_resnet",
        network=clip_resnet.ClipResnet,
        config=clip_resnet.Config,
        layouts={
            "open_clip": Layout(
                clip_checkpoints.RESNET_KEYS,
                clip_checkpoints.IGNORED,
                clip_checkpoints.unnest,
                ("visual.attnpool.c_proj.weight",),
                clip_checkpoints.config_from_open_clip,
            ),
        },
        tokenizer="clip",
        image_processor="CLIPImageProcessor",
        to_transformers=clip_checkpoints.resnet_exports,
        default_image=_clip_image,
    ),
    # Before BLIP, which has an image tower of the same names.
    "blip2": Family(
        name="blip2",
        network=blip2.Blip2,
        config=blip2.Config,
        layouts={
            "transformers": Layout(
                blip2_checkpoints.keys,
                blip2_checkpoints.IGNORED,
                as_it_is,
                ("query_tokens", "qformer.layernorm.weight"),
                blip2_checkpoints.config_from_transformers,
            ),
        },
        tokenizer=lambda config: "bert" if config.language is None else "language",
        image_processor="BlipImageProcessor",
        to_transformers=blip2_checkpoints.exports,
        default_image=_blip_image,
        processor=blip2_checkpoints.processor,
    ),
    "blip": Family(
        name="blip",
        network=blip.Blip,
        config=blip.Config,
        layouts={
            "transformers": Layout(
                blip_checkpoints.TRANSFORMERS_KEYS,
                blip_checkpoints.IGNORED,
                blip_checkpoints.both_biases,
                ("vision_model.embeddings.class_embedding", "vision_model.embeddings.patch_embedding.bias"),
                blip_checkpoints.config_from_transformers,
            ),
            "original": Layout(
                blip_checkpoints.ORIGINAL_KEYS,
                blip_checkpoints.IGNORED,
                blip_checkpoints.both_biases,
                ("visual_encoder.pos_embed", "visual_encoder.patch_embed.proj.weight"),
                lambda _, tensors: blip_checkpoints.config_from_tensors(tensors),
            ),
        },
        tokenizer="bert",
        image_processor="BlipImageProcessor",
        to_transformers=blip_checkpoints.exports,
        default_image=_blip_image,
    ),
    "siglip": Family(
        name="siglip",
        network=siglip.Siglip,
        config=siglip.Config,
        layouts={
            "transformers": Layout(
                siglip_checkpoints.TRANSFORMERS_KEYS,
                siglip_checkpoints.IGNORED,
                as_it_is,
                ("vision_model.head.probe", "text_model.head.weight"),
                lambda data, _: siglip_checkpoints.config_from_transformers(data),
            ),
            "open_clip": Layout(
                siglip_checkpoints.OPEN_CLIP_KEYS,
                siglip_checkpoints.IGNORED,
                as_it_is,
                ("visual.trunk.attn_pool.latent", "text.token_embedding.weight"),
                siglip_checkpoints.config_from_open_clip,
            ),
        },
        tokenizer="pieces",
        image_processor="SiglipImageProcessor",
        to_transformers=siglip_checkpoints.exports,
        default_image=_siglip_image,
    ),
    "florence": Family(
        name="florence",
        network=florence.Florence,
        config=florence.Config,
        layouts={
            "transformers": Layout(
                florence_checkpoints.transformers_keys,
                florence_checkpoints.IGNORED,
                as_it_is,
                (
                    "model.multi_modal_projector.image_proj_norm.weight",
                    "model.vision_tower.convs.0.conv.weight",
                ),
                florence_checkpoints.config_from_transformers,
            ),
            "original": Layout(
                florence_checkpoints.original_keys,
                florence_checkpoints.IGNORED,
                as_it_is,
                ("image_proj_norm.weight", "vision_tower.convs.0.proj.weight"),
                florence_checkpoints.config_from_original,
            ),
        },
        tokenizer="bart",
        image_processor="CLIPImageProcessor",
        to_transformers=florence_checkpoints.exports,
        default_image=_florence_image,
        generation=True,
        processor=florence_checkpoints.processor,
    ),
    "llava": Family(
        name="llava",
        network=llava.Llava,
        config=llava.Config,
        layouts={
            "transformers": _worded(llava_checkpoints, "multi_modal_projector.linear_1.weight"),
            "transformers 4.52": _worded(llava_checkpoints, "model.multi_modal_projector.linear_1.weight"),
        },
        tokenizer="llama",
        image_processor="CLIPImageProcessor",
        to_transformers=llava_checkpoints.exports,
        default_image=_clip_image,
        generation=True,
        processor=llava_checkpoints.processor,
    ),
    "paligemma": Family(
        name="paligemma",
        network=paligemma.PaliGemma,
        config=paligemma.Config,
        layouts={
            "transformers": _worded(paligemma_checkpoints, "multi_modal_projector.linear.weight"),
            "transformers 4.52": _worded(paligemma_checkpoints, "model.multi_modal_projector.linear.weight"),
        },
        tokenizer="gemma",
        image_processor="SiglipImageProcessor",
        to_transformers=paligemma_checkpoints.exports,
        default_image=_siglip_image,
        generation=True,
        processor=paligemma_checkpoints.processor,
    ),
}


def recognise(tensors: Mapping[str, Tensor], source: str) -> tuple[Family, str]:
    """The family and layout of a checkpoint, by the names of its tensors. Raises CheckpointError for unknown ones."""
    for family in FAMILIES.values():
        for name, layout in family.layouts.items():
            if all(marker in tensors for marker in layout.markers):
                return family, name
    raise CheckpointError(
        f"{source}: no known kind of checkpoint (known: {', '.join(_known())}). "
        f"Its first tensors are {', '.join(sorted(tensors)[:4])}"
    )


def build(
    family: Family,
    config: Any,
    tensors: Mapping[str, Tensor],
    layout: Layout | None,
    *,
    source: str,
    taking: Taking | None = None,
) -> nn.Module:
    """The network with its weights; layout None: our own. Raises CheckpointError that names what does not fit.

    taking: puts weights elsewhere than in the network, as few bits.
    """
    try:
        if _layers(config) > len(tensors):  # before any is made
            raise ValueError(f"{_layers(config)} layers of {len(tensors)} tensors")
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
    take = None if taking is None else taking(net)
    if layout is None:
        fill(net, tensors, None, source=source, take=take)
    else:
        fill(net, tensors, keys_of(layout, config), ignore=layout.ignored, source=source, take=take)
    return net.eval()


def _layers(config: Any) -> int:
    """How many layers a config asks for, of the part of it that asks for most."""
    most = 0
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            most = max(most, _layers(value))
        elif field.name in ("layers", "depths"):
            most = max(most, *(value if isinstance(value, tuple) else (value,)))
    return most


def keys_of(layout: Layout, config: Any) -> KeyMap:
    """The key map of a checkpoint of this layout and config."""
    return layout.keys(config) if callable(layout.keys) else layout.keys


def config_from_dict(kind: type[Any], data: Mapping[str, Any]) -> Any:
    """A (nested) frozen dataclass from what `dataclasses.asdict` and JSON made of it. Raises TypeError or KeyError."""
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for name, value in data.items():
        parts = [
            part for part in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(part)
        ]
        if parts and value is not None:
            value = config_from_dict(typing.cast(type[Any], parts[0]), value)
        values[name] = as_tuples(value)
    return kind(**values)


def as_tuples(value: Any) -> Any:
    """Lists, of lists too, as tuples: JSON knows none."""
    return tuple(map(as_tuples, cast("list[Any]", value))) if isinstance(value, list) else value


def _known() -> list[str]:
    return [f"{family.name} as {name} writes it" for family in FAMILIES.values() for name in family.layouts]
