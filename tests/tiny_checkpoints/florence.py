"""Small random Florence-2 checkpoints, written by `transformers` as the hub has them, and in the original layout."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    BartTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sightloop.tasks.region_parser import IGNORED_PHRASES
from tests.tiny_checkpoints.clip_and_blip import WORDS, sharpen

TAGS = ["<od>", "</od>", "<ocr>", "</ocr>"]
MORE_TAGS = (
    "<cap> </cap> <ncap> </ncap> <dcap> </dcap> <grounding> </grounding> <seg> </seg> <sep> <region_cap> "
)
MORE_TAGS += (
    "</region_cap> <region_to_desciption> </region_to_desciption> <proposal> </proposal> <poly> </poly> <and>"
)
KINDS = "ocr pure_text description_with_bboxes description_with_polygons polygons bboxes".split()
KINDS += ["description_with_bboxes_or_polygons"]
# Their name inside a layer -> that of the original.
ORIGINAL = {
    "conv1": "conv1.fn.dw",
    "conv2": "conv2.fn.dw",
    "norm1": "{}_attn.norm",
    "norm2": "ffn.norm",
    "ffn.fc1": "ffn.fn.net.fc1",
    "ffn.fc2": "ffn.fn.net.fc2",
    "window_attn.qkv": "window_attn.fn.qkv",
    "window_attn.proj": "window_attn.fn.proj",
    "channel_attn.qkv": "channel_attn.fn.qkv",
    "channel_attn.proj": "channel_attn.fn.proj",
}


def bart_tokenizer(places: int = 1000) -> Any:
    """The reference's tokenizer: single bytes, merges that make the words, spaces in front; places and tags after."""
    vocab = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values()]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = "Ġ"
        for letter in word:
            if left + letter not in vocab:
                vocab.append(left + letter)
                merges.append((left, letter))
            left += letter
    vocab.append("<mask>")
    extra = [*TAGS, *(f"<loc_{i}>" for i in range(places)), *MORE_TAGS.split()]
    tokenizer = BartTokenizer(vocab={word: i for i, word in enumerate(vocab)}, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    return tokenizer


def write_florence(folder: Path, *, side: int = 64, seed: int = 0, places: int = 1000, **shape: Any) -> Any:
    """A random Florence-2 in `folder`; shape: vision, text (dicts over the small default config), generation,
    tied (the head)."""
    tokenizer = bart_tokenizer(places)
    tokenizer.add_tokens(AddedToken("<image>", special=True, normalized=False), special_tokens=True)
    tokenizer._set_model_specific_special_tokens({"image_token": "<image>"})
    vision = {
        "embed_dim": [8, 16, 24, 32],
        "num_heads": [2, 2, 3, 4],
        "num_groups": [2, 4, 3, 8],
        "depths": [1, 1, 2, 1],
        "window_size": 3,
        **shape.get("vision", {}),
    }
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 3,
        "encoder_ffn_dim": 30,
        "decoder_ffn_dim": 40,
        "max_position_embeddings": 200,
        **shape.get("text", {}),
    }
    config = Florence2Config(
        vision_config={**vision, "projection_dim": text["d_model"]},
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=shape.get("tied", True),
    )
    torch.manual_seed(seed)
    model = sharpen(Florence2ForConditionalGeneration(config).eval())
    for name, value in shape.get("generation", {}).items():
        setattr(model.generation_config, name, value)
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side}, do_center_crop=False, resample=3, do_convert_rgb=True
    )
    images.image_seq_length = (-(-side // 32)) ** 2 + 1
    processor = Florence2Processor(
        images,
        tokenizer,
        post_processor_config={kind: {} for kind in KINDS}
        | {"phrase_grounding": {"banned_grounding_tokens": sorted(IGNORED_PHRASES)}},
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model.reference_processor = processor
    return model


def write_original(source: Path, folder: Path) -> None:
    """A checkpoint of `write_florence` as microsoft/Florence-2-* has its files: other names, a bare BART tokenizer."""
    tensors = load_file(source / "model.safetensors")
    renamed: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        if match := re.match(r"model\.(vision_tower\.blocks\.\d+\.\d+\.(\w+)_block)\.(.+)\.(\w+)$", name):
            block, kind, inner, leaf = match.groups()
            mixer = "window" if kind == "spatial" else "channel"
            renamed[f"{block}.{ORIGINAL[inner].format(mixer)}.{leaf}"] = value
        elif name.startswith("model.vision_tower."):
            renamed[name.removeprefix("model.").replace(".conv.", ".proj.")] = value
        elif name.startswith("model.language_model."):
            renamed[name.replace("model.language_model.", "language_model.model.")] = value
        else:
            inner = name.removeprefix("model.multi_modal_projector.")
            renamed[inner.replace("image_position_embed", "image_pos_embed")] = value
    renamed["image_projection"] = renamed.pop("image_projection.weight").t().contiguous()
    words = renamed["language_model.model.shared.weight"][
        :-1
    ].clone()  # the original has no token for pictures
    for name in ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
        renamed[f"language_model.{name}.weight"] = words.clone()
    renamed["language_model.final_logits_bias"] = torch.zeros(1, words.shape[0])
    folder.mkdir()
    save_file(renamed, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    vision["model_type"], vision["dim_embed"] = "davit", vision.pop("embed_dim")
    vision["image_pos_embed"] = {
        "type": "learned_abs_2d",
        "max_pos_embeddings": vision.pop("max_position_embeddings"),
    }
    temporal = {"type": "COSINE", "max_temporal_embeddings": vision.pop("max_temporal_embeddings")}
    vision["visual_temporal_embedding"] = temporal
    vision["image_feature_source"] = ["spatial_avg_pool", "temporal_avg_pool"]
    text["vocab_size"] -= 1
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "image_token_id"})
    )
    shutil.copy(source / "generation_config.json", folder)
    images = json.loads((source / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    bare = bart_tokenizer()._tokenizer.to_str()
    whole = json.loads(bare)
    whole["added_tokens"] = [t for t in whole["added_tokens"] if t["content"] not in _ADDED]
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')


_ADDED = {*TAGS, *(f"<loc_{i}>" for i in range(1000)), *MORE_TAGS.split()}
