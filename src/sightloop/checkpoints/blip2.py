"""BLIP-2's checkpoints in the hub's layout (`transformers`): sizes from config.json, key maps as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sightloop.checkpoints.blip import VISION_KEYS, default_image
from sightloop.checkpoints.hf_config import TEXT, VISION, from_hf_config, image_token_id, to_hf_config
from sightloop.checkpoints.hub import CheckpointFiles
from sightloop.checkpoints.key_map import KeyMap, cat, load_weights, squeezed, tensors_equal
from sightloop.checkpoints.language import language_config, language_keys, opt_to_transformers
from sightloop.checkpoints.layout import Family, Layout, keep_names
from sightloop.checkpoints.seq2seq import t5_configs, t5_keys, t5_to_transformers
from sightloop.checkpoints.tensors import read_tensors
from sightloop.errors import CheckpointError, UnsupportedError, UsageError
from sightloop.models.blip2 import Blip2, Blip2Config
from sightloop.nn.attention import Linear
from sightloop.nn.init import initialize
from sightloop.towers.text import LanguageConfig, TextConfig
from sightloop.towers.vit import VitConfig
from sightloop.types import JsonDict, JsonMapping

_VISION_DEFAULTS: JsonDict = {
    "image_size": 224,
    "patch": 14,
    "dim": 1408,
    "layers": 39,
    "heads": 16,
    "mlp_dim": 6144,
    "activation": "gelu",
    "eps": 1e-6,
}
_QFORMER_DEFAULTS: JsonDict = {
    "vocab": 30522,
    "positions": 512,
    "dim": 768,
    "layers": 12,
    "heads": 12,
    "mlp_dim": 3072,
    "activation": "gelu",
    "eps": 1e-12,
}


def config_from_transformers(data: JsonMapping, tensors: Mapping[str, Tensor]) -> Blip2Config:
    """From the config.json of a hub checkpoint (`model_type: blip-2`) and the names of its tensors."""
    vision: JsonDict = data.get("vision_config") or {}
    former: JsonDict = data.get("qformer_config") or {}
    tower = VitConfig(
        **from_hf_config(vision, VISION, _VISION_DEFAULTS),
        norm_first=False,
        norm_tokens=True,
        patch_bias=True,
        qkv_bias=bool(vision.get("qkv_bias", True)),
    )
    texts = TextConfig(**from_hf_config(former, TEXT, _QFORMER_DEFAULTS), post_norm=True)
    queries = replace(
        texts,
        vocab=data.get("num_query_tokens", 32),
        positions=0,
        memory_dim=tower.dim,
        cross_every=former.get("cross_attention_frequency", 2),
    )
    shared: JsonDict = {"vision": tower, "queries": queries, "temperature": "temp" in tensors}
    if "language_projection.weight" not in tensors:
        projection = tensors.get("vision_projection.weight")
        return Blip2Config(
            **shared,
            texts=texts,
            language=None,
            encoder=None,
            embed_dim=None if projection is None else projection.shape[0],
            matching="itm_head.weight" in tensors,
            image_id=-1,
            start_ids=(texts.vocab - 1,),  # [DEC], which the original code adds to BERT's words
            end_id=102,  # BERT's [SEP]
            pad_id=former.get("pad_token_id") or 0,
        )
    text: JsonDict = {"model_type": "opt", **(data.get("text_config") or {})}
    encoder, language, start = _language(text, tensors, "language_model.")
    image_id = image_token_id(data, None)
    return Blip2Config(
        **shared,
        texts=None,
        language=language,
        encoder=encoder,
        embed_dim=None,
        matching=False,
        # Files from before there was one: what the tokenizer makes of a token that is added to it.
        image_id=min(50265 if encoder is None else 32100, language.text.vocab - 1)
        if image_id is None
        else image_id,
        start_ids=start,
        end_id=_eos_id(text, 2 if encoder is None else 1),
        pad_id=text.get("pad_token_id", 1 if encoder is None else 0),
    )


def add_language_model(first: nn.Module, files: CheckpointFiles, image_id: int, seed: int) -> Blip2:
    """BLIP-2's second stage: a language model behind the image tower and queries of a first stage.

    Args:
        first: a BLIP-2 without language model; its image tower and queries are taken over.
        files: an OPT or a T5 as `transformers` keeps it alone.
        image_id: id of its image token, a row of its token embedding.
        seed: of the new projection.

    Raises:
        CheckpointError: another kind of language model.
        UsageError: `first` is of another stage, or the token embedding has no row for the image token.
    """
    if not isinstance(first, Blip2) or first.config.language is not None:
        raise UsageError(
            f"model.language={files.name}: needs a BLIP-2 of stage 1; name one as model.init_from (the "
            "model of a run of blip2_stage1)"
        )
    tensors = read_tensors(files.weights, torch.float32)
    config = _with_language(first.config, files.config or {}, tensors, image_id)
    if image_id >= config.text.vocab:
        raise UsageError(
            f"model.language={files.name}: its token embedding of {config.text.vocab} rows has none left for images"
        )
    with torch.device("meta"):
        network = Blip2(config)
    parts = nn.ModuleDict({"language": network.language})
    if config.encoder is not None:
        parts["encoder"] = network.encoder
    load_weights(parts, tensors, _language_model_keys(config, ""), ignore=IGNORED, source=files.name)
    network.vision, network.queries = first.vision, first.queries
    network.projection = Linear(config.queries.dim, config.text.dim)
    initialize(network.projection, seed)
    return network.eval()


def _with_language(
    first: Blip2Config, text: JsonMapping, tensors: Mapping[str, Tensor], image_token: int
) -> Blip2Config:
    """Config of the second stage.

    Args:
        first: of the first stage.
        text: config.json of the language model alone.
        tensors: of the language model alone.
        image_token: id of IMAGE_PLACEHOLDER.
    """
    encoder, language, start = _language(text, tensors, "")
    return replace(
        first,
        texts=None,
        language=language,
        encoder=encoder,
        embed_dim=None,
        matching=False,
        temperature=False,
        writes=False,
        image_id=image_token,
        start_ids=start,
        end_id=_eos_id(text, 2 if encoder is None else 1),
        pad_id=text.get("pad_token_id", 1 if encoder is None else 0),
    )


def _eos_id(text: JsonMapping, default: int) -> int:
    """The one token that ends a text."""
    ends = text.get("eos_token_id", default)
    if isinstance(ends, list):
        raise CheckpointError(f"config.json: a BLIP-2 with eos_token_id={ends} is not supported; name one")
    return ends


def _language(
    text: JsonMapping, tensors: Mapping[str, Tensor], prefix: str
) -> tuple[TextConfig | None, LanguageConfig, tuple[int, ...]]:
    """The encoder, if there is one, the language model and the ids that it starts from. prefix: of its tensors."""
    if text.get("model_type") == "opt":
        return None, language_config(text), ()
    if text.get("model_type") != "t5":
        raise CheckpointError(
            f"config.json: a BLIP-2 that writes with {text.get('model_type')!r} is not supported"
        )
    head, words = f"{prefix}lm_head.weight", f"{prefix}shared.weight"
    tied = head not in tensors or tensors_equal(tensors, [(head, words)])
    encoder, language = t5_configs(text, tied=tied)
    start = text.get("decoder_start_token_id")
    return encoder, language, ((text.get("pad_token_id") or 0) if start is None else start,)


def to_transformers(config: Blip2Config) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """The model of `transformers` that holds this checkpoint's parts.

    Raises UnsupportedError for a convolutional stem, which no model there has.
    """
    if config.vision.stem or config.vision.pooling == "mean":
        raise UnsupportedError(
            "no BLIP-2 of transformers has a convolutional stem as this one has; save it in our own layout"
        )
    queries, texts = config.queries, config.texts
    former = to_hf_config(texts or queries, TEXT)
    if texts is None:  # the reference has a vocabulary even where it reads no words
        former |= {
            "vocab_size": _QFORMER_DEFAULTS["vocab"],
            "max_position_embeddings": _QFORMER_DEFAULTS["positions"],
        }
    out: JsonDict = {
        "architectures": [
            "Blip2ForImageTextRetrieval" if config.language is None else "Blip2ForConditionalGeneration"
        ],
        "model_type": "blip-2",
        "num_query_tokens": queries.vocab,
        "image_text_hidden_size": config.embed_dim or 256,
        "vision_config": {
            "model_type": "blip_2_vision_model",
            **to_hf_config(config.vision, VISION),
            "qkv_bias": config.vision.qkv_bias,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            **former,
            "encoder_hidden_size": config.vision.dim,
            "cross_attention_frequency": queries.cross_every,
            "use_qformer_text_input": texts is not None,
        },
    }
    if config.language is not None:
        ids: JsonDict = {"eos_token_id": config.end_id, "pad_token_id": config.pad_id}
        if config.encoder is None:
            text = {**opt_to_transformers(config.language), **ids}
        else:
            ids |= {"decoder_start_token_id": config.start_ids[0], "bos_token_id": config.end_id}
            text = {**t5_to_transformers(config.encoder, config.language), **ids}
        out |= {"text_config": text, "image_token_index": config.image_id}
    # What stage 1 trained beside: the reference has no place for it.
    return {"": (out, _TRANSFORMERS_PREFIXES)}


def _qformer_block(ours: str, mlp: str) -> JsonDict:
    """One side of the Q-Former; mlp: what its feed-forward layers are called after ("_query" or nothing)."""
    block, foreign = f"{ours}.blocks.{{}}", "qformer.encoder.layer.{}"
    own = f"{foreign}.attention"
    return {
        f"{ours}.norm": "qformer.layernorm",
        f"{block}.attn.qkv": cat(*(f"{own}.attention.{name}" for name in ("query", "key", "value"))),
        f"{block}.attn.out": f"{own}.output.dense",
        f"{block}.norm1": f"{own}.output.LayerNorm",
        f"{block}.mlp.fc1": f"{foreign}.intermediate{mlp}.dense",
        f"{block}.mlp.fc2": f"{foreign}.output{mlp}.dense",
        f"{block}.norm2": f"{foreign}.output{mlp}.LayerNorm",
    }


_CROSS = "qformer.encoder.layer.{}.crossattention"
_KEYS: JsonDict = {
    **VISION_KEYS,
    "queries.word.weight": squeezed("query_tokens", 1),
    **_qformer_block("queries", "_query"),
    "queries.blocks.{}.cross.q": f"{_CROSS}.attention.query",
    "queries.blocks.{}.cross.kv": cat(f"{_CROSS}.attention.key", f"{_CROSS}.attention.value"),
    "queries.blocks.{}.cross.out": f"{_CROSS}.output.dense",
    "queries.blocks.{}.norm_cross": f"{_CROSS}.output.LayerNorm",
    **_qformer_block("texts", ""),
    "texts.word": "embeddings.word_embeddings",
    "texts.position": "embeddings.position_embeddings",
    "projection": "language_projection",
    "image_projection": "vision_projection",
    "text_projection": "text_projection",
    "match_head": "itm_head",
    "temperature": "temp",
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.words": "cls.predictions.decoder",
}
# All of these names that the reference knows.
_TRANSFORMERS_PREFIXES = (
    "vision_",
    "query_tokens",
    "qformer.",
    "embeddings.",
    "language_",
    "text_projection",
    "itm_head",
)


def transformers_keys(config: Blip2Config) -> KeyMap:
    """The key map of a checkpoint of this config."""
    return _KEYS if config.language is None else {**_KEYS, **_language_model_keys(config, "language_model.")}


def _language_model_keys(config: Blip2Config, foreign: str) -> KeyMap:
    """That of the language model in it; foreign: a prefix, "" for one that is alone."""
    if config.language is None:
        return {}
    if config.encoder is None:
        return language_keys(config.language, "language", f"{foreign}model", f"{foreign}lm_head")
    return t5_keys("encoder", "language", foreign, gated=config.encoder.gated)


# T5's second and third names of its one word table, what its oldest files have beside; buffers.
IGNORED = (
    r"^(language_model\.)?(en|de)coder\.embed_tokens\.weight$",
    r"^(language_model\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",
    r"\.position_ids$",
)


def processor(config: Blip2Config, _: tuple[int, int], __: Sequence[str]) -> tuple[JsonDict, JsonDict]:
    """What processor_config.json says beside the images: for how many queries a prompt has places."""
    queries = {} if config.language is None else {"num_query_tokens": config.queries.vocab}
    return {"processor_class": "Blip2Processor", **queries}, {}


FAMILY = Family(
    name="blip2",
    network=Blip2,
    config=Blip2Config,
    model_types=("blip-2",),
    layouts={
        "transformers": Layout(
            keys=transformers_keys,
            ignored=IGNORED,
            prepare=keep_names,
            markers=("query_tokens", "qformer.layernorm.weight"),
            configure=config_from_transformers,
        ),
    },
    tokenizer=lambda config: "bert" if config.language is None else "language",
    image_processor="BlipImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
    processor=processor,
    add_language_model=add_language_model,
)
