"""Small random BLIP-2s, written by `transformers` as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from tests.checkpoints import sharpen

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
