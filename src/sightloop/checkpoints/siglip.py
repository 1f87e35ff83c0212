"""SigLIP's checkpoints: the layouts of the hub (`transformers`) and of open_clip, as data."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
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
from sightloop.checkpoints.key_map import KeyMap, count_layers, row_slice, squeezed
from sightloop.checkpoints.layout import Family, Layout, keep_names
from sightloop.errors import CheckpointError
from sightloop.models.siglip import Siglip, SiglipConfig
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig
from sightloop.types import JsonDict, JsonMapping

_TOWER_DEFAULTS = {
    "dim": 768,
    "layers": 12,
    "heads": 12,
    "mlp_dim": 3072,
    "activation": "gelu_pytorch_tanh",
    "eps": 1e-6,
}
_VISION_DEFAULTS = {"image_size": 224, "patch": 16, **_TOWER_DEFAULTS}
_TEXT_DEFAULTS = {"vocab": 32000, "positions": 64, **_TOWER_DEFAULTS}


def vision_from_transformers(data: JsonMapping, *, naflex: bool = False) -> VitConfig:
    """From the `vision_config` of a hub checkpoint, of PaliGemma's too (`vision_use_head` false: no pooling)."""
    sizes = from_hf_config(data, VISION, _VISION_DEFAULTS)
    if naflex:
        sizes["image_size"] = isqrt(data.get("num_patches", 256)) * sizes["patch"]
    return _vision(naflex, pool=data.get("vision_use_head", True), **sizes)


def _vision(any_size: bool = False, pool: bool = True, **sizes: Any) -> VitConfig:
    return VitConfig(
        **sizes,
        norm_first=False,
        norm_tokens=True,
        patch_bias=True,
        pooling="attention" if pool else "none",
        any_size=any_size,
    )


def config_from_transformers(data: JsonMapping) -> SiglipConfig:
    """From the config.json of a hub checkpoint (`model_type`: siglip, or siglip2 for NaFlex)."""
    text: JsonDict = data.get("text_config") or {}
    tower = TextConfig(**from_hf_config(text, TEXT, _TEXT_DEFAULTS), post_norm=False)
    return SiglipConfig(
        vision=vision_from_transformers(
            data.get("vision_config") or {}, naflex=data.get("model_type") == "siglip2"
        ),
        text=tower,
        embed_dim=text.get("projection_size") or tower.dim,
    )


def to_transformers(config: SiglipConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """One model, `SiglipModel` or, for images of any size, `Siglip2Model`, with all tensors."""
    kind, vision = "siglip", to_hf_config(config.vision, VISION)
    if config.vision.any_size:
        kind = "siglip2"
        vision["num_patches"] = (vision.pop("image_size") // config.vision.patch) ** 2
    return {
        "": (
            {
                "architectures": [f"{kind.capitalize()}Model"],
                "model_type": kind,
                "vision_config": {"model_type": f"{kind}_vision_model", **vision},
                "text_config": {
                    "model_type": f"{kind}_text_model",
                    **to_hf_config(config.text, TEXT),
                    "projection_size": config.embed_dim,
                },
            },
            ("",),
        )
    }


# timm's image towers: name without size -> heads. Those listed below have GELU's tanh approximation, others the
# exact one; the published weights of SigLIP were trained with tanh throughout, which differs in the fourth digit.
_TIMM_HEADS = {"vit_base": 12, "vit_large": 16, "vit_so400m": 16, "vit_giantopt": 16}
_TIMM_TANH = {
    "vit_base_patch32_siglip_256",
    "vit_large_patch16_siglip_512",
    "vit_so400m_patch16_siglip_256",
    "vit_so400m_patch16_siglip_384",
    "vit_so400m_patch16_siglip_512",
    "vit_giantopt_patch16_siglip_256",
    "vit_giantopt_patch16_siglip_384",
}


def config_from_open_clip(data: JsonMapping, tensors: Mapping[str, Tensor]) -> SiglipConfig:
    """From the `model_cfg` of an open_clip_config.json and the shapes of timm's image tower, which it only names."""
    if not data:
        raise CheckpointError("open_clip_config.json is missing; put the checkpoint's own beside its weights")
    vision, text = data["vision_cfg"], data["text_cfg"]
    name = str(vision.get("timm_model_name"))
    heads = _TIMM_HEADS.get(name.partition("_patch")[0])
    unknown = [f"{k}={v!r}" for k, v in _unusual_settings(vision, text).items() if v is not None]
    if heads is None or unknown:
        what = ", ".join(unknown) or f"image tower {name}"
        raise CheckpointError(f"this open_clip model is no SigLIP that is known here ({what})")
    dim, _, patch, _ = tensors["visual.trunk.patch_embed.proj.weight"].shape
    width = text.get("width", 512)
    return SiglipConfig(
        vision=_vision(
            image_size=vision["image_size"],
            patch=patch,
            dim=dim,
            layers=count_layers(tensors, r"^visual\.trunk\.blocks\.(\d+)\."),
            heads=heads,
            mlp_dim=tensors["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0],
            activation="gelu_pytorch_tanh" if name in _TIMM_TANH else "gelu",
            eps=1e-6,
        ),
        text=TextConfig(
            vocab=text.get("vocab_size", 49408),
            positions=text.get("context_length", 77),
            dim=width,
            layers=text.get("layers", 12),
            heads=text.get("heads", 8),
            mlp_dim=int(width * text.get("mlp_ratio", 4.0)),
            activation="gelu_pytorch_tanh"
            if (text.get("act_kwargs") or {}).get("approximate") == "tanh"
            else "gelu",
            eps=(text.get("norm_kwargs") or {}).get("eps", 1e-5),
            post_norm=False,
        ),
        embed_dim=data["embed_dim"],
    )


def _unusual_settings(vision: JsonMapping, text: JsonMapping) -> JsonDict:
    """Settings that say something else than SigLIP does; None for those that agree."""
    expected = {
        "timm_pool": (vision, "map"),
        "timm_proj": (vision, "none"),
        "no_causal_mask": (text, True),
        "proj_bias": (text, True),
        "pool_type": (text, "last"),
    }
    return {
        k: None if part.get(k) == value else part.get(k, "absent") for k, (part, value) in expected.items()
    }


def vision_keys(foreign: str = "vision_model", *, ours: str = "vision") -> JsonDict:
    """The image tower without its pooling head; `foreign` is where it is in the checkpoint."""
    return {
        f"{ours}.embed.position": f"{foreign}.embeddings.position_embedding.weight",
        f"{ours}.embed.proj": f"{foreign}.embeddings.patch_embedding",
        f"{ours}.norm_out": f"{foreign}.post_layernorm",
        **transformers_block_keys(ours, foreign),
    }


_HEAD = "vision_model.head"
TRANSFORMERS_KEYS: KeyMap = {
    "logit_scale": squeezed("logit_scale", 1),
    "logit_bias": squeezed("logit_bias", 1),
    **vision_keys(),
    "vision.pool.probe": squeezed(f"{_HEAD}.probe", 2),
    "vision.pool.attn.q.weight": row_slice(f"{_HEAD}.attention.in_proj_weight", 0, 1, 3),
    "vision.pool.attn.q.bias": row_slice(f"{_HEAD}.attention.in_proj_bias", 0, 1, 3),
    "vision.pool.attn.kv.weight": row_slice(f"{_HEAD}.attention.in_proj_weight", 1, 3, 3),
    "vision.pool.attn.kv.bias": row_slice(f"{_HEAD}.attention.in_proj_bias", 1, 3, 3),
    "vision.pool.attn.out": f"{_HEAD}.attention.out_proj",
    "vision.pool.norm": f"{_HEAD}.layernorm",
    "vision.pool.mlp.fc1": f"{_HEAD}.mlp.fc1",
    "vision.pool.mlp.fc2": f"{_HEAD}.mlp.fc2",
    "text.word": "text_model.embeddings.token_embedding",
    "text.position": "text_model.embeddings.position_embedding",
    "text.norm": "text_model.final_layer_norm",
    "text_projection": "text_model.head",
    **transformers_block_keys("text", "text_model"),
}

_TRUNK = "visual.trunk"
OPEN_CLIP_KEYS: KeyMap = {
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "vision.embed.position": squeezed(f"{_TRUNK}.pos_embed", 1),
    "vision.embed.proj": f"{_TRUNK}.patch_embed.proj",
    "vision.norm_out": f"{_TRUNK}.norm",
    "vision.blocks.{}.attn.qkv": f"{_TRUNK}.blocks.{{}}.attn.qkv",
    "vision.blocks.{}.attn.out": f"{_TRUNK}.blocks.{{}}.attn.proj",
    "vision.blocks.{}.norm1": f"{_TRUNK}.blocks.{{}}.norm1",
    "vision.blocks.{}.norm2": f"{_TRUNK}.blocks.{{}}.norm2",
    "vision.blocks.{}.mlp.fc1": f"{_TRUNK}.blocks.{{}}.mlp.fc1",
    "vision.blocks.{}.mlp.fc2": f"{_TRUNK}.blocks.{{}}.mlp.fc2",
    "vision.pool.probe": squeezed(f"{_TRUNK}.attn_pool.latent", 2),
    "vision.pool.attn.q": f"{_TRUNK}.attn_pool.q",
    "vision.pool.attn.kv": f"{_TRUNK}.attn_pool.kv",
    "vision.pool.attn.out": f"{_TRUNK}.attn_pool.proj",
    "vision.pool.norm": f"{_TRUNK}.attn_pool.norm",
    "vision.pool.mlp.fc1": f"{_TRUNK}.attn_pool.mlp.fc1",
    "vision.pool.mlp.fc2": f"{_TRUNK}.attn_pool.mlp.fc2",
    "text.word": "text.token_embedding",
    "text.position.weight": "text.positional_embedding",
    "text.norm": "text.ln_final",
    "text_projection": "text.text_projection",
    **open_clip_block_keys("text", "text."),
}

IGNORED = (r"\.position_ids$", r"^text\.attn_mask$")


def default_image(config: Any) -> JsonDict:
    """The processor settings that the models were trained with: a square, or NaFlex's patches."""
    side, half = config.vision.image_size, [0.5] * 3
    common = {"resample": 3, "image_mean": half, "image_std": half}
    if config.vision.any_size:
        most = (side // config.vision.patch) ** 2
        return {**common, "image_processor_type": "Siglip2ImageProcessor"} | {
            "patch_size": config.vision.patch,
            "max_num_patches": most,
            "resample": 2,
        }
    return {**common, "image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}


FAMILY = Family(
    name="siglip",
    network=Siglip,
    config=SiglipConfig,
    model_types=("siglip", "siglip2"),
    layouts={
        "transformers": Layout(
            keys=TRANSFORMERS_KEYS,
            ignored=IGNORED,
            prepare=keep_names,
            markers=("vision_model.head.probe", "text_model.head.weight"),
            configure=lambda data, _: config_from_transformers(data),
        ),
        "open_clip": Layout(
            keys=OPEN_CLIP_KEYS,
            ignored=IGNORED,
            prepare=keep_names,
            markers=("visual.trunk.attn_pool.latent", "text.token_embedding.weight"),
            configure=config_from_open_clip,
        ),
    },
    tokenizer="pieces",
    image_processor="SiglipImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
)
