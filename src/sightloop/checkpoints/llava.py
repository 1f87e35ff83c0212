"""LLaVA's checkpoints in the hub's layouts (`llava-hf/*`), as data: LlavaForConditionalGeneration (1.5) and
LlavaNextForConditionalGeneration (1.6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sightloop.checkpoints.chat_templates import jinja_template, template_name
from sightloop.checkpoints.clip import default_image
from sightloop.checkpoints.hf_config import (
    VISION,
    canonical_names,
    from_hf_config,
    image_token_id,
    to_hf_config,
    transformers_block_keys,
)
from sightloop.checkpoints.key_map import KeyMap
from sightloop.checkpoints.language import (
    first_eos_id,
    is_head_tied,
    language_config,
    language_keys,
    language_to_transformers,
)
from sightloop.checkpoints.layout import Family, Layout
from sightloop.errors import CheckpointError
from sightloop.models.llava import Llava, LlavaConfig
from sightloop.towers.vit import VitConfig
from sightloop.types import IMAGE_PLACEHOLDER, JsonDict, JsonMapping

# Where config.json is silent about the image tower it is CLIP's L/14 for 336 pixels, about its sizes CLIP's usual one.
_L14 = {"image_size": 336, "patch": 14, "dim": 1024, "layers": 24, "heads": 16, "mlp_dim": 4096}
_B32 = {"image_size": 224, "patch": 32, "dim": 768, "layers": 12, "heads": 12, "mlp_dim": 3072}
_CLIP_ACTIVATION = {"activation": "quick_gelu", "eps": 1e-5}
_GRIDS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

# Buffers that old checkpoints store beside the weights.
IGNORED = (r"\.position_ids$", r"\.rotary_emb\.inv_freq$")


def config_from_transformers(data: JsonMapping, tensors: Mapping[str, Tensor] | None = None) -> LlavaConfig:
    """From a config.json, and the text of the checkpoint's chat template as `chat_template` where it has one.

    Raises CheckpointError for towers other than CLIP's and those of Llama and Mistral.
    """
    vision: JsonMapping = data.get("vision_config") or {}
    words: JsonMapping = {"model_type": "llama", **(data.get("text_config") or {})}
    if vision.get("model_type", "clip_vision_model") != "clip_vision_model":
        raise CheckpointError(f"config.json: a LLaVA over {vision['model_type']!r} is not supported")
    if words["model_type"] not in ("llama", "mistral"):
        raise CheckpointError(
            f"config.json: a LLaVA that writes with {words['model_type']!r} is not supported"
        )
    tower = VitConfig(
        **from_hf_config(vision, VISION, {**(_B32 if vision else _L14), **_CLIP_ACTIVATION}),
        norm_first=True,
        norm_tokens=False,
        patch_bias=False,
    )
    layers: int | list[int] = data.get("vision_feature_layer", -2)
    tied = any(part.get("tie_word_embeddings", False) for part in (data, words))
    tiled = data.get("model_type") == "llava_next"
    if tiled and data.get("vision_feature_select_strategy") == "full":
        raise CheckpointError(
            "config.json: tiles with vision_feature_select_strategy='full' are not supported"
        )
    grids = (data.get("image_grid_pinpoints") or _GRIDS) if tiled else []
    return LlavaConfig(
        vision=tower,
        language=language_config(words, tied=is_head_tied(tied, tensors)),
        depths=tuple(
            _depth_of_layer(layer, tower.layers)
            for layer in (layers if isinstance(layers, list) else [layers])
        ),
        class_token=data.get("vision_feature_select_strategy", "default") == "full",
        activation=data.get("projector_hidden_act", "gelu"),
        projector_bias=data.get("multimodal_projector_bias", True),
        image_id=image_token_id(data, 32_000),
        end_id=first_eos_id(words.get("eos_token_id", 2)),
        tiles=tuple((int(height), int(width)) for height, width in grids),
        chat_template=_chat_template(data.get("chat_template"), words["model_type"], tiled),
    )


def _depth_of_layer(layer: int, layers: int) -> int:
    depth = layer if layer >= 0 else layers + 1 + layer
    if not 0 <= depth <= layers:
        raise CheckpointError(f"config.json: vision_feature_layer {layer} of a tower of {layers} layers")
    return depth


def _chat_template(template: str | None, language: str, tiled: bool) -> str:
    """The form of its prompts; without a template, that in which the published models were trained."""
    if template is not None:
        return template_name(template)
    return "mistral" if language == "mistral" else "vicuna_curious" if tiled else "vicuna"


def transformers_keys(config: LlavaConfig) -> KeyMap:
    """The key map of a checkpoint after `settings.one_spelling`."""
    embed = "vision_tower.embeddings"
    return {
        "newline": "image_newline",
        "projector.fc1": "multi_modal_projector.linear_1",
        "projector.fc2": "multi_modal_projector.linear_2",
        "vision.embed.class_token": f"{embed}.class_embedding",
        "vision.embed.position": f"{embed}.position_embedding.weight",
        "vision.embed.proj": f"{embed}.patch_embedding",
        "vision.norm_in": "vision_tower.pre_layrnorm",
        "vision.norm_out": "vision_tower.post_layernorm",
        **transformers_block_keys("vision", "vision_tower"),
        **language_keys(config.language, "language", "language_model.model", "language_model.lm_head"),
    }


def to_transformers(config: LlavaConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """One model with all tensors."""
    kind = "LlavaNext" if config.tiles else "Llava"
    patches = (config.vision.image_size // config.vision.patch) ** 2
    layers = [depth - config.vision.layers - 1 for depth in config.depths]
    data: JsonDict = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": "llava_next" if config.tiles else "llava",
        "vision_config": {"model_type": "clip_vision_model", **to_hf_config(config.vision, VISION)},
        "text_config": {**language_to_transformers(config.language), "eos_token_id": config.end_id},
        # Counted from the end, as in the reference, whose first entry is the input of the blocks.
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": "full" if config.class_token else "default",
        "projector_hidden_act": config.activation,
        "multimodal_projector_bias": config.projector_bias,
        "image_token_index": config.image_id,
        "image_seq_length": patches + config.class_token,
        "tie_word_embeddings": config.language.tied,
    }
    if config.tiles:
        data["image_grid_pinpoints"] = [list(grid) for grid in config.tiles]
    return {"": (data, ("",))}


def processor(config: LlavaConfig, _: tuple[int, int], __: Sequence[str]) -> tuple[JsonDict, JsonDict]:
    """What processor_config.json says beside the images."""
    known = {"chat_template": jinja_template(config.chat_template)} if config.chat_template else {}
    about = {
        "processor_class": "LlavaNextProcessor" if config.tiles else "LlavaProcessor",
        "image_token": IMAGE_PLACEHOLDER,
        "num_additional_image_tokens": 1,
        "patch_size": config.vision.patch,
        "vision_feature_select_strategy": "full" if config.class_token else "default",
    }
    return {**about, **known}, {}


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
    name="llava",
    network=Llava,
    config=LlavaConfig,
    model_types=("llava", "llava_next"),
    layouts={
        "transformers": _layout("multi_modal_projector.linear_1.weight"),
        "transformers 4.52": _layout("model.multi_modal_projector.linear_1.weight"),
    },
    tokenizer="llama",
    image_processor="CLIPImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
    generation=True,
    processor=processor,
)
