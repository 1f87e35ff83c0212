"""Small random BLIP-2s, written by `transformers` as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    GPT2Tokenizer,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from tests.tiny_checkpoints.clip_and_blip import sharpen

VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
QFORMER = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 2}
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 90,
}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3}
T5 |= {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "tie_word_embeddings": False}
T5 |= {"decoder_start_token_id": 0, "bos_token_id": 1}


def blip2_config(text: dict[str, Any], *, words: int, **shape: Any) -> Blip2Config:
    """shape: vision, qformer, language (dicts over the small ones here), queries, width; the last word is <image>."""
    return Blip2Config(
        vision_config={**VISION, "image_size": 28, "patch_size": 14, **shape.get("vision", {})},
        qformer_config={**QFORMER, "max_position_embeddings": 64, **shape.get("qformer", {})},
        text_config={**text, "vocab_size": words, **shape.get("language", {})},
        num_query_tokens=shape.get("queries", 4),
        image_text_hidden_size=shape.get("width", 10),
        image_token_index=words - 1,
    )


def write_writer(folder: Path, text: dict[str, Any], *, words: int = 60, seed: int = 0, **shape: Any) -> Any:
    """A random BLIP-2 of stage 2 in `folder`; text: OPT or T5."""
    torch.manual_seed(seed)
    model = Blip2ForConditionalGeneration(blip2_config(text, words=words, **shape)).eval()
    sharpen(model)
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    return model


def write_judge(folder: Path, *, words: int = 60, seed: int = 0, **shape: Any) -> Any:
    """A random BLIP-2 of stage 1 in `folder`."""
    qformer = {"use_qformer_text_input": True, "vocab_size": words, **shape.pop("qformer", {})}
    torch.manual_seed(seed)
    config = blip2_config(OPT, words=words, qformer=qformer, **shape)
    config.image_token_index = None
    model = Blip2ForImageTextRetrieval(config).eval()
    sharpen(model)
    model.query_tokens.data.normal_()
    model.save_pretrained(folder)
    return model


def opt_tokenizer() -> Any:
    """GPT-2's kind as OPT has it: bytes and a few merges; a first token, which is also the last."""
    letters = list(bytes_to_unicode().values())
    merges = [("Ġ", "a"), ("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("d", "o"), ("do", "g"), ("Q", "u")]
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters, *("".join(pair) for pair in merges)]
    return GPT2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        add_bos_token=True,
    )


def t5_tokenizer() -> Any:
    """SentencePiece's Unigram as T5 has it: every ASCII letter and some words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [
        (f"▁{word}", -3.0 - i / 9) for i, word in enumerate(["a", "the", "dog", "Question", "of", "photo"])
    ]
    pieces += [(letter, -6.0 - i / 99) for i, letter in enumerate(map(chr, range(33, 127)))]
    return T5Tokenizer(vocab=pieces, extra_ids=3)


def write_processor(folder: Path, model: Any, tokenizer: Any) -> Any:
    """The reference's processor for a model, saved beside it."""
    side = model.config.vision_config.image_size
    pictures = BlipImageProcessorPil(size={"height": side, "width": side})
    processor = Blip2Processor(pictures, tokenizer, num_query_tokens=model.config.num_query_tokens)
    processor.save_pretrained(folder)
    return processor
