"""Florence-2's checkpoints: the layouts of `transformers` and of the original repositories (microsoft/Florence-2-*)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sightloop.checkpoints.key_map import KeyMap, Rule, tensors_equal, transposed
from sightloop.checkpoints.language import first_eos_id
from sightloop.checkpoints.layout import Family, Layout, keep_names
from sightloop.checkpoints.seq2seq import bart_configs, bart_keys, bart_to_transformers
from sightloop.errors import CheckpointError, UnsupportedError
from sightloop.models.florence import Florence, FlorenceConfig
from sightloop.towers.davit import DavitConfig
from sightloop.types import JsonDict, JsonMapping

# Our field -> their name, and the reference's default.
_VISION: dict[str, tuple[str, Any]] = {
    "kernels": ("patch_size", (7, 3, 3, 3)),
    "strides": ("patch_stride", (4, 2, 2, 2)),
    "paddings": ("patch_padding", (3, 1, 1, 1)),
    "norm_first": ("patch_prenorm", (False, True, True, True)),
    "dims": ("embed_dim", (128, 256, 512, 1024)),
    "depths": ("depths", (1, 1, 9, 1)),
    "heads": ("num_heads", (4, 8, 16, 32)),
    "groups": ("num_groups", (4, 8, 16, 32)),
    "window": ("window_size", 12),
    "mlp_ratio": ("mlp_ratio", 4.0),
    "activation": ("activation_function", "gelu"),
    "qkv_bias": ("qkv_bias", True),
}


def config_from_transformers(data: JsonMapping, tensors: Mapping[str, Tensor]) -> FlorenceConfig:
    """From the config.json of a hub checkpoint (`florence2`), and its processor's list as `ignored_phrases`."""
    vision: JsonDict = data.get("vision_config") or {}
    shared, head = "model.language_model.shared.weight", "lm_head.weight"
    sizes = vision.get("max_position_embeddings", 50), vision.get("max_temporal_embeddings", 100)
    tied = head not in tensors or tensors_equal(tensors, [(shared, head)])
    image_id = data.get("image_token_id", 51_289)
    config = _config(data, vision, sizes, tied=tied, head_bias=False, image_id=image_id)
    return replace(config, untied_decoder=_untied_decoder(tensors, _BODY))


def config_from_original(data: JsonMapping, tensors: Mapping[str, Tensor]) -> FlorenceConfig:
    """From the config.json of microsoft/Florence-2-*. Raises CheckpointError for what transformers' form lacks."""
    vision: JsonDict = dict(data["vision_config"])
    if vision.get("image_feature_source", _SOURCES) != _SOURCES:
        raise CheckpointError(f"config.json: image_feature_source must be {_SOURCES}")
    vision["embed_dim"] = vision["dim_embed"]
    head, shared = "language_model.lm_head.weight", "language_model.model.shared.weight"
    config = _config(
        data,
        vision,
        (tensors[_ROWS].shape[0], tensors[_TIMES].shape[0]),
        tied=head not in tensors or tensors_equal(tensors, [(shared, head)]),
        head_bias=_BIAS in tensors and bool(tensors[_BIAS].any()),
        image_id=tensors[shared].shape[0],  # the first that has no word
    )
    return replace(config, untied_decoder=_untied_decoder(tensors, "language_model.model"))


def _untied_decoder(tensors: Mapping[str, Tensor], body: str) -> bool:
    """Whether the decoder has its own token embedding. The encoder reads the shared one in both forms."""
    own = f"{body}.decoder.embed_tokens.weight"
    return own in tensors and not tensors_equal(tensors, [(f"{body}.shared.weight", own)])


def _config(
    data: JsonMapping,
    vision: JsonMapping,
    sizes: tuple[int, int],
    *,
    tied: bool,
    head_bias: bool,
    image_id: int,
) -> FlorenceConfig:
    text: JsonDict = data.get("text_config") or {}
    if (kind := text.get("model_type", "bart")) not in ("bart", "florence2_language"):
        raise CheckpointError(f"config.json: a Florence-2 that writes with {kind!r} is not supported")
    encoder, language = bart_configs(text)
    fields = {ours: vision.get(foreign, usual) for ours, (foreign, usual) in _VISION.items()}
    shape: JsonDict = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    return FlorenceConfig(
        DavitConfig(**shape),
        encoder,
        replace(language, tied=tied, head_bias=head_bias),
        *sizes,
        image_id=image_id,
        start_ids=(text.get("decoder_start_token_id", 2),),
        end_id=first_eos_id(text.get("eos_token_id", 2)),
        bos_id=text.get("bos_token_id", 0),
        ignored_phrases=data.get("ignored_phrases"),
    )


def to_transformers(config: FlorenceConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """The one model of `transformers` that this is. Raises UnsupportedError for a bias that it does not have."""
    if config.language.head_bias:
        raise UnsupportedError(
            "transformers has no Florence-2 with a bias on its words; save it in our own layout instead"
        )
    vision = {foreign: getattr(config.vision, ours) for ours, (foreign, _) in _VISION.items()}
    vision |= {"max_position_embeddings": config.grid, "max_temporal_embeddings": config.frames}
    about: JsonDict = {
        "architectures": ["Florence2ForConditionalGeneration"],
        "model_type": "florence2",
        "image_token_id": config.image_id,
        "tie_word_embeddings": config.language.tied,
        "vision_config": {
            "model_type": "florence_vision",
            "projection_dim": config.text.dim,
            **vision,
        },
        "text_config": {
            **bart_to_transformers(config.text, config.language),
            "tie_word_embeddings": not config.untied_decoder,
            "vocab_size": max(config.text.vocab, config.image_id + 1),
            "decoder_start_token_id": config.start_ids[0],
            "eos_token_id": config.end_id,
            "bos_token_id": config.bos_id,
        },
    }
    return {"": (about, ("",))}


def processor(
    config: FlorenceConfig, size: tuple[int, int], ignored_phrases: Sequence[str]
) -> tuple[JsonDict, JsonDict]:
    """The reference's processor_config.json, and what its image processor must know of the network."""
    vision, (height, width) = config.vision, size
    for kernel, stride, padding in zip(vision.kernels, vision.strides, vision.paddings, strict=True):
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    kinds = "ocr pure_text description_with_bboxes description_with_polygons polygons bboxes".split()
    rules: JsonDict = {kind: {} for kind in (*kinds, "description_with_bboxes_or_polygons")}
    words = ignored_phrases if config.ignored_phrases is None else config.ignored_phrases
    rules["phrase_grounding"] = {"banned_grounding_tokens": list(words)}
    return (
        {"processor_class": "Florence2Processor", "post_processor_config": rules},
        {"image_seq_length": 1 + height * width},
    )


_SOURCES = ["spatial_avg_pool", "temporal_avg_pool"]
_ROWS, _TIMES = "image_pos_embed.row_embeddings.weight", "visual_temporal_embed.pos_idx_to_embed"
_BIAS = "language_model.final_logits_bias"


def _tower_keys(tower: str, conv: str, names: Mapping[str, str]) -> JsonDict:
    """The image tower's keys; names: ours inside a layer -> foreign, "mixer" standing for what each calls its own."""
    keys: JsonDict = {
        "vision.stages.{}.conv": f"{tower}.convs.{{}}.{conv}",
        "vision.stages.{}.norm": f"{tower}.convs.{{}}.norm",
    }
    for kind, ours, foreign in (
        ("spatial", "mixer.attn", "window_attn"),
        ("channel", "mixer", "channel_attn"),
    ):
        for name, other in names.items():
            place = f"vision.stages.{{}}.{kind}.{{}}.{name.replace('mixer', ours)}"
            keys[place] = f"{tower}.blocks.{{}}.{{}}.{kind}_block.{other.replace('mixer', foreign)}"
    return keys


TRANSFORMERS_KEYS: KeyMap = {
    **_tower_keys(
        "model.vision_tower",
        "conv",
        {
            "conv1": "conv1",
            "norm1": "norm1",
            "mixer.qkv": "mixer.qkv",
            "mixer.out": "mixer.proj",
            "conv2": "conv2",
            "norm2": "norm2",
            "mlp.fc1": "ffn.fc1",
            "mlp.fc2": "ffn.fc2",
        },
    ),
    "rows": "model.multi_modal_projector.image_position_embed.row_embeddings.weight",
    "columns": "model.multi_modal_projector.image_position_embed.column_embeddings.weight",
    "times": "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed",
    "projection": "model.multi_modal_projector.image_projection",
    "norm": "model.multi_modal_projector.image_proj_norm",
    **bart_keys("encoder", "language", "model.language_model", "lm_head", ""),
}

_BODY = "model.language_model"
_SHARED, _HEAD = f"{_BODY}.shared.weight", "lm_head.weight"


def transformers_keys(config: FlorenceConfig) -> KeyMap:
    """The key map of the hub's layout, which has a word for images. A network without one is given the mean of all
    words, which is never the likeliest."""
    more = int(config.image_id >= config.text.vocab)
    if not more and not config.untied_decoder:
        return TRANSFORMERS_KEYS

    def table(*names: str) -> Rule:
        def longer(ours: Tensor) -> list[Tensor]:
            mean = ours.float().mean(dim=0, keepdim=True).to(ours.dtype)
            return [torch.cat([ours, *[mean] * more]) for _ in names]

        return Rule(names, lambda foreign: foreign[0][: len(foreign[0]) - more], longer)

    sides = (
        [f"{_BODY}.{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
        if config.untied_decoder
        else []
    )
    return {
        **TRANSFORMERS_KEYS,
        "encoder.word.weight": table(_SHARED, *sides[:1]),
        "language.text.word.weight": table(sides[1] if sides else _SHARED),
        "language.head.weight": table(_HEAD),
    }


def original_keys(config: FlorenceConfig) -> KeyMap:
    """The key map of microsoft/Florence-2-*."""
    own = {"language.text.word": "language_model.model.decoder.embed_tokens"}
    return {**ORIGINAL_KEYS, **own} if config.untied_decoder else ORIGINAL_KEYS


ORIGINAL_KEYS: KeyMap = {
    **_tower_keys(
        "vision_tower",
        "proj",
        {
            "conv1": "conv1.fn.dw",
            "norm1": "mixer.norm",
            "mixer.qkv": "mixer.fn.qkv",
            "mixer.out": "mixer.fn.proj",
            "conv2": "conv2.fn.dw",
            "norm2": "ffn.norm",
            "mlp.fc1": "ffn.fn.net.fc1",
            "mlp.fc2": "ffn.fn.net.fc2",
        },
    ),
    "rows": _ROWS,
    "columns": "image_pos_embed.column_embeddings.weight",
    "times": _TIMES,
    "projection.weight": transposed("image_projection"),
    "norm": "image_proj_norm",
    **bart_keys("encoder", "language", "language_model.model", "language_model.lm_head", _BIAS),
}

# The table of words under its second and third name; a bias of zeros; the classifier's norms of the tower's training.
IGNORED = (
    r"\.embed_tokens\.weight$",
    r"^language_model\.final_logits_bias$",
    r"^vision_tower\.(norms|head)\.",
)


def default_image(_: FlorenceConfig) -> JsonDict:
    """The processor settings that the models were trained with: 768 x 768, ImageNet's mean and std."""
    return {
        "size": {"height": 768, "width": 768},
        "do_center_crop": False,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


FAMILY = Family(
    name="florence",
    network=Florence,
    config=FlorenceConfig,
    model_types=("florence2",),
    layouts={
        "transformers": Layout(
            keys=transformers_keys,
            ignored=IGNORED,
            prepare=keep_names,
            markers=(
                "model.multi_modal_projector.image_proj_norm.weight",
                "model.vision_tower.convs.0.conv.weight",
            ),
            configure=config_from_transformers,
        ),
        "original": Layout(
            keys=original_keys,
            ignored=IGNORED,
            prepare=keep_names,
            markers=("image_proj_norm.weight", "vision_tower.convs.0.proj.weight"),
            configure=config_from_original,
        ),
    },
    tokenizer="bart",
    image_processor="CLIPImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
    generation=True,
    processor=processor,
)
