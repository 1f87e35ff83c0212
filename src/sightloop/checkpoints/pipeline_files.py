"""Files of a checkpoint whose parts have folders, as `diffusers` writes it: which parts, and which of their files."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import cast

from sightloop.errors import CheckpointError
from sightloop.types import JsonMapping

PIPELINE_FILE = "model_index.json"
# Pipeline -> its parts with weights and the class of each.
_ENCODER = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
PIPELINES: Mapping[str, Mapping[str, str]] = {
    "StableDiffusionPipeline": _ENCODER,
    "StableDiffusionImg2ImgPipeline": _ENCODER,
    "StableDiffusionXLPipeline": _ENCODER | {"text_encoder_2": "CLIPTextModelWithProjection"},
}
# Variants of weights, the plain ones first; a name that `diffusers` gives, with and without shards.
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>fp16|bf16))?\.safetensors(?:\.index(?:\.(?P<late>fp16|bf16))?\.json)?"
)
_VARIANTS = (None, "fp16", "bf16")


def parts_of(index: JsonMapping, name: str) -> list[str]:
    """Folders of a checkpoint's weights, by its model_index.json.

    Raises:
        CheckpointError: a pipeline of another kind, or a part that is missing or of another class.
    """
    kind = index.get("_class_name")
    parts = PIPELINES.get(str(kind))
    if parts is None:
        raise CheckpointError(
            f"{name}/{PIPELINE_FILE}: {kind} is not supported; Stable Diffusion 1, 2 and XL are (such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5)"
        )
    for part, wanted in parts.items():
        entry = index.get(part)
        own = cast("list[object]", entry)[-1] if isinstance(entry, list) and entry else None
        if own != wanted:
            raise CheckpointError(
                f"{name}/{PIPELINE_FILE}: {part} is {own or 'missing'}, must be {wanted}; take a checkpoint that "
                "draws from texts alone"
            )
    return list(parts)


def tokenizers_of(index: JsonMapping) -> list[str]:
    """Folders of its tokenizers."""
    return [part.replace("text_encoder", "tokenizer") for part in parts_of(index, "") if "text" in part]


def choose_part_weights(names: Collection[str], where: str) -> str:
    """The weights, or their index, among the file names of a part's folder: float32 first, else a variant.

    Raises:
        CheckpointError: there are none, or only pickles.
    """
    matches = {name: match for name in names if (match := _WEIGHTS.fullmatch(name))}
    for variant in _VARIANTS:
        chosen = [name for name, match in matches.items() if (match["variant"] or match["late"]) == variant]
        if chosen:
            return min(chosen, key=lambda name: name.endswith(".json"))
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".msgpack")))
    if pickles:
        raise CheckpointError(
            f"{where}: has its weights as {pickles[0]}, which is not read; only safetensors are. Download the "
            "checkpoint's .safetensors files, or save it again with safe_serialization=True"
        )
    raise CheckpointError(
        f"{where}: has no weights (diffusion_pytorch_model.safetensors or model.safetensors); put the checkpoint's "
        "own there"
    )


def files_to_fetch(names: Collection[str], index: JsonMapping, where: str) -> Iterator[str]:
    """Of a repository's files, those that are read: one copy of each part's weights, configs and tokenizers."""
    parts = parts_of(index, where)
    yield PIPELINE_FILE
    yield "scheduler/scheduler_config.json"
    for part in parts:
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        chosen = choose_part_weights(inside, f"{where}/{part}")
        yield from (f"{part}/config.json", f"{part}/{chosen}")
        if chosen.endswith(".json"):
            variant = next((v for v in ("fp16", "bf16") if f".{v}" in chosen), "")
            mark = rf"(?:\.{variant})?" if variant else ""
            shards = re.compile(rf"\w+{mark}-\d+-of-\d+{mark}\.safetensors")
            yield from (f"{part}/{name}" for name in inside if shards.fullmatch(name))
    for folder in tokenizers_of(index):
        yield from (
            name for name in names if name.startswith(f"{folder}/") and "/" not in name[len(folder) + 1 :]
        )
