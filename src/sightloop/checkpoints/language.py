"""Decoder-only language models in the hub's layout (`transformers`): sizes from config.json, key maps as data.

Families with a language model hold one of these and say under which prefix of a foreign checkpoint it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sightloop.checkpoints.key_map import KeyMap, cat, cat_grouped_query, tensors_equal
from sightloop.errors import CheckpointError
from sightloop.nn.attention import HeadConfig
from sightloop.towers.text import LanguageConfig, TextConfig
from sightloop.types import JsonDict, JsonMapping

# What a config.json leaves out means the reference's default for its model_type.
_LLAMA: JsonDict = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_MOST_LAYERS = 1 << 10
_DEFAULTS: dict[str, JsonDict] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "intermediate_size": 14_336, "num_key_value_heads": 8, "sliding_window": 4096},
    "gemma": {
        **_LLAMA,
        "vocab_size": 256_000,
        "hidden_size": 3072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gemma2": {
        **_LLAMA,
        "vocab_size": 256_000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "opt": {
        "vocab_size": 50_272,
        "hidden_size": 768,
        "ffn_dim": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "activation_function": "relu",
        "tie_word_embeddings": True,
    },
}


def language_config(
    data: JsonMapping, *, bidirectional_prefix: bool = False, tied: bool | None = None
) -> LanguageConfig:
    """A decoder-only model from its part of config.json: model_type llama, mistral, gemma, gemma2 or opt.

    bidirectional_prefix, tied: see `LanguageConfig`; tied None: as this part says. Raises CheckpointError for
    another type, or
    for what is not supported of one.
    """
    kind = str(data.get("model_type"))
    if kind == "opt":
        return _opt(_with_defaults(data, kind))
    if kind not in ("llama", "mistral", "gemma", "gemma2"):
        raise CheckpointError(f"config.json: the language model {kind!r} is not known")
    full = _with_defaults(data, kind)
    gemma = kind.startswith("gemma")
    layers, heads = full["num_hidden_layers"], full["num_attention_heads"]
    if not 0 < layers <= _MOST_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers={layers!r} is no number of layers")
    head = full.get("head_dim") or full["hidden_size"] // heads
    biased = kind != "mistral" and bool(full.get("attention_bias", False))
    attention = HeadConfig(
        head,
        full.get("num_key_value_heads") or heads,
        biased,
        biased,
        float(full["query_pre_attn_scalar"]) ** -0.5 if kind == "gemma2" else 0.0,
        float(full.get("attn_logit_softcapping") or 0.0) if kind == "gemma2" else 0.0,
    )
    text = TextConfig(
        full["vocab_size"],
        0,
        full["hidden_size"],
        layers,
        heads,
        full["intermediate_size"],
        _activation(full, kind),
        full["rms_norm_eps"],
        post_norm=False,
        attention=attention,
        norm="rms_offset" if gemma else "rms",
        gated=True,
        mlp_bias=kind == "llama" and bool(full.get("mlp_bias", False)),
        sandwich=kind == "gemma2",
        rotary=_rope_theta(full),
        word_scale=full["hidden_size"] ** 0.5 if gemma else 1.0,
        windows=_windows(full, kind, layers),
    )
    cap = float(full.get("final_logit_softcapping") or 0.0) if gemma else 0.0
    tied = bool(full["tie_word_embeddings"]) if tied is None else tied
    return LanguageConfig(text, tied=tied, softcap=cap, bidirectional_prefix=bidirectional_prefix)


def language_to_transformers(config: LanguageConfig) -> JsonDict:
    """The part of config.json that says a Llama, a Mistral or a Gemma; the inverse of `language_config`."""
    text = config.text
    older, newer = ("gemma", "gemma2") if text.norm == "rms_offset" else ("llama", "mistral")
    data: JsonDict = {
        "model_type": newer if text.windows or text.sandwich else older,
        "vocab_size": text.vocab,
        "hidden_size": text.dim,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.attention.kv,
        "head_dim": text.attention.width,
        "hidden_act": text.activation,
        "rms_norm_eps": text.eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": text.rotary},
        "tie_word_embeddings": config.tied,
    }
    if text.sandwich:
        return data | {
            "hidden_activation": text.activation,
            "attention_bias": text.attention.bias,
            "query_pre_attn_scalar": round(text.attention.scale**-2),
            "attn_logit_softcapping": text.attention.softcap or None,
            "final_logit_softcapping": config.softcap or None,
            "sliding_window": max(text.windows, default=None),
            "layer_types": [
                ("full" if not w else "sliding") + "_attention" for w in text.windows or (0,) * text.layers
            ],
        }
    if text.windows:
        return {**data, "sliding_window": text.windows[0]}
    if config.softcap:
        data["final_logit_softcapping"] = config.softcap
    return {**data, "attention_bias": text.attention.bias, "mlp_bias": text.mlp_bias}


def language_keys(config: LanguageConfig, ours: str, body: str, head: str) -> KeyMap:
    """The key map of a decoder-only model; ours: its name in the network ("language"); body, head: foreign, such as
    "language_model.model" and "language_model.lm_head"."""
    text = config.text
    if text.positions:
        layer = f"{body}.decoder.layers.{{}}"
        return {
            f"{ours}.head": head,
            f"{ours}.text.word": f"{body}.decoder.embed_tokens",
            f"{ours}.text.position": f"{body}.decoder.embed_positions",
            f"{ours}.text.norm": f"{body}.decoder.final_layer_norm",
            **opt_bart_block_keys(f"{ours}.text", layer),
        }
    block, layer = f"{ours}.text.blocks.{{}}", f"{body}.layers.{{}}"
    heads, kv = text.heads, text.attention.kv or text.heads
    projections = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
    norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if text.sandwich:
        norms |= {"norm1_out": "post_attention_layernorm", "norm2": "pre_feedforward_layernorm"}
        norms |= {"norm2_out": "post_feedforward_layernorm"}
    return {
        f"{ours}.head": head,
        f"{ours}.text.word": f"{body}.embed_tokens",
        f"{ours}.text.norm": f"{body}.norm",
        f"{block}.attn.qkv": cat_grouped_query(heads, kv, *projections),
        f"{block}.attn.out": f"{layer}.self_attn.o_proj",
        f"{block}.mlp.fc1": cat(f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
        f"{block}.mlp.fc2": f"{layer}.mlp.down_proj",
        **{f"{block}.{name}": f"{layer}.{foreign}" for name, foreign in norms.items()},
    }


def opt_bart_block_keys(ours: str, layer: str) -> JsonDict:
    """The keys of a block as OPT and BART write it; ours: the tower's name, layer: foreign."""
    block = f"{ours}.blocks.{{}}"
    return {
        f"{block}.attn.qkv": cat(*(f"{layer}.self_attn.{name}_proj" for name in "qkv")),
        f"{block}.attn.out": f"{layer}.self_attn.out_proj",
        f"{block}.norm1": f"{layer}.self_attn_layer_norm",
        f"{block}.mlp.fc1": f"{layer}.fc1",
        f"{block}.mlp.fc2": f"{layer}.fc2",
        f"{block}.norm2": f"{layer}.final_layer_norm",
    }


def _opt(full: JsonMapping) -> LanguageConfig:
    dim = full["hidden_size"]
    unusual = {"do_layer_norm_before": True, "_remove_final_layer_norm": False, "enable_bias": True}
    unusual |= {"word_embed_proj_dim": dim, "layer_norm_elementwise_affine": True, "sliding_window": None}
    for name, usual in unusual.items():
        if full.get(name) not in (None, usual):
            raise CheckpointError(f"config.json: an OPT with {name}={full[name]!r} is not supported")
    text = TextConfig(
        full["vocab_size"],
        full["max_position_embeddings"],
        dim,
        full["num_hidden_layers"],
        full["num_attention_heads"],
        full["ffn_dim"],
        full["activation_function"],
        1e-5,
        post_norm=False,
        position_offset=2,
    )
    return LanguageConfig(text, tied=bool(full["tie_word_embeddings"]))


def is_head_tied(config_value: bool, tensors: Mapping[str, Tensor] | None) -> bool:
    """Whether the head is the word table: as config.json says, unless the tensors have both and they differ."""
    head, words = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    return config_value and (
        tensors is None or head not in tensors or tensors_equal(tensors, [(head, words)])
    )


def first_eos_id(ids: int | list[int]) -> int:
    """Of the ids that end a text the one that a network is taught."""
    return ids[0] if isinstance(ids, list) else ids


def opt_to_transformers(config: LanguageConfig) -> JsonDict:
    """The inverse of `language_config` for an OPT."""
    text = config.text
    return {
        "model_type": "opt",
        "vocab_size": text.vocab,
        "hidden_size": text.dim,
        "word_embed_proj_dim": text.dim,
        "ffn_dim": text.mlp_dim,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "max_position_embeddings": text.positions,
        "activation_function": text.activation,
        "tie_word_embeddings": config.tied,
    }


def _with_defaults(data: JsonMapping, kind: str) -> JsonDict:
    return {**_DEFAULTS[kind], **data}


def _activation(full: JsonMapping, kind: str) -> str:
    if kind == "gemma2":
        return full["hidden_activation"]
    # Gemma's first files say "gelu" and mean its tanh approximation.
    return "gelu_pytorch_tanh" if (kind, full["hidden_act"]) == ("gemma", "gelu") else full["hidden_act"]


def _rope_theta(full: JsonMapping) -> float:
    """The base of the rotary positions; other kinds of scaling than none are refused."""
    rope = full.get("rope_scaling") or full.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one for each type of layer"
    if kind != "default":
        raise CheckpointError(f"config.json: rotary positions of the kind {kind!r} are not supported")
    return float(rope.get("rope_theta", full["rope_theta"]))


def _windows(full: JsonMapping, kind: str, layers: int) -> tuple[int, ...]:
    window = full.get("sliding_window") or 0
    if not window:
        return ()
    if kind not in ("mistral", "gemma2"):
        raise CheckpointError(f"config.json: a {kind} with sliding_window={window} is not supported")
    if kind == "mistral":
        return (window,) * layers
    types = full.get("layer_types") or [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    if len(types) < layers or set(types[:layers]) - {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"config.json: layer_types={types!r} for {layers} layers")
    return tuple(window if one == "sliding_attention" else 0 for one in types[:layers])
