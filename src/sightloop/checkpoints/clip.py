"""CLIP's checkpoints: the layouts of the hub (`transformers`) and of open_clip and OpenAI, as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sightloop.checkpoints.hf_config import (
    TEXT,
    VISION,
    from_hf_config,
    open_clip_block_keys,
    to_hf_config,
    transformers_block_keys,
)
from sightloop.checkpoints.key_map import KeyMap, RenamedTensors, count_layers, transposed
from sightloop.checkpoints.layout import Family, Layout, keep_names
from sightloop.errors import CheckpointError
from sightloop.models.clip import Clip, ClipConfig
from sightloop.towers.resnet import ResnetConfig
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig
from sightloop.types import JsonDict, JsonMapping

_TOWER_DEFAULTS = {"layers": 12, "activation": "quick_gelu", "eps": 1e-5}
_VISION_DEFAULTS = {
    "image_size": 224,
    "patch": 32,
    "dim": 768,
    "heads": 12,
    "mlp_dim": 3072,
    **_TOWER_DEFAULTS,
}
_TEXT_DEFAULTS = {"vocab": 49408, "positions": 77, "dim": 512, "heads": 8, "mlp_dim": 2048, **_TOWER_DEFAULTS}


def config_from_transformers(data: JsonMapping) -> ClipConfig:
    """From the config.json of a hub checkpoint (`model_type: clip`)."""
    # The first files say all of it in a dict of another name, which then decides alone.
    vision, text = (
        dict(data.get(f"{part}_config_dict") or data.get(f"{part}_config") or {})
        for part in ("vision", "text")
    )
    end_id = text.get("eos_token_id", 49407)
    embed_dim = data.get("projection_dim", 512)
    return ClipConfig(
        vision=VitConfig(
            **from_hf_config(vision, VISION, _VISION_DEFAULTS),
            norm_first=True,
            norm_tokens=False,
            patch_bias=False,
        ),
        text=TextConfig(**from_hf_config(text, TEXT, _TEXT_DEFAULTS), post_norm=False),
        embed_dim=embed_dim,
        end_id=end_id,
        # Configs from before eos_token_id was right say 2; the reference then takes the largest id.
        end_is_largest_id=end_id == 2,
    )


def to_transformers(config: ClipConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """One model, `CLIPModel`, with all tensors."""
    return {"": (_config_to_transformers(config), ("",))}


def _config_to_transformers(config: ClipConfig) -> JsonDict:
    assert isinstance(config.vision, VitConfig)
    width = {"projection_dim": config.embed_dim}
    end_id = 2 if config.end_is_largest_id else config.end_id
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        **width,
        "vision_config": {"model_type": "clip_vision_model", **to_hf_config(config.vision, VISION), **width},
        "text_config": {
            "model_type": "clip_text_model",
            **to_hf_config(config.text, TEXT),
            **width,
            "eos_token_id": end_id,
        },
    }


# What open_clip says of a plain CLIP: sizes, what is only for training, and choices that have a usual answer.
_SIZE_FIELDS = frozenset(
    "image_size patch_size context_length vocab_size width heads head_width layers mlp_ratio patch_dropout "
    "output_tokens pad_id eos_id attn_pooler_queries attn_pooler_heads".split()
)
_DEFAULT_CHOICES = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "block_type": ("default",),
    "bos_id": (49406,),
}


def config_from_open_clip(data: JsonMapping, tensors: Mapping[str, Tensor]) -> ClipConfig:
    """From the `model_cfg` of an open_clip_config.json: ViTs and ResNets with CLIP's own text tower.

    Without one, from the tensors' shapes alone (heads of 64 wide; OpenAI's QuickGELU is assumed).
    """
    data = data or _config_from_shapes(tensors)
    vision, text = data["vision_cfg"], data["text_cfg"]
    unknown = [
        f"{key}={value!r}"
        for part in (vision, text)
        for key, value in part.items()
        if key not in _SIZE_FIELDS and value not in (None, False, {}, *_DEFAULT_CHOICES.get(key, ()))
    ]
    if unknown:
        raise CheckpointError(
            f"this open_clip model is not a plain CLIP ({', '.join(unknown)}); no such model is known here"
        )
    activation = "quick_gelu" if data.get("quick_gelu") else "gelu"
    width, layers, head = text.get("width", 512), vision.get("layers", 12), vision.get("head_width", 64)
    words = TextConfig(
        vocab=text.get("vocab_size", 49408),
        positions=text.get("context_length", 77),
        dim=width,
        layers=text.get("layers", 12),
        heads=text.get("heads", 8),
        mlp_dim=int(width * text.get("mlp_ratio", 4.0)),
        activation=activation,
        eps=1e-5,
        post_norm=False,
    )
    if not isinstance(layers, int):
        first = vision.get("width", 64)
        tower = ResnetConfig(
            vision["image_size"], tuple(layers), first, 32 * first // head, data["embed_dim"]
        )
        return ClipConfig(
            tower, words, data["embed_dim"], 49407, end_is_largest_id=True, image_projection=False
        )
    dim = vision.get("width", 768)
    return ClipConfig(
        vision=VitConfig(
            image_size=vision["image_size"],
            patch=vision["patch_size"],
            dim=dim,
            layers=layers,
            heads=dim // head,
            mlp_dim=int(dim * vision.get("mlp_ratio", 4.0)),
            activation=activation,
            eps=1e-5,
            norm_first=True,
            norm_tokens=False,
            patch_bias=False,
        ),
        text=words,
        embed_dim=data["embed_dim"],
        end_id=49407,
        end_is_largest_id=True,
    )


def _config_from_shapes(tensors: Mapping[str, Tensor]) -> JsonDict:
    vocab, dim = tensors["token_embedding.weight"].shape
    resnet = "visual.attnpool.c_proj.weight" in tensors
    return {
        "embed_dim": tensors["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": _resnet_config_from_shapes(tensors) if resnet else _vit_config_from_shapes(tensors),
        "text_cfg": {
            "context_length": tensors["positional_embedding"].shape[0],
            "vocab_size": vocab,
            "width": dim,
            "heads": dim // 64,
            "layers": count_layers(tensors, r"^transformer\.resblocks\.(\d+)\."),
            "mlp_ratio": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / dim,
        },
    }


def _vit_config_from_shapes(tensors: Mapping[str, Tensor]) -> JsonDict:
    width, _, patch, _ = tensors["visual.conv1.weight"].shape
    grid = round((tensors["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": grid * patch,
        "patch_size": patch,
        "width": width,
        "layers": count_layers(tensors, r"^visual\.transformer\.resblocks\.(\d+)\."),
        "mlp_ratio": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width,
    }


def _resnet_config_from_shapes(tensors: Mapping[str, Tensor]) -> JsonDict:
    grid = round((tensors["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "image_size": 32 * grid,
        "width": tensors["visual.layer1.0.conv1.weight"].shape[0],
        "layers": [count_layers(tensors, rf"^visual\.layer{stage}\.(\d+)\.") for stage in range(1, 5)],
    }


def strip_text_prefix(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Bring `text.transformer...`, as open_clip's models with a separate text module have it, to `transformer...`."""
    if "text.token_embedding.weight" not in tensors:
        return tensors
    return RenamedTensors(tensors, {name.removeprefix("text."): name for name in tensors})


TRANSFORMERS_KEYS: KeyMap = {
    "logit_scale": "logit_scale",
    "image_projection": "visual_projection",
    "text_projection": "text_projection",
    "vision.embed.class_token": "vision_model.embeddings.class_embedding",
    "vision.embed.position": "vision_model.embeddings.position_embedding.weight",
    "vision.embed.proj": "vision_model.embeddings.patch_embedding",
    "vision.norm_in": "vision_model.pre_layrnorm",
    "vision.norm_out": "vision_model.post_layernorm",
    "text.word": "text_model.embeddings.token_embedding",
    "text.position": "text_model.embeddings.position_embedding",
    "text.norm": "text_model.final_layer_norm",
    **transformers_block_keys("vision", "vision_model"),
    **transformers_block_keys("text", "text_model"),
}


OPEN_CLIP_TEXT_KEYS: KeyMap = {
    "logit_scale": "logit_scale",
    "text_projection.weight": transposed("text_projection"),
    "text.word": "token_embedding",
    "text.position.weight": "positional_embedding",
    "text.norm": "ln_final",
    **open_clip_block_keys("text", ""),
}
OPEN_CLIP_KEYS: KeyMap = {
    **OPEN_CLIP_TEXT_KEYS,
    "image_projection.weight": transposed("visual.proj"),
    "vision.embed.class_token": "visual.class_embedding",
    "vision.embed.position": "visual.positional_embedding",
    "vision.embed.proj": "visual.conv1",
    "vision.norm_in": "visual.ln_pre",
    "vision.norm_out": "visual.ln_post",
    **open_clip_block_keys("vision", "visual."),
}

# Buffers and sizes that old checkpoints store beside the weights.
IGNORED = (r"\.position_ids$", r"^(attn_mask|input_resolution|context_length|vocab_size)$")


CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]


def default_image(config: Any) -> JsonDict:
    """The processor settings that the models were trained with: shortest edge, centre crop, CLIP's mean and std."""
    side = config.vision.image_size
    return {
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


FAMILY = Family(
    name="clip",
    network=Clip,
    config=ClipConfig,
    model_types=("clip",),
    towers={"vision": VitConfig},
    layouts={
        "transformers": Layout(
            keys=TRANSFORMERS_KEYS,
            ignored=IGNORED,
            prepare=keep_names,
            markers=("text_model.embeddings.token_embedding.weight", "visual_projection.weight"),
            configure=lambda data, _: config_from_transformers(data),
        ),
        "open_clip": Layout(
            keys=OPEN_CLIP_KEYS,
            ignored=IGNORED,
            prepare=strip_text_prefix,
            markers=("visual.conv1.weight", "visual.class_embedding"),
            configure=config_from_open_clip,
        ),
    },
    tokenizer="clip",
    image_processor="CLIPImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
)
