"""The language towers against the reference's own models: same weights, same states, padded or not, step by step."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import transformers
from torch import Tensor, nn

from sightloop.checkpoints.key_map import export_state_dict, load_weights
from sightloop.checkpoints.language import language_config, language_keys
from sightloop.checkpoints.seq2seq import bart_configs, bart_keys, t5_configs, t5_keys
from sightloop.errors import CheckpointError
from sightloop.nn.attention import attention_mask
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import generate
from sightloop.towers.text import LanguageModel, TextTower
from sightloop.types import Encoded
from tests.tiny_checkpoints.clip_and_blip import sharpen

LLAMA = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RAW = {"hidden_activation": "relu", "query_pre_attn_scalar": 3, "layer_types": None}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**LLAMA, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}),
    "llama-biased": ("Llama", {**LLAMA, "attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama-tied": ("Llama", {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": 4, "head_dim": 6}),
    "mistral-wide": ("Mistral", {**LLAMA, "sliding_window": None, "head_dim": 6}),
    "gemma": ("Gemma", {**LLAMA, "num_key_value_heads": 1, "head_dim": 8}),
    "gemma2": ("Gemma2", {**LLAMA, "head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 5}),
    # Settings of other kinds, which the reference does not read either.
    "llama-odd": ("Llama", {**LLAMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0, **RAW}),
    "mistral-odd": ("Mistral", {**LLAMA, "attention_bias": True, "mlp_bias": True, **RAW}),
    "opt": (
        "OPT",
        {
            "vocab_size": 50,
            "hidden_size": 24,
            "word_embed_proj_dim": 24,
            "ffn_dim": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 40,
        },
    ),
}
PAD, END = 0, 1


class Holder(nn.Module):
    """A network that holds the parts under the names that the key maps give them."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def reference(name: str, kind: str, **shape: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        **shape, pad_token_id=PAD, eos_token_id=END, bos_token_id=2, attn_implementation="eager"
    )
    torch.manual_seed(len(name))
    return sharpen(getattr(transformers, name)(config).eval())


def decoder(name: str) -> tuple[Any, LanguageModel]:
    kind, shape = DECODERS[name]
    theirs = reference(f"{kind}ForCausalLM", kind, **shape)
    config = language_config(theirs.config.to_dict())
    ours = Holder(language=LanguageModel(config))
    keys = language_keys(config, "language", "model", "lm_head")
    load_weights(ours, theirs.state_dict(), keys, source=name)
    back = export_state_dict(ours, keys)
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in back.items())
    assert set(theirs.state_dict()) - set(back) <= {"lm_head.weight"}
    return theirs, ours.eval().language  # pyright: ignore[reportReturnType]


def padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of random ids, padded in front, and where they are real."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (len(lengths), max(lengths)), generator=generator)
    real = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~real, PAD), real


@pytest.mark.parametrize("name", DECODERS)
@torch.inference_mode()
def test_decoders_read_as_the_reference_does(name: str) -> None:
    theirs, ours = decoder(name)
    ids, real = padded([9, 4, 1])
    wanted = theirs(input_ids=ids, attention_mask=real.long()).logits
    if "opt" not in name:  # on its own the reference counts padding; its generation does not
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        wanted = theirs(input_ids=ids, attention_mask=real.long(), position_ids=positions).logits
    states = ours.text.forward_embeddings(ours.text.embed_tokens(ids), valid_mask=real, causal=True)
    assert (ours.logits(states) - wanted)[real].abs().max() < 1e-4
    single = ours.text.forward_embeddings(ours.text.embed_tokens(ids[:1]), causal=True)
    assert (ours.logits(single) - wanted[:1]).abs().max() < 1e-4


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
@torch.inference_mode()
def test_decoders_write_as_the_reference_does(name: str, beams: int) -> None:
    theirs, ours = decoder(name)
    ids, real = padded([7, 3, 5, 1], seed=1)
    wanted = theirs.generate(
        input_ids=ids, attention_mask=real.long(), max_new_tokens=8, num_beams=beams, do_sample=False
    )[:, ids.shape[1] :]
    prefix = Encoded(ours.text.embed_tokens(ids), mask=real)
    options = Decoding(num_beams=beams, max_new_tokens=8)
    rows = generate(ours, prefix, ids[:, :0], options, end_id=END)
    assert [row.ids for row in rows] == [_texts(row) for row in wanted.tolist()]


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"repetition_penalty": 1.8}, {"repetition_penalty": 1.8}),
    ({"repetition_penalty": 0.6, "num_beams": 3}, {"repetition_penalty": 0.6, "num_beams": 3}),
    ({"no_repeat_ngram": 1}, {"no_repeat_ngram_size": 1}),
    ({"no_repeat_ngram": 2, "num_beams": 3}, {"no_repeat_ngram_size": 2, "num_beams": 3}),
    ({"end_ids": (7, *range(20, 30))}, {"eos_token_id": [7, *range(20, 30)]}),
    ({"end_ids": tuple(range(9, 24)), "num_beams": 3}, {"eos_token_id": [*range(9, 24)], "num_beams": 3}),
    ({"suppress_tokens": [*range(3, 30)]}, {"suppress_tokens": [*range(3, 30)]}),
    (
        {"begin_suppress_tokens": [*range(3, 40)], "num_beams": 2},
        {"begin_suppress_tokens": [*range(3, 40)], "num_beams": 2},
    ),
    *(
        (
            {"early_stopping": when, "num_beams": 3, "length_penalty": 2.0},
            {"early_stopping": when, "num_beams": 3, "length_penalty": 2.0},
        )
        for when in (False, True, "never")
    ),
]


@pytest.mark.parametrize(("mine", "asked"), OPTIONS)
@torch.inference_mode()
def test_rules_of_writing_know_the_prompt(mine: dict[str, Any], asked: dict[str, Any]) -> None:
    theirs, ours = decoder("llama-tied")
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(4))
    given: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, **asked}
    wanted = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)[:, 9:].tolist()
    prefix = Encoded(ours.text.embed_tokens(ids), mask=torch.ones_like(ids, dtype=torch.bool))
    options = Decoding(max_new_tokens=10, **mine)
    rows = generate(ours, prefix, ids, options, end_id=END, prefix_length=9)
    ends = options.end_ids or (END,)
    cut = [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in wanted]
    assert [row.ids[9:] for row in rows] == cut


def test_config_files_are_read_as_the_reference_reads_them() -> None:
    """What they leave out, and what their first forms say otherwise."""
    raw: list[tuple[str, dict[str, Any]]] = [
        ("gemma", {"hidden_act": "gelu"}),
        ("gemma", {"hidden_activation": "relu"}),
        ("gemma2", {"hidden_act": "relu"}),
        ("gemma2", {"layer_types": None, "sliding_window": 7}),
        ("llama", {"rope_theta": 500.0, "num_key_value_heads": None, "head_dim": None}),
        (
            "llama",
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "linear", "factor": 2}},
        ),
        ("mistral", {"sliding_window": None}),
        ("mistral", {}),
    ]
    for kind, given in raw:
        config = transformers.CONFIG_MAPPING[kind](**given)
        assert language_config({"model_type": kind, **given}) == language_config(config.to_dict()), (
            kind,
            given,
        )


@pytest.mark.parametrize(
    ("kind", "given", "named"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("gemma2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each type of layer"),
        ("llama", {"sliding_window": 9}, "sliding_window=9"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim"),
        ("qwen2", {}, "qwen2"),
    ],
)
def test_settings_that_are_not_known_are_named(kind: str, given: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        language_config({"model_type": kind, **given})


def _texts(row: list[int]) -> list[int]:
    return row[: row.index(END)] if END in row else row


T5 = {"vocab_size": 50, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_heads": 3}
T5 |= {"num_layers": 3, "num_decoder_layers": 3, "relative_attention_num_buckets": 8}
T5 |= {"relative_attention_max_distance": 12, "decoder_start_token_id": PAD}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", {**T5, "feed_forward_proj": "relu"}),
    "flan-t5": ("T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": (
        "Bart",
        {
            "vocab_size": 50,
            "d_model": 24,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 30,
            "decoder_ffn_dim": 40,
            "max_position_embeddings": 40,
            "decoder_start_token_id": END,
            "forced_eos_token_id": None,
        },
    ),
}


def seq2seq(name: str) -> tuple[Any, TextTower, LanguageModel]:
    kind, shape = SEQ2SEQ[name]
    theirs = reference(f"{kind}ForConditionalGeneration", kind, **shape)
    data, tensors = theirs.config.to_dict(), theirs.state_dict()
    if kind == "T5":
        encoder, config = t5_configs(
            data, tied=torch.equal(tensors["lm_head.weight"], tensors["shared.weight"])
        )
        keys = t5_keys("encoder", "decoder", "", gated=encoder.gated)
    else:
        encoder, config = bart_configs(data)
        keys = bart_keys("encoder", "decoder", "model", "lm_head", "final_logits_bias")
    ours = Holder(encoder=TextTower(encoder), decoder=LanguageModel(config))
    ours.encoder.word = ours.decoder.text.word  # pyright: ignore[reportAttributeAccessIssue]
    load_weights(ours, tensors, keys, ignore=[r"embed_tokens\.weight$"], source=name)
    return theirs, ours.eval().encoder, ours.decoder  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", SEQ2SEQ)
@torch.inference_mode()
def test_encoders_with_decoders(name: str) -> None:
    theirs, encoder, decoder = seq2seq(name)
    ids, real = padded([9, 4, 6])
    ids, real = ids.flip(1), real.flip(1)
    states = encoder.forward_embeddings(encoder.embed_tokens(ids), valid_mask=real)
    wanted = theirs.get_encoder()(input_ids=ids, attention_mask=real.long()).last_hidden_state
    assert (states - wanted)[real].abs().max() < 1e-4
    memory = Encoded(states, mask=real)
    start = torch.full((3, 1), theirs.config.decoder_start_token_id)
    for beams in (1, 3):
        given = {"input_ids": ids, "attention_mask": real.long(), "max_new_tokens": 8, "num_beams": beams}
        wanted = theirs.generate(**given, do_sample=False)[:, 1:]
        rows = generate(decoder, memory, start, Decoding(num_beams=beams, max_new_tokens=8), end_id=END)
        assert [row.ids[1:] for row in rows] == [_texts(row) for row in wanted.tolist()]
    texts = torch.randint(3, 50, (3, 6))
    read = decoder.text.forward_embeddings(
        decoder.text.embed_tokens(texts),
        causal=True,
        memory=decoder.text.memory(states),
        memory_mask=real[:, None, None, :],
    )
    wanted = theirs(input_ids=ids, attention_mask=real.long(), decoder_input_ids=texts).logits
    assert (decoder.logits(read) - wanted).abs().max() < 1e-4


def test_the_mask_rule() -> None:
    """Against the rule said in a loop: causal, prefix, window, padding."""
    generator = torch.Generator().manual_seed(3)
    real = torch.rand(4, 9, generator=generator) > 0.3
    whole = torch.arange(9) < torch.tensor([0, 3, 9, 5])[:, None]
    for window in (0, 1, 4):
        for start in (0, 4, 8):
            seen = attention_mask(real, prefix_mask=whole, window=window, start=start)
            for row in range(4):
                for i in range(start, 9):
                    for j in range(9):
                        allowed = j <= i and (not window or i - j < window)
                        allowed = allowed or bool(whole[row, i] and whole[row, j])
                        allowed = allowed and (bool(real[row, j]) or i == j)
                        assert bool(seen[row, 0, i - start, j]) == allowed
