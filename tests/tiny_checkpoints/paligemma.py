"""Small random PaliGemma checkpoints, written by `transformers` as the hub has them, their processors included."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.tiny_checkpoints.clip_and_blip import BYTES, LETTERS, merged_words, sharpen

PLACES = [*(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128))]
SIDE, PATCH, END = 8, 4, 1


def gemma_tokenizer(*, places: bool = False, bos: bool = True) -> Any:
    """Special tokens, bytes, letters, merges that make words with a space in front. places: words of places are pieces
    already, as in the hub's files; bos: rows begin with one, as there."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, "\n", "▁", *LETTERS]
    merges = merged_words(vocab)
    vocab += PLACES if places else []
    return GemmaTokenizer(
        vocab={piece: i for i, piece in enumerate(vocab)},
        merges=merges,
        add_bos_token=bos,
        padding_side="left",
    )


def reference(
    second: bool, *, vocab: int = 90, image: int = 85, head: bool = False, kv: int = 1, **given: Any
) -> Any:
    """A random model; second: of PaliGemma 2. given: what the config of its Gemma takes."""
    torch.manual_seed(3)
    vision = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=head,
    )
    words = {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    words |= {"num_attention_heads": 4, "num_key_value_heads": kv, "head_dim": 8, "pad_token_id": 0}
    words |= {"eos_token_id": END, "bos_token_id": 2}
    text = (Gemma2Config if second else GemmaConfig)(**words, **given)
    config = PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=image, projection_dim=32, hidden_size=32
    )
    return sharpen(PaliGemmaForConditionalGeneration(config).eval())


def write_paligemma(folder: Path, *, places: bool = False, second: bool = False) -> tuple[Any, Any]:
    """A checkpoint with its processor in `folder`; the reference's model and processor. places: its tokenizer has the
    words of places among its pieces, and is stored as it is before any processor changed it, as at the hub."""
    tokenizer = gemma_tokenizer(places=places)
    images: Any = SiglipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_seq_length=(SIDE // PATCH) ** 2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if places:
            tokenizer.save_pretrained(folder)
        processor = PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)
        image = tokenizer.convert_tokens_to_ids("<image>")
        model = reference(second, vocab=image if places else len(tokenizer), image=image, kv=2)
        model.save_pretrained(folder)
        if places:
            images.save_pretrained(folder)
        else:
            processor.save_pretrained(folder)
    return model, processor


def describe(folder: Path) -> dict[str, Any]:
    """config.json."""
    return json.loads((folder / "config.json").read_text())
