"""BLIP's checkpoints: the layouts of the hub (`transformers`) and of the original repository, as data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sightloop.checkpoints.clip import CLIP_MEAN, CLIP_STD
from sightloop.checkpoints.efficientnet import IMAGE_MEAN, IMAGE_STD, read_efficientnet
from sightloop.checkpoints.hf_config import TEXT, VISION, from_hf_config, to_hf_config
from sightloop.checkpoints.key_map import (
    KeyMap,
    RenamedTensors,
    Rule,
    cat,
    count_layers,
    squeezed,
    tensors_equal,
)
from sightloop.checkpoints.layout import Family, Layout
from sightloop.errors import UnsupportedError
from sightloop.models.blip import Blip, BlipConfig
from sightloop.towers.efficientnet import EfficientNetConfig
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig
from sightloop.types import JsonDict, JsonMapping


# Decoder tensors that equal the encoder's where the two share (names below `text_encoder.` / `text_decoder.bert.`).
def _shared_pairs(layers: int) -> Iterator[tuple[str, str]]:
    stems = [f"embeddings.{part}" for part in ("word_embeddings", "position_embeddings", "LayerNorm")]
    parts = [f"crossattention.self.{part}" for part in ("query", "key", "value")]
    parts += ["crossattention.output.dense", "intermediate.dense", "output.dense"]
    layer = (f"encoder.layer.{i}.{part}" for i in range(layers) for part in parts)
    for stem in itertools.chain(stems, layer):
        yield f"text_encoder.{stem}.weight", f"text_decoder.bert.{stem}.weight"


_VISION_DEFAULTS = {
    "image_size": 384,
    "patch": 16,
    "dim": 768,
    "layers": 12,
    "heads": 12,
    "mlp_dim": 3072,
    "activation": "gelu",
    "eps": 1e-5,
}
_TEXT_DEFAULTS = {**_VISION_DEFAULTS, "vocab": 30524, "positions": 512, "heads": 8, "eps": 1e-12}


def config_from_transformers(data: JsonMapping, tensors: Mapping[str, Tensor]) -> BlipConfig:
    """From the config.json of a hub checkpoint (`model_type: blip`) and the names of its tensors."""
    vision: JsonDict = data.get("vision_config") or {}
    text: JsonDict = data.get("text_config") or {}
    image_tower = VitConfig(
        **from_hf_config(vision, VISION, _VISION_DEFAULTS),
        norm_first=False,
        norm_tokens=True,
        patch_bias=True,
    )
    text_tower = TextConfig(
        **from_hf_config(text, TEXT, _TEXT_DEFAULTS),
        post_norm=True,
        memory_dim=image_tower.dim if text.get("is_decoder", True) else None,
    )
    ids = (text.get("bos_token_id", 30522), text.get("sep_token_id", 102), text.get("pad_token_id", 0))
    return _build_config(image_tower, text_tower, tensors, ids, encoder_start=None)


def config_from_tensors(tensors: Mapping[str, Tensor]) -> BlipConfig:
    """From the shapes in a checkpoint of the original repository (heads are 64 wide there; its norms' eps)."""
    dim, _, patch, _ = tensors["visual_encoder.patch_embed.proj.weight"].shape
    prefix = (
        "text_encoder" if "text_encoder.embeddings.word_embeddings.weight" in tensors else "text_decoder.bert"
    )
    vocab, width = tensors[f"{prefix}.embeddings.word_embeddings.weight"].shape
    image_tower = VitConfig(
        image_size=round((tensors["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch=patch,
        dim=dim,
        layers=count_layers(tensors, r"^visual_encoder\.blocks\.(\d+)\."),
        heads=dim // 64,
        mlp_dim=tensors["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
        activation="gelu",
        eps=1e-6,
        norm_first=False,
        norm_tokens=True,
        patch_bias=True,
    )
    text_tower = TextConfig(
        vocab=vocab,
        positions=tensors[f"{prefix}.embeddings.position_embeddings.weight"].shape[0],
        dim=width,
        layers=count_layers(tensors, rf"^{re.escape(prefix)}\.encoder\.layer\.(\d+)\."),
        heads=width // 64,
        mlp_dim=tensors[f"{prefix}.encoder.layer.0.intermediate.dense.weight"].shape[0],
        activation="gelu",
        eps=1e-12,
        post_norm=True,
        memory_dim=dim,
    )
    # [DEC] and [ENC] are the two tokens that the original code adds behind BERT's own; [SEP] ends, [PAD] pads.
    return _build_config(image_tower, text_tower, tensors, (vocab - 2, 102, 0), encoder_start=vocab - 1)


def _build_config(
    vision: VitConfig,
    text: TextConfig,
    tensors: Mapping[str, Tensor],
    ids: tuple[int, int, int],
    *,
    encoder_start: int | None,
) -> BlipConfig:
    encoder = "text_encoder.embeddings.word_embeddings.weight" in tensors
    decoder = "text_decoder.bert.embeddings.word_embeddings.weight" in tensors
    words, table = (
        "text_decoder.cls.predictions.decoder.weight",
        "text_decoder.bert.embeddings.word_embeddings.weight",
    )
    projection = tensors.get("vision_proj.weight")
    cross_key = tensors.get("text_decoder.bert.encoder.layer.0.crossattention.self.key.weight")
    return BlipConfig(
        vision=vision,
        text=text,
        decoder_memory_dim=None if cross_key is None else cross_key.shape[1],
        encoder=encoder,
        decoder=decoder,
        matching="itm_head.weight" in tensors,
        embed_dim=None if projection is None else projection.shape[0],
        temperature="temp" in tensors,
        shared=encoder and decoder and tensors_equal(tensors, _shared_pairs(text.layers)),
        tied_words=decoder and (words not in tensors or tensors_equal(tensors, [(words, table)])),
        start_id=ids[0],
        end_id=ids[1],
        pad_id=ids[2],
        encoder_start=encoder_start,
    )


def to_transformers(config: BlipConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """The models of `transformers` that hold this checkpoint's parts; two where no single one holds them all.

    Raises UnsupportedError for another fusion, a convolutional stem, or a judge that counts ITC too: no model there has
    them.
    """
    if config.fusion != "cross":
        raise UnsupportedError(
            f"transformers has no BLIP with fusion {config.fusion}; save it in our own layout instead, or train it "
            "with --set model.fusion=cross"
        )
    vision = config.vision
    if not isinstance(vision, VitConfig) or vision.stem or vision.pooling == "mean":
        raise UnsupportedError(
            "transformers has no BLIP with a convolutional image tower; save it in our own layout instead"
        )
    if config.match_cosine:
        raise UnsupportedError(
            "this model's judge counts ITC's cosine beside ITM, as its calibration found best, and no BLIP of "
            "transformers does; save it in our own layout instead, or train it with --set calibrate=false"
        )
    writes = ("vision_model.", "text_decoder.")
    judges = ("vision_model.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
    if config.encoder and config.decoder and not config.matching:
        return {"": (_config_to_transformers(config, "BlipForQuestionAnswering"), (*writes, "text_encoder."))}
    captioning = (_config_to_transformers(config, "BlipForConditionalGeneration"), writes)
    retrieval = (_config_to_transformers(config, "BlipForImageTextRetrieval"), judges)
    if config.encoder and config.decoder:
        return {"captioning": captioning, "retrieval": retrieval}
    return {"": captioning if config.decoder else retrieval}


def _config_to_transformers(config: BlipConfig, architecture: str) -> JsonDict:
    vision = config.vision
    assert isinstance(vision, VitConfig)
    return {
        "architectures": [architecture],
        "model_type": "blip",
        "image_text_hidden_size": config.embed_dim or 256,
        "tie_word_embeddings": config.tied_words,
        "vision_config": {"model_type": "blip_vision_model", **to_hf_config(vision, VISION)},
        "text_config": {
            "model_type": "blip_text_model",
            **to_hf_config(config.text, TEXT),
            "encoder_hidden_size": config.vision.dim,
            "is_decoder": config.text.memory_dim is not None,
            "tie_word_embeddings": config.tied_words,
            "bos_token_id": config.start_id,
            "sep_token_id": config.end_id,
            "pad_token_id": config.pad_id,
        },
    }


_BIASES = ("text_decoder.cls.predictions.decoder.bias", "text_decoder.cls.predictions.bias")


def alias_lm_head_bias(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Give the bias of the LM head under both of its names; a checkpoint may store it under either."""
    there = [name for name in _BIASES if name in tensors]
    own = {name: name for name in tensors}
    return RenamedTensors(tensors, {**dict.fromkeys(_BIASES, there[0]), **own}) if there else tensors


def _vision_keys(embed: JsonDict, layer: str, names: tuple[str, str, str, str], last: str) -> JsonDict:
    qkv, out, norm1, norm2 = (f"{layer}.{name}" for name in names)
    return embed | {
        "vision.blocks.{}.attn.qkv": qkv,
        "vision.blocks.{}.attn.out": out,
        "vision.blocks.{}.norm1": norm1,
        "vision.blocks.{}.norm2": norm2,
        "vision.blocks.{}.mlp.fc1": f"{layer}.mlp.fc1",
        "vision.blocks.{}.mlp.fc2": f"{layer}.mlp.fc2",
        "vision.norm_out": last,
    }


def _bert_keys(ours: str, foreign: str) -> JsonDict:
    layer = f"{foreign}.encoder.layer.{{}}"
    own, cross = f"{layer}.attention", f"{layer}.crossattention"
    return {
        f"{ours}.word": f"{foreign}.embeddings.word_embeddings",
        f"{ours}.position": f"{foreign}.embeddings.position_embeddings",
        f"{ours}.norm": f"{foreign}.embeddings.LayerNorm",
        f"{ours}.blocks.{{}}.attn.qkv": cat(f"{own}.self.query", f"{own}.self.key", f"{own}.self.value"),
        f"{ours}.blocks.{{}}.attn.out": f"{own}.output.dense",
        f"{ours}.blocks.{{}}.norm1": f"{own}.output.LayerNorm",
        f"{ours}.blocks.{{}}.cross.q": f"{cross}.self.query",
        f"{ours}.blocks.{{}}.cross.kv": cat(f"{cross}.self.key", f"{cross}.self.value"),
        f"{ours}.blocks.{{}}.cross.out": f"{cross}.output.dense",
        f"{ours}.blocks.{{}}.norm_cross": f"{cross}.output.LayerNorm",
        f"{ours}.blocks.{{}}.mlp.fc1": f"{layer}.intermediate.dense",
        f"{ours}.blocks.{{}}.mlp.fc2": f"{layer}.output.dense",
        f"{ours}.blocks.{{}}.norm2": f"{layer}.output.LayerNorm",
    }


_HEAD_KEYS: JsonDict = {
    **_bert_keys("encoder", "text_encoder"),
    **_bert_keys("decoder.text", "text_decoder.bert"),
    "decoder.head.dense": "text_decoder.cls.predictions.transform.dense",
    "decoder.head.norm": "text_decoder.cls.predictions.transform.LayerNorm",
    "decoder.head.words.weight": "text_decoder.cls.predictions.decoder.weight",
    # One bias under two names; where they differ (untied checkpoints of `transformers`), the second is never read.
    "decoder.head.words.bias": Rule(_BIASES, lambda both: both[0], lambda ours: [ours, ours]),
    "image_projection": "vision_proj",
    "text_projection": "text_proj",
    "match_head": "itm_head",
    "temperature": "temp",
}

VISION_KEYS: JsonDict = _vision_keys(
    {
        "vision.embed.class_token": squeezed("vision_model.embeddings.class_embedding", 2),
        "vision.embed.position": squeezed("vision_model.embeddings.position_embedding", 1),
        "vision.embed.proj": "vision_model.embeddings.patch_embedding",
    },
    "vision_model.encoder.layers.{}",
    ("self_attn.qkv", "self_attn.projection", "layer_norm1", "layer_norm2"),
    "vision_model.post_layernorm",
)
TRANSFORMERS_KEYS: KeyMap = _HEAD_KEYS | VISION_KEYS

ORIGINAL_KEYS: KeyMap = _HEAD_KEYS | _vision_keys(
    {
        "vision.embed.class_token": squeezed("visual_encoder.cls_token", 2),
        "vision.embed.position": squeezed("visual_encoder.pos_embed", 1),
        "vision.embed.proj": "visual_encoder.patch_embed.proj",
    },
    "visual_encoder.blocks.{}",
    ("attn.qkv", "attn.proj", "norm1", "norm2"),
    "visual_encoder.norm",
)

# Buffers; the momentum teacher and the queues of pre-training, which inference
# has no use for.
IGNORED = (
    r"\.position_ids$",
    r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.",
    r"^(image_queue|text_queue|idx_queue|queue_ptr|ptr_queue)$",
)


def default_image(config: Any) -> JsonDict:
    """The processor settings that the models were trained with: stretched to a square, CLIP's mean and std."""
    side = config.vision.image_size
    of_trunk = isinstance(config.vision, EfficientNetConfig)
    return {
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "resample": 3,
        "image_mean": list(IMAGE_MEAN) if of_trunk else CLIP_MEAN,
        "image_std": list(IMAGE_STD) if of_trunk else CLIP_STD,
    }


FAMILY = Family(
    name="blip",
    network=Blip,
    config=BlipConfig,
    model_types=("blip",),
    towers={"vision": VitConfig | EfficientNetConfig},
    read_vision=read_efficientnet,
    layouts={
        "transformers": Layout(
            keys=TRANSFORMERS_KEYS,
            ignored=IGNORED,
            prepare=alias_lm_head_bias,
            markers=(
                "vision_model.embeddings.class_embedding",
                "vision_model.embeddings.patch_embedding.bias",
            ),
            configure=config_from_transformers,
        ),
        "original": Layout(
            keys=ORIGINAL_KEYS,
            ignored=IGNORED,
            prepare=alias_lm_head_bias,
            markers=("visual_encoder.pos_embed", "visual_encoder.patch_embed.proj.weight"),
            configure=lambda _, tensors: config_from_tensors(tensors),
        ),
    },
    tokenizer="bert",
    image_processor="BlipImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
)
