"""Loader of checkpoints: network, tokenizer, preprocessing and decoding defaults of one source as a `Model`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sightloop.checkpoints.catalog import BUNDLED
from sightloop.checkpoints.hub import PIPELINE_FILE, CheckpointFiles, locate, read_json
from sightloop.checkpoints.lora import load_lora
from sightloop.checkpoints.mask_decoder import MASK_DECODER_FILE, load_mask_decoder
from sightloop.checkpoints.registry import (
    FAMILIES,
    Family,
    WeightHook,
    as_tuples,
    build_network,
    check_config,
    config_from_dict,
    read_checkpoint,
    recognize,
    unwrap,
)
from sightloop.data.images.processor_config import spec_from_open_clip, spec_from_transformers
from sightloop.data.text.load import load_tokenizer_of_kind
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import CheckpointError, SightloopError, UsageError
from sightloop.inference.drawing_files import drawing_folder as drawing_folder
from sightloop.inference.drawing_files import write_grid as write_grid
from sightloop.inference.generation_config import decoding_defaults
from sightloop.inference.judges import Judges
from sightloop.inference.kernel_cache import time_kernels
from sightloop.inference.malloc import give_back_freed_memory, keep_between_batches, keep_small_tensors
from sightloop.inference.model import Model
from sightloop.inference.precision import auto_dtype, auto_gain, auto_quantize
from sightloop.inference.sample_rank import judge_signals as judge_signals
from sightloop.inference.save import FORMAT
from sightloop.models.paligemma import MaskDecoder
from sightloop.nn.lora import merge_lora
from sightloop.nn.prepack import pack, pack_hook
from sightloop.nn.quantize import quantize_hook, quantize_shared, quantized_names
from sightloop.protocols import Network, RegionNetwork, ScheduledNetwork, require
from sightloop.types import Bits, ImageSpec, JsonDict, JsonMapping

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Parts(NamedTuple):
    """A checkpoint's family, network and preprocessing; `layout`: a key of the family's layouts, "" for our own."""

    family: Family
    network: nn.Module
    spec: ImageSpec
    layout: str


def load(
    source: str | PathLike[str] = BUNDLED,
    *,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    quantize: Bits | None = None,
    masks: str | PathLike[str] | None = None,
    lora: str | PathLike[str] | None = None,
) -> Model:
    """Loads a checkpoint.

    Args:
        source: a folder, a weights file, or a hub id such as `Salesforce/blip-image-captioning-base`, whose files are
            downloaded if they are not on this machine; left out: `nano`, the small model of the package.
        device: "auto" (CUDA if there is any, else MPS, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        dtype: of weights and activations; results are always float32. "auto": the lowest precision that this machine
            multiplies natively and whose error is known, see `inference.precision`.
        quantize: "int8" or "int4" of a language model's weights, "int8" of the weights and activations of other models,
            quantized as they are read (error: `nn.quantize`).
        masks: the published `vae-oid.npz`, which PaliGemma needs to segment, if it is not among the checkpoint's files.
        lora: folder of a LoRA adapter (PEFT's files, our layer names), merged into the weights.

    Raises:
        CheckpointError: tensors or files that are missing, unknown or of the wrong shape, by name.
        TokenizerError: the same for the tokenizer's files.
        UsageError: a wrong option.
    """
    if lora is not None and quantize is not None:
        raise UsageError(
            f'lora="{lora}": an adapter is not merged into quantized weights; leave out quantize'
        )
    if dtype != "auto":
        _dtype(dtype)
    where, located = choose_device(device), locate(source)
    kind, bits = _precision(dtype, quantize, where, located)
    with give_back_freed_memory():
        family, network, spec, layout = _load_network(located, kind, bits, where, lora)
        network_config = require(network, Network).config
        tokenizer = _tokenizer(located, family, network_config, layout)
    config = located.config or {}
    return Model(
        masks=_masks(located, network, masks),
        name=located.name,
        network=require(network, Network),
        family=family.name,
        tokenizer=tokenizer,
        image_spec=spec,
        device=where,
        dtype=kind,
        batch_size=_batch_size(network, where),
        judges=Judges(lambda name: load(name, device=str(where))),
        decoding=config.get("decoding", {})
        if config.get("format") == FORMAT
        else _decoding(located, family, network_config, layout),
    )


def _batch_size(network: nn.Module, device: torch.device) -> int:
    """Images at once. What a diffusion model of photographs draws takes much memory, and a CPU gains nothing."""
    if isinstance(network, ScheduledNetwork):
        return 1 if device.type == "cpu" else 4
    return 8 if device.type == "cpu" else 32


def _load_network(
    located: CheckpointFiles,
    dtype: torch.dtype,
    quantize: Bits | Literal["auto"] | None,
    device: torch.device,
    lora: str | PathLike[str] | None,
) -> _Parts:
    """The network with its weights on the device, each layer with its kernel."""
    hook = weight_hook_for(quantize, device, dtype) if lora is None else None
    config, tensors = read_checkpoint(located, dtype)
    load_parts = _load_own if config.get("format") == FORMAT else _load_foreign
    parts = load_parts(located, config, tensors, hook)
    if lora is not None:
        load_lora(parts.network, lora)
        merge_lora(parts.network)
    quantize_shared(parts.network, device)
    if device.type == "cpu":
        if lora is not None:
            time_kernels(parts.network, dtype)
        _prepare_cpu(parts.network)
    else:
        _move(parts.network, device)
    return parts


def gain_of_auto(model: Model) -> str:
    """What `dtype="auto"` would gain over float32 for a loaded model, in words; "" for nothing."""
    return auto_gain(model.module, model.device)


def choose_device(name: str) -> torch.device:
    """The device of a name.

    Args:
        name: "auto" (CUDA if there is any, else MPS, else the CPU), or a name of torch's: "cpu", "cuda:1", "mps".

    Raises:
        UsageError: this machine has no such device.
    """
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


def device_of_worker(device: str, number: int, devices: Sequence[str] = ()) -> str:
    """The device of one of several processes on a machine.

    Args:
        device: that all processes were given; for "auto" and "cuda" they have the GPUs in turn.
        number: of the process, from 0.
        devices: in place of it, given in turn.
    """
    if devices:
        return devices[number % len(devices)]
    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{number % torch.cuda.device_count()}"
    return device


def weight_hook_for(
    quantize: Bits | Literal["auto"] | None, device: torch.device, dtype: torch.dtype
) -> WeightHook:
    """Hook that stores weights as they are read: quantized, or packed for a CPU's matrix multiplication.

    On a CPU the kernels are timed first, before there are weights in memory.
    """

    def hook_of(network: nn.Module) -> Callable[[str, Tensor], bool]:
        bits = auto_quantize(network, device) if quantize == "auto" else quantize
        if device.type == "cpu":
            time_kernels(network, dtype, () if bits is None else quantized_names(network))
        hooks = [] if bits is None else [quantize_hook(network, bits, device)]
        if device.type == "cpu":
            hooks.append(pack_hook(network))
        return lambda name, weight: any(take(name, weight) for take in hooks)

    return hook_of


def _move(network: nn.Module, device: torch.device) -> None:
    """`network.to(device)` that leaves the meta parameters of quantized weights alone."""
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
    hook: WeightHook | None,
) -> _Parts:
    try:
        family = FAMILIES[config["family"]]
        settings = config_from_dict(family.config, config["config"], family.towers)
        spec = ImageSpec(**{key: as_tuples(value) for key, value in config["image"].items()})
        if not isinstance(config.get("decoding", {}), dict):
            raise TypeError("decoding: no table")
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{located.name}: config.json is not one that this version wrote ({error!r})"
        ) from error
    check_config(spec, located.name)
    network = build_network(family, settings, tensors, None, source=located.name, weight_hook=hook)
    return _Parts(family, network, spec, "")


def _load_foreign(
    located: CheckpointFiles,
    config: JsonMapping,
    tensors: Mapping[str, Tensor],
    hook: WeightHook | None,
) -> _Parts:
    tensors = unwrap(tensors)
    family, name = recognize(tensors, located.name, config.get("model_type"))
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
    network = build_network(family, settings, tensors, layout, source=located.name, weight_hook=hook)
    try:
        described = open_clip if name == "open_clip" else {}
        spec = _image_spec(located.folder, family, settings, described, config.get("image_processor"))
    except SightloopError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{located.name}: its processor config cannot be understood ({error!r}); download it again"
        ) from error
    check_config(spec, located.name)
    _check_size(spec, settings, located.name)
    return _Parts(family, network, spec, name)


def _image_spec(
    folder: Path, family: Family, settings: Any, open_clip: JsonMapping, own: JsonMapping | None
) -> ImageSpec:
    """The preprocessing, of open_clip_config.json, of the processor's files, of config.json (`own`), or of the family.

    Since transformers 5 the processors of images and text are saved in one file, which then comes first.
    """
    if open_clip:
        return spec_from_open_clip(open_clip.get("preprocess_cfg", {}), settings.vision.image_size)
    both = _json(folder / "processor_config.json").get("image_processor")
    if described := both or _json(folder / "preprocessor_config.json") or own:
        return spec_from_transformers(described, family.image_processor)
    return spec_from_transformers(family.default_image(settings))


def _beside(folder: Path) -> JsonDict:
    """What a network needs of its processor's files.

    `chat_template`: a Jinja text, which is compared and never run; `ignored_phrases`: phrases that name no object
    (Florence-2).
    """
    processor, values = _json(folder / "processor_config.json"), JsonDict()
    if (folder / PIPELINE_FILE).is_file():
        return {"pad_ids": _pad_ids(folder)}
    if isinstance(rules := processor.get("post_processor_config"), dict):
        grounding = rules.get("phrase_grounding")
        banned = grounding.get("banned_grounding_tokens") if isinstance(grounding, dict) else None
        values["ignored_phrases"] = tuple(map(str, banned)) if isinstance(banned, list) else ()
    template = folder / "chat_template.jinja"
    if template.is_file():
        return values | {"chat_template": template.read_text("utf-8", "replace")}
    texts = [file.get("chat_template") for file in (_json(folder / "chat_template.json"), processor)]
    return values | next(({"chat_template": text} for text in texts if isinstance(text, str)), {})


def _pad_ids(folder: Path) -> JsonDict:
    """Ids of the padding of a pipeline's tokenizers, by their folders. Raises CheckpointError if they differ in words.

    Prompts are tokenized once; what fills them up differs between text encoders.
    """
    parts = [part for part in ("tokenizer", "tokenizer_2") if (folder / part).is_dir()]
    own = {part: load_tokenizer_of_kind(folder / part, "clip", max_length=77) for part in parts}
    words = [tokenizer.backend.get_vocab() for tokenizer in own.values()]
    if words[1:] and words[1] != words[0]:
        raise CheckpointError(
            f"{folder}: tokenizer and tokenizer_2 differ in their words, which is not supported; put the checkpoint's "
            "own folders there"
        )
    return {part: tokenizer.pad_id for part, tokenizer in own.items()}


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


def _decoding(located: CheckpointFiles, family: Family, config: Any, layout: str) -> JsonDict:
    """Decoding defaults of families whose generation_config.json `transformers` reads.

    The original code of Florence-2 generates with its language model, whose rules are in config.json (text_config);
    generation_config.json there only refines them.
    """
    if not family.generation:
        return {}
    generation = _json(located.folder / "generation_config.json")
    return decoding_defaults(
        generation,
        located.config or {},
        end_id=config.end_id,
        start_ids=config.start_ids,
        refines=layout == "original",
    )


def _tokenizer(located: CheckpointFiles, family: Family, config: Any, layout: str) -> Tokenizer:
    """The checkpoint's tokenizer; in open_clip's layout with open_clip's text cleaning, whatever files it is read from.

    Its default is "lower" for CLIP's tokenizer, "whitespace" for the hub's others.
    """
    kind, cleaning = family.tokenizer_of(config), None
    if layout == "diffusers":
        return load_tokenizer_of_kind(located.folder / "tokenizer", kind, max_length=config.text.positions)
    if layout == "open_clip":
        text = _json(located.folder / "open_clip_config.json").get("model_cfg", {}).get("text_cfg", {})
        default = "lower" if kind == "clip" else "whitespace"
        cleaning = (text.get("tokenizer_kwargs") or {}).get("clean", default)
    return load_tokenizer_of_kind(
        located.folder,
        kind,
        max_length=config.text.positions,
        # The hub names Gemma's tokenizer for NaFlex; `transformers` makes that SigLIP 2's own.
        lowercase=getattr(config.vision, "any_size", False),
        cleaning=cleaning,
    )


def _masks(
    located: CheckpointFiles, network: nn.Module, path: str | PathLike[str] | None
) -> MaskDecoder | None:
    if not (isinstance(network, RegionNetwork) and "segments" in network.region_formats.values()):
        return None
    if path is not None:
        return load_mask_decoder(Path(path))
    own = located.folder / MASK_DECODER_FILE
    return load_mask_decoder(own) if own.is_file() else None


def _json(path: Path) -> JsonDict:
    return read_json(path) if path.is_file() else {}


def _prepare_cpu(network: nn.Module) -> None:
    pack(network)
    if isinstance(network, ScheduledNetwork):
        keep_small_tensors()
    else:
        keep_between_batches()


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UsageError(f'dtype="{name}": must be one of auto, {", ".join(_DTYPES)}')
    return _DTYPES[name]


def _precision(
    dtype: str, quantize: Bits | None, device: torch.device, located: CheckpointFiles
) -> tuple[torch.dtype, Bits | Literal["auto"] | None]:
    """The dtype and quantization of what a caller asked for; "auto" where the network decides."""
    if dtype != "auto":
        return _dtype(dtype), quantize
    kind = auto_dtype(device, located.weights)
    return kind, "auto" if kind == torch.float32 and quantize is None else quantize
