"""Weights files, read tensor by tensor: safetensors, and the zip files that `torch.save` makes."""

from __future__ import annotations

import json
import os
import re
import struct
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sightloop.data.atomic import atomic_path
from sightloop.errors import CheckpointError
from sightloop.types import JsonDict

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# No header, config or index of a published checkpoint has a tenth of it; parsed, JSON is some thirty times as large.
MAX_JSON_BYTES = 32 * 1024 * 1024

# The names of number formats in safetensors files, and in torch.
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_BLOCK = 1 << 20  # numbers that are converted at a time


class TensorLocation(NamedTuple):
    """Location of a tensor in a file: its first byte, the kind of its numbers, how many of them from the first to the
    last, and its form among them."""

    offset: int
    dtype: torch.dtype
    span: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TensorFile:
    """The tensors of a file. They are read, not mapped: pages of a mapping count as memory beside what is made of them
    until something else wants it, and a file that shrinks while it is mapped takes the process down."""

    def __init__(self, path: Path, places: Mapping[str, TensorLocation]) -> None:
        self._path = path
        self._places = places
        # Held open: a checkpoint may be written anew over the file that it is being read from.
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._places)

    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its tensors."""
        return [place.shape for place in self._places.values()]

    def get_tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor `[...]`, in its own memory; floats become `dtype` as they are read, without a second copy.

        Raises CheckpointError if the file has become shorter.
        """
        import torch

        begin, stored, reach, shape, stride = self._places[name]
        if dtype is None or not stored.is_floating_point:
            dtype = stored
        whole = torch.empty(reach, dtype=dtype)
        if dtype == stored:
            self._read(begin, whole)
        else:
            block = torch.empty(min(reach, _BLOCK), dtype=stored)
            for at in range(0, reach, _BLOCK):
                part = block[: reach - at]
                self._read(begin + at * stored.itemsize, part)
                whole[at : at + _BLOCK] = part
        return whole.as_strided(shape, stride)

    def _read(self, begin: int, into: Tensor) -> None:
        import torch

        memory, done = memoryview(into.view(torch.uint8).numpy().data), 0
        while done < len(memory):
            count = os.preadv(self._file, [memory[done:]], begin + done)
            if not count:
                raise CheckpointError(f"{self._path}: was cut short while it was read; download it again")
            done += count


def check_whole(path: Path) -> None:
    """Raises CheckpointError for a safetensors file whose header or length is wrong. Imports no torch."""
    from safetensors import SafetensorError, safe_open

    check_file_start(path)
    _read_header(path)
    try:
        with safe_open(path, framework="np"):  # checks sizes and places
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from error


def open_safetensors(path: Path) -> TensorFile:
    """A safetensors file. Raises CheckpointError for a damaged one."""
    import torch

    check_whole(path)
    entries, start = _read_header(path)
    strange = {entry["dtype"] for entry in entries.values()} - _DTYPES.keys()
    if strange:
        raise CheckpointError(
            f"{path}: holds numbers of kinds that are not known ({', '.join(sorted(strange))})"
        )
    places: dict[str, TensorLocation] = {}
    for name, entry in entries.items():
        dtype: torch.dtype = getattr(torch, _DTYPES[entry["dtype"]])
        form = torch.empty(entry["shape"], device="meta")
        begin = start + entry["data_offsets"][0]
        places[name] = TensorLocation(begin, dtype, form.numel(), tuple(form.shape), form.stride())
    return TensorFile(path, places)


def zip_records(path: Path) -> dict[int, int]:
    """Where the records of a file by `torch.save` begin -> their bytes. Empty for an old one, which is no zip, and for
    one whose numbers do not lie there as they are (compressed, or of the other byte order)."""
    records: dict[int, int] = {}
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    return {}
                file.seek(info.header_offset + 26)
                begin = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                file.seek(begin)
                if info.filename.endswith("byteorder") and file.read(info.file_size & 31) != b"little":
                    return {}
                records[begin] = info.file_size
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError):
        return {}
    return records


def tensor_locations(
    tensors: Mapping[str, Tensor], records: Mapping[int, int]
) -> dict[str, TensorLocation] | None:
    """Where tensors that torch has read from a file without their memory ("meta") lie in it; None where that is not
    sure."""
    locations: dict[str, TensorLocation] = {}
    for name, tensor in tensors.items():
        memory, size, skipped = tensor.untyped_storage(), tensor.dtype.itemsize, int(tensor.storage_offset())
        begin: int = getattr(memory, "_checkpoint_offset", -1)
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        reach = 1 + sum((n - 1) * step for n, step in pairs) if tensor.numel() else 0
        if records.get(begin, -1) < max(memory.nbytes(), (skipped + reach) * size):
            return None
        place = TensorLocation(
            begin + skipped * size, tensor.dtype, reach, tuple(tensor.shape), tensor.stride()
        )
        locations[name] = place
    return locations


def check_file_start(path: Path) -> None:
    """Raises CheckpointError for what is no weights file at all: an empty one, a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
        )
    if not start:
        raise CheckpointError(f"{path}: is empty; download it again")


def _read_header(path: Path) -> tuple[JsonDict, int]:
    """The header of a safetensors file: 8 bytes of length, then JSON; and where the tensors start. The library's own
    reader lets a name come twice."""

    def once(pairs: list[tuple[str, Any]]) -> JsonDict:
        values = dict(pairs)
        if len(values) != len(pairs):
            twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise CheckpointError(f"{path}: holds {', '.join(twice[:8])} twice; it cannot be trusted")
        return values

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_JSON_BYTES, path.stat().st_size - 8):
            raise CheckpointError(
                f"{path}: damaged or cut short (its header does not fit); download it again"
            )
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged (its header is not JSON); download it again") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: damaged (its header is no table of tensors); download it again")
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}, 8 + length


def read_tensors(files: Sequence[Path], dtype: torch.dtype | None = None) -> Mapping[str, Tensor]:
    """The tensors of these files by name, on the CPU, each read when it is asked for.

    Reads safetensors, and pickles that hold nothing but tensors. Of a training checkpoint the state dict is read, such
    as its "model" or "state_dict", nested or not. The names of wrappers are left out: "_orig_mod." of `torch.compile`
    anywhere, "module." of `DataParallel` in front of all names.

    Args:
        files: weights files.
        dtype: of floats; as they are by default.

    Raises:
        CheckpointError: a damaged file, a name that comes twice, a Git LFS pointer, a TorchScript archive, and a pickle
            that would have to run code.
    """
    return _LazyTensors(files, dtype)


def matrix_shapes(files: Sequence[Path]) -> Counter[tuple[int, int]]:
    """The shapes of the matrices in safetensors files, and how many have each. Of other files none: they would be read.

    Raises:
        CheckpointError: a damaged file.
    """
    counts: Counter[tuple[int, int]] = Counter()
    for file in files:
        if file.suffix == ".safetensors":
            shapes = open_safetensors(file).shapes()
            counts.update((shape[0], shape[1]) for shape in shapes if len(shape) == 2)
    return counts


def write_safetensors(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write one safetensors file, whole or not at all. A tensor is written from its memory, shared or not; only
    one that is not on the CPU, or not row by row, is copied."""
    from safetensors import TensorSpec, serialize_file

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # holds the memory
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in plain.items()}
    places = {
        name: TensorSpec(dtype=kinds[name], shape=t.shape, data_ptr=t.data_ptr(), data_len=t.nbytes)
        for name, t in plain.items()
    }
    with atomic_path(path) as temporary:
        serialize_file(places, temporary, metadata={"format": "pt"})


class _LazyTensors(Mapping[str, "Tensor"]):
    """Name -> tensor over several files, which stay on disk until a tensor is asked for."""

    def __init__(self, files: Sequence[Path], dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._places: dict[str, TensorFile | dict[str, Tensor]] = {}
        homes: dict[str, Path] = {}
        for file in files:
            place = open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
            for name in place.keys():  # noqa: SIM118 (a safetensors file has keys() but is no mapping)
                if name in self._places:
                    raise CheckpointError(f"{file}: has tensor {name}, and so has {homes[name].name}")
                self._places[name] = place
                homes[name] = file
        self._names = _unwrapped_names(self._places)  # as callers know them -> as the files have them

    def __getitem__(self, name: str) -> Tensor:
        stored_name = self._names[name]
        place = self._places[stored_name]
        if isinstance(place, TensorFile):
            return place.get_tensor(stored_name, self._dtype)
        tensor = place[stored_name]
        return tensor if self._dtype is None or not tensor.is_floating_point() else tensor.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


# Modules around others: of torch.compile, FSDP, activation checkpointing; of (Distributed)DataParallel.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."


def _unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Names without those of wrappers -> as they are; unchanged where two would become one."""
    stored = list(names)
    inner = [_WRAPPERS.sub("", name) for name in stored]
    while inner and all(name.startswith(_PARALLEL) for name in inner):
        inner = [name.removeprefix(_PARALLEL) for name in inner]
    unwrapped = dict(zip(inner, stored, strict=True))
    return unwrapped if len(unwrapped) == len(stored) else dict(zip(stored, stored, strict=True))


def _open_pickle(path: Path) -> TensorFile | dict[str, Tensor]:
    check_file_start(path)
    if _is_torchscript(path):
        raise CheckpointError(
            f"{path}: is a TorchScript archive (code with weights, as OpenAI published CLIP); code is not run. Load "
            "the same model from the hub, as openai/clip-vit-base-patch32; or, if you trust the file, run torch.save("
            f"torch.jit.load({path.name!r}, 'cpu').state_dict(), 'weights.pt') in Python and load weights.pt"
        )
    records = zip_records(path)
    if records:
        places = tensor_locations(_load_pickle(path, "meta"), records)
        if places is not None:
            return TensorFile(path, places)
    return _load_pickle(path, "cpu")


def _load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    import torch

    try:
        data = torch.load(path, map_location=device, weights_only=True)
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # torch names no type for what it refuses: a pickle's, its own, a zip's
        raise CheckpointError(
            f"{path}: cannot be read without running code from the file, or is damaged. It is not run; "
            f"convert it to safetensors where you trust it, and load that"
        ) from error

    data = _state_dict(data, path)
    if not isinstance(data, dict) or not data:
        raise CheckpointError(f"{path}: holds no tensors by name; it is not a checkpoint of a network")
    items = cast("dict[Any, Any]", data)
    strange = [str(k) for k, v in items.items() if not isinstance(k, str) or not _is_dense_tensor(v, device)]
    if strange:
        raise CheckpointError(f"{path}: holds things that are no tensors ({', '.join(strange[:8])})")
    return {name: value.detach() for name, value in items.items()}


# What training code calls the weights in its checkpoints, the likeliest first.
_STATE_DICTS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "module",
    "net",
    "network",
    "params",
    "weights",
)


def _state_dict(data: object, path: Path) -> object:
    """The innermost dict of tensors: under one of `_STATE_DICTS`, or the only dict of tensors of a checkpoint.

    {"epoch": 3, "model": {"state_dict": {...}}, "optimizer": {...}} -> {...}
    """
    import torch

    while isinstance(data, dict):
        entries = cast("dict[Any, Any]", data)
        inner = {
            key: cast("dict[Any, Any]", value) for key, value in entries.items() if isinstance(value, dict)
        }
        if not inner or any(isinstance(value, torch.Tensor) for value in entries.values()):
            break
        known = next((name for name in _STATE_DICTS if name in inner), None)
        candidates = [key for key, value in inner.items() if _holds_tensors(value, all)]
        candidates = candidates or [key for key, value in inner.items() if _holds_tensors(value, any)]
        if known is None and len(candidates) > 1:
            raise CheckpointError(
                f"{path}: holds the weights of several networks ({', '.join(map(str, candidates[:8]))}); "
                "save the one to load in a separate file"
            )
        if known is None and not candidates:
            break
        data = inner[candidates[0] if known is None else known]
    return data


def _holds_tensors(data: object, quantifier: Callable[[Iterable[bool]], bool]) -> bool:
    """Whether all or any values of a dict are tensors, at any depth."""
    import torch

    if isinstance(data, dict):
        values = list(cast("dict[Any, Any]", data).values())
        return bool(values) and quantifier(_holds_tensors(value, quantifier) for value in values)
    return isinstance(data, torch.Tensor)


def _is_torchscript(path: Path) -> bool:
    """Whether a file is what `torch.jit.save` writes: a zip file with code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def _is_dense_tensor(value: Any, device: str) -> bool:
    """Whether a thing is a tensor of which the file holds every number: none that is sparse, nor one stretched to a
    size that its few bytes do not tell."""
    import torch

    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.is_quantized:
        return False
    return value.device.type == device and value.nbytes <= value.untyped_storage().nbytes()
