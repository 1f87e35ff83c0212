"""PaliGemma's checkpoints in the hub's layouts (`google/paligemma-*`, `google/paligemma2-*`), as data:
PaliGemmaForConditionalGeneration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sightloop.checkpoints.hf_config import VISION, canonical_names, image_token_id, to_hf_config
from sightloop.checkpoints.key_map import KeyMap
from sightloop.checkpoints.language import (
    first_eos_id,
    is_head_tied,
    language_config,
    language_keys,
    language_to_transformers,
)
from sightloop.checkpoints.layout import Family, Layout
from sightloop.checkpoints.siglip import default_image, vision_from_transformers, vision_keys
from sightloop.errors import CheckpointError
from sightloop.models.paligemma import PaliGemma, PaliGemmaConfig
from sightloop.types import JsonDict, JsonMapping

# Buffers that old checkpoints store beside the weights, and a pooling head that nothing reads.
IGNORED = (r"\.position_ids$", r"\.rotary_emb\.inv_freq$", r"^vision_tower\.head\.")

# Where config.json is silent: SigLIP So400m for 224 pixels over Gemma 2B.
_SO400M: JsonDict = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_GEMMA: JsonDict = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 257_152,
}


def config_from_transformers(
    data: JsonMapping, tensors: Mapping[str, Tensor] | None = None
) -> PaliGemmaConfig:
    """From a config.json. Raises CheckpointError for towers other than SigLIP's and those of Gemma and Gemma 2."""
    vision: JsonMapping = data.get("vision_config") or _SO400M
    words: JsonMapping = data.get("text_config") or _GEMMA
    if vision.get("model_type", "siglip_vision_model") != "siglip_vision_model":
        raise CheckpointError(f"config.json: a PaliGemma over {vision['model_type']!r} is not supported")
    kind = words.get("model_type", "gemma")
    if kind not in ("gemma", "gemma2"):
        raise CheckpointError(f"config.json: a PaliGemma that writes with {kind!r} is not supported")
    tied = is_head_tied(data.get("tie_word_embeddings", True), tensors)
    return PaliGemmaConfig(
        # Its states are taken before any pooling head.
        vision=vision_from_transformers({**vision, "vision_use_head": False}),
        language=language_config({**words, "model_type": kind}, bidirectional_prefix=True, tied=tied),
        image_id=image_token_id(data, 256_000),
        end_id=first_eos_id(words.get("eos_token_id", data.get("eos_token_id", 1))),
    )


def transformers_keys(config: PaliGemmaConfig) -> KeyMap:
    """The key map of a checkpoint after `settings.one_spelling`."""
    return {
        "projector": "multi_modal_projector.linear",
        **vision_keys("vision_tower"),
        **language_keys(config.language, "language", "language_model.model", "language_model.lm_head"),
    }


def to_transformers(config: PaliGemmaConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """One model with all tensors."""
    data: JsonDict = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "vision_config": {
            "model_type": "siglip_vision_model",
            **to_hf_config(config.vision, VISION),
            "vision_use_head": False,
            "projection_dim": config.text.dim,
        },
        "text_config": {**language_to_transformers(config.language), "eos_token_id": config.end_id},
        "image_token_index": config.image_id,
        "projection_dim": config.text.dim,
        "hidden_size": config.text.dim,
        "eos_token_id": config.end_id,
        "tie_word_embeddings": config.language.tied,
    }
    return {"": (data, ("",))}


def processor(config: PaliGemmaConfig, size: tuple[int, int], _: Sequence[str]) -> tuple[JsonDict, JsonDict]:
    """Its processor_config.json, and what that adds to the image processor's settings."""
    patches = (size[0] // config.vision.patch) * (size[1] // config.vision.patch)
    return {"processor_class": "PaliGemmaProcessor"}, {"image_seq_length": patches}


def _layout(marker: str) -> Layout:
    """The hub's layout; `transformers` 4.52 put one more prefix before every name."""
    return Layout(
        keys=transformers_keys,
        ignored=IGNORED,
        prepare=canonical_names,
        markers=(marker,),
        configure=config_from_transformers,
    )


FAMILY = Family(
    name="paligemma",
    network=PaliGemma,
    config=PaliGemmaConfig,
    model_types=("paligemma",),
    layouts={
        "transformers": _layout("multi_modal_projector.linear.weight"),
        "transformers 4.52": _layout("model.multi_modal_projector.linear.weight"),
    },
    tokenizer="gemma",
    image_processor="SiglipImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
    generation=True,
    processor=processor,
)
