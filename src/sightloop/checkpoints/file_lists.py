"""Names of the files of a checkpoint: what is read with the weights, and what each known checkpoint consists of."""

from __future__ import annotations

from sightloop.checkpoints.catalog import CatalogEntry
from sightloop.checkpoints.pipeline_files import PIPELINE_FILE

TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "bpe_simple_vocab_16e6.txt.gz",
        "spiece.model",
        "tokenizer.model",
    }
)
PROCESSOR_FILES = frozenset({"preprocessor_config.json", "processor_config.json", "open_clip_config.json"})
# All that `load` reads with the weights; nothing else is fetched from a repository.
SMALL_FILES = (
    TOKENIZER_FILES
    | PROCESSOR_FILES
    | {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "merges.txt",
        "chat_template.json",
        "chat_template.jinja",
        "vae-oid.npz",  # `mask_decoder.MASK_DECODER_FILE`
    }
)

# Family -> the files of its published checkpoints beside config.json, preprocessor_config.json and the weights.
_BESIDE = {
    "clip": ("tokenizer.json", "tokenizer_config.json"),
    "siglip": ("spiece.model", "tokenizer_config.json"),
    "siglip2": ("tokenizer.json", "tokenizer_config.json"),
    "blip": ("tokenizer.json", "tokenizer_config.json"),
    "blip2": ("tokenizer.json", "tokenizer_config.json"),
    "florence": ("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
    "llava": ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.json"),
    "paligemma": ("tokenizer.json", "tokenizer_config.json", "generation_config.json"),
}


def expected_files(entry: CatalogEntry | None) -> tuple[str, ...]:
    """Files that a checkpoint of the hub consists of, the weights last.

    Args:
        entry: of the catalog; None for one that is not known, which gets the names that most have.
    """
    if entry is not None and entry.layout == "open_clip":
        return "open_clip_config.json", "tokenizer.json", "open_clip_model.safetensors"
    if entry is not None and entry.layout == "diffusers":
        parts = ("scheduler", "tokenizer", "text_encoder", "unet", "vae")
        return PIPELINE_FILE, *(f"{part}/" for part in parts), "the safetensors in them"
    family = "clip" if entry is None else "siglip2" if "siglip2" in entry.name else entry.family
    return "config.json", "preprocessor_config.json", *_BESIDE[family], "model.safetensors"
