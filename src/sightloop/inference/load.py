"""`load`: the one place where files, networks, tokenizers and preprocessing are tied together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sightloop.checkpoints.catalog import BUNDLED
from sightloop.checkpoints.hub import CheckpointFiles, locate, read_json
from sightloop.checkpoints.layout import Family, WeightHook
from sightloop.checkpoints.mask_decoder import MASK_DECODER_FILE, load_mask_decoder
from sightloop.checkpoints.registry import FAMILIES, as_tuples, build_network, config_from_dict, recognize
from sightloop.checkpoints.tensors import read_tensors
from sightloop.data.images.processor_config import spec_from_open_clip, spec_from_transformers
from sightloop.data.text.bart import load_bart
from sightloop.data.text.sentencepiece import load_sentencepiece
from sightloop.data.text.tokenizer import (
    Tokenizer,
    bert_tokenizer_from_vocab,
    clip_tokenizer_from_bpe,
    load_tokenizer,
)
from sightloop.errors import CheckpointError, UsageError
from sightloop.inference.generation_config import decoding_defaults
from sightloop.inference.malloc import give_back_freed_memory
from sightloop.inference.model import Model
from sightloop.inference.prompting import IMAGE_PLACEHOLDER
from sightloop.inference.save import FORMAT
from sightloop.models.paligemma import MaskDecoder
from sightloop.nn.prepack import pack, pack_hook
from sightloop.nn.quantize import quantize_hook
from sightloop.types import Bits, ImageSpec, JsonDict, JsonMapping

NO_LIMIT = 1 << 20  # tokens in a text, for towers that could go on for ever
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    source: str | PathLike[str] = BUNDLED,
    *,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    quantize: Bits | None = None,
    masks: str | PathLike[str] | None = None,
) -> Model:
    """Load a checkpoint: a local folder, a weights file, or a hub id such as `Salesforce/blip-image-captioning-base`.

    Without a source: `nano`, the small model that comes with the package. The hub is asked only for what is not on
    this machine. device: "auto" (a GPU where there is one), "cpu", "cuda",
    "cuda:1", "mps". dtype: of the weights and activations; results are float32 always. quantize: "int8" or "int4",
    the weights of a language model in so few bits, made while they are read (`nn.quantize` says the error).
    masks: the published `vae-oid.npz` that PaliGemma needs to segment, where it is not beside the checkpoint's files.

    Raises CheckpointError that names the files or tensors that are missing, unknown or misshapen, TokenizerError for
    tokenizer files, UsageError for a wrong device or dtype.
    """
    where, kind = _device(device), _dtype(dtype)
    located = locate(source)
    config = located.config or {}
    taking = weight_hook_for(quantize, where)
    with give_back_freed_memory():
        tensors = read_tensors(located.weights, kind)
        load_network = _load_own if config.get("format") == FORMAT else _load_foreign
        family, network, spec = load_network(located, config, tensors, taking)
        tokenizer = _tokenizer(located, family, network.config)
        if where.type == "cpu":
            pack(network)
        else:
            _move(network, where)
    return Model(
        masks=_masks(located, network, masks),
        name=located.name,
        network=network,
        family=family.name,
        tokenizer=tokenizer,
        image_spec=spec,
        device=where,
        dtype=kind,
        batch_size=8 if where.type == "cpu" else 32,
        decoding=config.get("decoding", {})
        if config.get("format") == FORMAT
        else _decoding(located, family, network.config),
    )


def weight_hook_for(quantize: Bits | None, device: torch.device) -> WeightHook:
    """What puts weights where they are multiplied from as soon as they are read: in few bits, packed for a CPU."""

    def taking(network: nn.Module) -> Callable[[str, Tensor], bool]:
        takers = [] if quantize is None else [quantize_hook(network, quantize, device)]
        if device.type == "cpu":
            takers.append(pack_hook(network))
        return lambda name, weight: any(take(name, weight) for take in takers)

    return taking


def _move(network: nn.Module, device: torch.device) -> None:
    """`network.to(device)`, also where weights in few bits have left parameters without memory."""
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.is_meta:
                parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _load_own(
    located: CheckpointFiles,
    config: JsonMapping,
    tensors: Mapping[str, Tensor],
    taking: WeightHook | None,
) -> tuple[Family, Any, ImageSpec]:
    try:
        family = FAMILIES[config["family"]]
        settings = config_from_dict(family.config, config["config"], family.towers)
        spec = ImageSpec(**{key: as_tuples(value) for key, value in config["image"].items()})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{located.name}: config.json is not one that this version wrote ({error!r})"
        ) from error
    return (
        family,
        build_network(family, settings, tensors, None, source=located.name, weight_hook=taking),
        spec,
    )


def _load_foreign(
    located: CheckpointFiles,
    config: JsonMapping,
    tensors: Mapping[str, Tensor],
    taking: WeightHook | None,
) -> tuple[Family, Any, ImageSpec]:
    family, name = recognize(tensors, located.name)
    layout = family.layouts[name]
    tensors = layout.prepare(tensors)
    open_clip = _json(located.folder / "open_clip_config.json")
    described = (
        open_clip.get("model_cfg", {}) if name == "open_clip" else {**config, **_beside(located.folder)}
    )
    if name == "transformers" and not described:
        raise CheckpointError(
            f"{located.name}: config.json is missing; put the checkpoint's own beside its weights"
        )
    if any(part.get("is_causal") is False for part in (config, *config.values()) if isinstance(part, dict)):
        raise CheckpointError(f"{located.name}: config.json: is_causal=False is not supported")
    try:
        settings = layout.configure(described, tensors)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{located.name}: its config cannot be understood ({error!r})") from error
    network = build_network(family, settings, tensors, layout, source=located.name, weight_hook=taking)
    side = settings.vision.image_size
    if name == "open_clip" and open_clip:
        spec = spec_from_open_clip(open_clip.get("preprocess_cfg", {}), side)
    else:
        # Since transformers 5 the processors of images and text are saved in one file, which then comes first.
        both = _json(located.folder / "processor_config.json").get("image_processor")
        described = both or _json(located.folder / "preprocessor_config.json")
        spec = spec_from_transformers(described or family.default_image(settings))
    _check_size(spec, settings, located.name)
    return family, network, spec


def _beside(folder: Path) -> JsonDict:
    """What a network has to know of its processor's files. `chat_template`: its text, which is compared, never run;
    `ignored_phrases`: the phrases that stand for no thing (Florence-2)."""
    processor, found = _json(folder / "processor_config.json"), JsonDict()
    if isinstance(rules := processor.get("post_processor_config"), dict):
        banned = (rules.get("phrase_grounding") or {}).get("banned_grounding_tokens") or ()
        found["ignored_phrases"] = tuple(str(phrase) for phrase in banned)
    template = folder / "chat_template.jinja"
    if template.is_file():
        return found | {"chat_template": template.read_text("utf-8", "replace")}
    texts = [file.get("chat_template") for file in (_json(folder / "chat_template.json"), processor)]
    return found | next(({"chat_template": text} for text in texts if isinstance(text, str)), {})


def _check_size(spec: ImageSpec, config: Any, name: str) -> None:
    vision = config.vision
    side, patch = vision.image_size, vision.patch
    if not side and (spec.crop or spec.resize):
        return
    if spec.tiles != getattr(config, "tiles", ()):
        raise CheckpointError(
            f"{name}: the model and its processor config differ in image_grid_pinpoints; put the checkpoint's own "
            "preprocessor_config.json beside its weights"
        )
    if spec.patches and vision.any_size and spec.patches[0] == patch:
        return
    if (made := spec.crop or spec.resize) != (side, side):
        raise CheckpointError(
            f"{name}: the model takes images of {side} x {side} pixels, but its processor config makes them "
            f"{made[0]} x {made[1]}"
            if made
            else f"{name}: its processor config gives images no fixed size, or patches of another"
        )


def _decoding(located: CheckpointFiles, family: Family, config: Any) -> JsonDict:
    """How it writes where nobody says, of families whose reference reads it."""
    said = _json(located.folder / "generation_config.json")
    if not family.generation:
        return {}
    return decoding_defaults(said, located.config or {}, end_id=config.end_id, start_ids=config.start_ids)


def _tokenizer(located: CheckpointFiles, family: Family, config: Any) -> Tokenizer:
    """From the files beside the weights; the families' original vocabulary files serve where there are no others."""
    folder, most = located.folder, config.text.positions
    kind = family.tokenizer_of(config)
    if kind == "gemma":
        return load_sentencepiece(
            folder, max_length=NO_LIMIT, extra_special_token=IMAGE_PLACEHOLDER, location_tokens=True
        )
    if kind in ("language", "llama"):
        usual = "LlamaTokenizer" if kind == "llama" else ""
        return load_sentencepiece(
            folder, max_length=most or NO_LIMIT, extra_special_token=IMAGE_PLACEHOLDER, default_class=usual
        )
    if kind == "pieces":
        about = _json(folder / "open_clip_config.json").get("model_cfg", {}).get("text_cfg", {})
        cleaning = about.get("tokenizer_kwargs", {}).get("clean", "whitespace") if about else None
        # The hub names Gemma's tokenizer for NaFlex; the reference makes that SigLIP 2's own.
        return load_sentencepiece(
            folder,
            max_length=most,
            pad_to_max_length=True,
            lowercase=config.vision.any_size,
            cleaning=cleaning,
        )
    if kind == "bart":
        return load_bart(folder, max_length=most)
    whole = (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file()
    words, pairs = folder / "vocab.txt", folder / "bpe_simple_vocab_16e6.txt.gz"
    if kind == "bert" and not whole and words.is_file():
        return bert_tokenizer_from_vocab(words, max_length=most)
    if kind == "clip" and not (folder / "vocab.json").is_file() and not whole and pairs.is_file():
        return clip_tokenizer_from_bpe(pairs, max_length=most)
    return load_tokenizer(folder, kind=kind, max_length=most)


def _masks(located: CheckpointFiles, network: Any, named: str | PathLike[str] | None) -> MaskDecoder | None:
    path = located.folder / MASK_DECODER_FILE if named is None else Path(named)
    wanted = "segments" in getattr(network, "region_formats", {}).values()
    return load_mask_decoder(path) if wanted and (named is not None or path.is_file()) else None


def _json(path: Path) -> JsonDict:
    return read_json(path) if path.is_file() else {}


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f'device="{name}": not on this machine; use "auto", "cpu", "cuda" or "mps"'
        ) from error
    return device


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UsageError(f'dtype="{name}": must be one of {", ".join(_DTYPES)}')
    return _DTYPES[name]
