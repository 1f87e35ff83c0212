"""Small random SigLIP checkpoints, written by `transformers` as the hub has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Siglip2Config, Siglip2Model, Siglip2Tokenizer, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from tests.tiny_checkpoints.clip_and_blip import BYTES, LETTERS, merged_words, save_checkpoint, sharpen


def gemma_tokenizer(**settings: Any) -> Any:
    """The reference's SigLIP 2 tokenizer: single letters, bytes, and merges that make the words, spaces in front."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *BYTES, "▁", *LETTERS]
    merges = merged_words(vocab)
    settings = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"} | settings
    return Siglip2Tokenizer(vocab={word: i for i, word in enumerate(vocab)}, merges=merges, **settings)


def write_siglip(
    folder: Path,
    *,
    kind: Literal["fixed", "naflex"] = "fixed",
    seed: int = 0,
    tokenizer: Any = None,
    **shape: Any,
) -> Any:
    """A random SigLIP in `folder`; shape: vision, text (dicts over the small default config), tokenizer."""
    tokenizer = tokenizer or gemma_tokenizer()
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 50}
    vision = {**small, "patch_size": 8, **shape.get("vision", {})}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 24, **shape.get("text", {})}
    torch.manual_seed(seed)
    if kind == "fixed":
        vision = {"image_size": 32, **vision}
        side = vision["image_size"]
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        processor: Any = SiglipImageProcessorPil(size={"height": side, "width": side})
    else:
        vision = {"num_patches": 16, **vision}
        most = shape.get("most", vision["num_patches"])
        model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
        processor = Siglip2ImageProcessorPil(patch_size=vision["patch_size"], max_num_patches=most)
    return save_checkpoint(folder, sharpen(model.eval()), tokenizer, processor)
