"""Small random checkpoints, written by `transformers` as the hub has them: the reference that tests compare with.

Weights are drawn larger than at initialisation, so that attention and next-token choices are not near ties.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import BertTokenizerFast, BlipConfig, CLIPConfig, CLIPTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.blip.modeling_blip import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel

WORDS = (
    "a an the two three red blue green white black small large old young dog cat man woman boy girl tree car house "
    "street beach ball hat is are in on with of and what how many colour where photo picture standing sitting running"
).split()
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789?.,!'-"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def merged_words(vocab: list[str]) -> list[tuple[str, str]]:
    """The merges that make WORDS of single letters, a space in front; `vocab` gets what they make."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "▁"
        for letter in word:
            if left + letter not in vocab:
                vocab.append(left + letter)
                merges.append((left, letter))
            left += letter
    return merges


def bert_words() -> list[str]:
    """A WordPiece vocabulary in which every ASCII text can be written."""
    return list(dict.fromkeys([*SPECIALS, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]))


def bert_tokenizer(folder: Path) -> Any:
    """The reference BERT tokenizer over `bert_words`, as BLIP's checkpoints have it."""
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "vocab.txt"
    words.write_text("\n".join(bert_words()) + "\n", "utf-8")
    return BertTokenizerFast.from_pretrained(folder)


def clip_tokenizer(folder: Path) -> Any:
    """The reference CLIP tokenizer with single bytes and a few merges as vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [
        ("t", "h"),
        ("th", "e</w>"),
        ("a", "n"),
        ("d", "o"),
        ("do", "g</w>"),
        ("c", "a"),
        ("ca", "t</w>"),
    ]
    vocab = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizerFast(vocab={word: i for i, word in enumerate(vocab)}, merges=merges)


def write_clip(folder: Path, *, seed: int = 0, **shape: Any) -> CLIPModel:
    """A random CLIP in `folder`; shape: vision, text (dicts over the small default config), projection_dim."""
    tokenizer = clip_tokenizer(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    text = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 48}
    config = CLIPConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8, **shape.get("vision", {})},
        text_config={**text, "vocab_size": len(tokenizer), **ids, **shape.get("text", {})},
        projection_dim=shape.get("projection_dim", 20),
    )
    torch.manual_seed(seed)
    model = sharpen(CLIPModel(config).eval())
    side = config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return save_checkpoint(folder, model, tokenizer, processor)


BLIP_HEADS = {
    "caption": BlipForConditionalGeneration,
    "answer": BlipForQuestionAnswering,
    "match": BlipForImageTextRetrieval,
}


def write_blip(folder: Path, *, head: str = "caption", seed: int = 0, **shape: Any) -> Any:
    """A random BLIP in `folder`; head: caption, answer or match; shape: vision, text, image_text_hidden_size."""
    tokenizer = bert_tokenizer(folder)
    count = len(tokenizer)
    ids = {
        "bos_token_id": count,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    vision = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 64}
    text = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
    tied = shape.get("tie_word_embeddings", True)
    config = BlipConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 8, **shape.get("vision", {})},
        text_config={
            **text,
            "vocab_size": count + 2,
            "max_position_embeddings": 64,
            **ids,
            "tie_word_embeddings": tied,
            **shape.get("text", {}),
        },
        image_text_hidden_size=shape.get("image_text_hidden_size", 16),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = sharpen(BLIP_HEADS[head](config).eval())
    side = config.vision_config.image_size
    return save_checkpoint(
        folder, model, tokenizer, BlipImageProcessorPil(size={"height": side, "width": side})
    )


def sharpen(model: Any) -> Any:
    """Weights large enough that near ties are rare, drawn from torch's generator."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 2.0 / parameter.shape[-1] ** 0.5 if "embed" not in name else 0.5)
            elif "orm" not in name and parameter.dim() == 1:
                parameter.normal_(0, 0.1)
    return model


def save_checkpoint(folder: Path, model: Any, tokenizer: Any, processor: Any) -> Any:
    """Write all three; the model remembers the others."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.reference_tokenizer = tokenizer
    model.reference_processor = processor
    return model
