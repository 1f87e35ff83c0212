"""T5 and BART in the hub's layout (`transformers`): their sizes from config.json, their key maps as data."""

from __future__ import annotations

from sightloop.checkpoints.key_map import KeyMap, cat, squeezed
from sightloop.checkpoints.language import opt_bart_block_keys
from sightloop.nn.attention import HeadConfig
from sightloop.towers.text import LanguageConfig, TextConfig
from sightloop.types import JsonDict, JsonMapping

_T5: JsonDict = {
    "vocab_size": 32_128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
_BART: JsonDict = {
    "vocab_size": 50_265,
    "max_position_embeddings": 1024,
    "encoder_layers": 12,
    "encoder_ffn_dim": 4096,
    "encoder_attention_heads": 16,
    "decoder_layers": 12,
    "decoder_ffn_dim": 4096,
    "decoder_attention_heads": 16,
    "activation_function": "gelu",
    "d_model": 1024,
    "scale_embedding": False,
}


def t5_configs(data: JsonMapping, *, tied: bool) -> tuple[TextConfig, LanguageConfig]:
    """T5's encoder and decoder (Raffel et al. 2020; the gated ones are 1.1's, as Flan-T5 has them).

    tied: the head's matrix is the word table. The tensors say so: configs of 1.1 do not mean what they say.
    """
    full = {**_T5, **data}
    gated, _, activation = str(full["feed_forward_proj"]).rpartition("-")
    shape: JsonDict = {
        "vocab": full["vocab_size"],
        "positions": 0,
        "dim": full["d_model"],
        "heads": full["num_heads"],
        "mlp_dim": full["d_ff"],
        # T5's code calls its tanh GELU so; BLIP-2's T5 has the exact one, under another name.
        "activation": full.get("dense_act_fn")
        or ("gelu_new" if gated and activation == "gelu" else activation),
        "eps": full["layer_norm_epsilon"],
        "post_norm": False,
        "attention": HeadConfig(full["d_kv"], 0, False, False, 1.0),
        "norm": "rms",
        "gated": bool(gated),
        "mlp_bias": False,
        "relative": full["relative_attention_num_buckets"],
        "relative_distance": full["relative_attention_max_distance"],
    }
    layers = full["num_layers"]
    encoder = TextConfig(layers=layers, **shape)
    decoder = TextConfig(layers=full.get("num_decoder_layers") or layers, memory_dim=full["d_model"], **shape)
    scales = bool(full.get("scale_decoder_outputs", full.get("tie_word_embeddings") is not False))
    return encoder, LanguageConfig(decoder, tied=tied, state_scale=full["d_model"] ** -0.5 if scales else 1.0)


def t5_to_transformers(encoder: TextConfig, language: LanguageConfig) -> JsonDict:
    """The inverse of `t5_configs`."""
    scales = language.state_scale != 1.0
    kind = "gelu" if encoder.activation.startswith("gelu") else encoder.activation
    return {
        "model_type": "t5",
        "vocab_size": encoder.vocab,
        "d_model": encoder.dim,
        "d_kv": encoder.attention.width,
        "d_ff": encoder.mlp_dim,
        "num_layers": encoder.layers,
        "num_decoder_layers": language.text.layers,
        "num_heads": encoder.heads,
        "relative_attention_num_buckets": encoder.relative,
        "relative_attention_max_distance": encoder.relative_distance,
        "layer_norm_epsilon": encoder.eps,
        "feed_forward_proj": f"gated-{kind}" if encoder.gated else kind,
        "dense_act_fn": encoder.activation,
        "scale_decoder_outputs": scales,
        "tie_word_embeddings": scales,
        "is_encoder_decoder": True,
    }


def bart_configs(data: JsonMapping) -> tuple[TextConfig, LanguageConfig]:
    """BART's encoder and decoder (Lewis et al. 2020). The decoder's head has the bias that checkpoints keep apart."""
    full = {**_BART, **data}
    dim = full["d_model"]
    shape: JsonDict = {
        "vocab": full["vocab_size"],
        "positions": full["max_position_embeddings"],
        "position_offset": 2,
        "dim": dim,
        "activation": full["activation_function"],
        "eps": 1e-5,
        "post_norm": True,
        "word_scale": dim**0.5 if full["scale_embedding"] else 1.0,
    }
    sizes = {
        side: {
            "layers": full[f"{side}_layers"],
            "heads": full[f"{side}_attention_heads"],
            "mlp_dim": full[f"{side}_ffn_dim"],
        }
        for side in ("encoder", "decoder")
    }
    decoder = TextConfig(memory_dim=dim, **shape, **sizes["decoder"])
    return TextConfig(**shape, **sizes["encoder"]), LanguageConfig(decoder, tied=True, head_bias=True)


def bart_to_transformers(encoder: TextConfig, language: LanguageConfig) -> JsonDict:
    """The inverse of `bart_configs`."""
    data: JsonDict = {
        "model_type": "bart",
        "vocab_size": encoder.vocab,
        "max_position_embeddings": encoder.positions,
        "activation_function": encoder.activation,
        "d_model": encoder.dim,
        "scale_embedding": encoder.word_scale != 1.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": language.tied,
    }
    for side, text in (("encoder", encoder), ("decoder", language.text)):
        data |= {f"{side}_layers": text.layers, f"{side}_ffn_dim": text.mlp_dim}
        data[f"{side}_attention_heads"] = text.heads
    return data


def t5_keys(encoder: str, decoder: str, foreign: str, *, gated: bool) -> KeyMap:
    """The key map of a T5; encoder, decoder: their names in the network; foreign: a prefix such as
    "language_model."."""
    keys: JsonDict = {f"{decoder}.head": f"{foreign}lm_head"}
    for ours, side, mlp in ((encoder, "encoder", 1), (f"{decoder}.text", "decoder", 2)):
        block, layer = f"{ours}.blocks.{{}}", f"{foreign}{side}.block.{{}}.layer"
        wide = f"{layer}.{mlp}.DenseReluDense"
        keys |= {
            f"{ours}.word": f"{foreign}shared",
            f"{ours}.relative": f"{foreign}{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{ours}.norm": f"{foreign}{side}.final_layer_norm",
            f"{block}.attn.qkv": cat(*(f"{layer}.0.SelfAttention.{name}" for name in "qkv")),
            f"{block}.attn.out": f"{layer}.0.SelfAttention.o",
            f"{block}.norm1": f"{layer}.0.layer_norm",
            f"{block}.mlp.fc1": cat(f"{wide}.wi_0", f"{wide}.wi_1") if gated else f"{wide}.wi",
            f"{block}.mlp.fc2": f"{wide}.wo",
            f"{block}.norm2": f"{layer}.{mlp}.layer_norm",
        }
        if side == "decoder":
            keys |= {
                f"{block}.cross.q": f"{layer}.1.EncDecAttention.q",
                f"{block}.cross.kv": cat(f"{layer}.1.EncDecAttention.k", f"{layer}.1.EncDecAttention.v"),
                f"{block}.cross.out": f"{layer}.1.EncDecAttention.o",
                f"{block}.norm_cross": f"{layer}.1.layer_norm",
            }
    return keys


def bart_keys(encoder: str, decoder: str, body: str, head: str, bias: str) -> KeyMap:
    """The key map of a BART; body: foreign, such as "language_model.model"; head and bias: the full names of the head's
    layer and of the separate bias, `[1, V]`."""
    keys: JsonDict = {
        f"{decoder}.head.weight": f"{head}.weight",
        f"{decoder}.head.bias": squeezed(bias, 1),
    }
    for ours, side in ((encoder, "encoder"), (f"{decoder}.text", "decoder")):
        layer = f"{body}.{side}.layers.{{}}"
        keys |= {
            f"{ours}.word": f"{body}.shared",
            f"{ours}.position": f"{body}.{side}.embed_positions",
            f"{ours}.norm": f"{body}.{side}.layernorm_embedding",
            **opt_bart_block_keys(ours, layer),
        }
    block, cross = f"{decoder}.text.blocks.{{}}", f"{body}.decoder.layers.{{}}.encoder_attn"
    return keys | {
        f"{block}.cross.q": f"{cross}.q_proj",
        f"{block}.cross.kv": cat(f"{cross}.k_proj", f"{cross}.v_proj"),
        f"{block}.cross.out": f"{cross}.out_proj",
        f"{block}.norm_cross": f"{cross}_layer_norm",
    }
