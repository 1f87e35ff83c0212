"""Weights files, read tensor by tensor: safetensors, and the zip files that `torch.save` makes."""

from __future__ import annotations

import json
import os
import struct
import weakref
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sightread.errors import CheckpointError

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


class Place(NamedTuple):
    """Where a tensor lies in a file: its first byte, the kind of its numbers, how many of them from the first to the
    last, and its form among them."""

    begin: int
    dtype: torch.dtype
    reach: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Stored:
    """The tensors of a file. They are read, not mapped: pages of a mapping count as memory beside what is made of them
    until something else wants it, and a file that shrinks while it is mapped takes the process down."""

    def __init__(self, path: Path, places: Mapping[str, Place]) -> None:
        self._path = path
        self._places = places
        # Held open: a checkpoint may be written anew over the file that it is being read from.
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._places)

    def get_tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in memory of its own; numbers with a fraction become `dtype` while they are read, so that the
        tensor never stands there in both. Raises CheckpointError where the file has become shorter."""
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


def open_safetensors(path: Path) -> Stored:
    """A safetensors file. Raises CheckpointError for a damaged one."""
    import torch
    from safetensors import SafetensorError, safe_open

    check_start(path)
    entries, start = _header(path)
    try:
        with safe_open(path, framework="np"):  # checks sizes and places
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or cut short ({error}); download it again") from error
    strange = {entry["dtype"] for entry in entries.values()} - _DTYPES.keys()
    if strange:
        raise CheckpointError(
            f"{path}: holds numbers of kinds that are not known ({', '.join(sorted(strange))})"
        )
    places: dict[str, Place] = {}
    for name, entry in entries.items():
        dtype: torch.dtype = getattr(torch, _DTYPES[entry["dtype"]])
        form = torch.empty(entry["shape"], device="meta")
        begin = start + entry["data_offsets"][0]
        places[name] = Place(begin, dtype, form.numel(), tuple(form.shape), form.stride())
    return Stored(path, places)


def records_of(path: Path) -> dict[int, int]:
    """Where the records of a file by `torch.save` begin -> their bytes. Empty for an old one, which is no zip, and for
    one whose numbers do not lie there as they are (compressed, or of the other byte order)."""
    found: dict[int, int] = {}
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
                found[begin] = info.file_size
    except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError):
        return {}
    return found


def places_of(tensors: Mapping[str, Tensor], records: Mapping[int, int]) -> dict[str, Place] | None:
    """Where tensors that torch has read from a file without their memory ("meta") lie in it; None where that is not
    sure."""
    found: dict[str, Place] = {}
    for name, tensor in tensors.items():
        memory, size, skipped = tensor.untyped_storage(), tensor.dtype.itemsize, int(tensor.storage_offset())
        begin: int = getattr(memory, "_checkpoint_offset", -1)
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        reach = 1 + sum((n - 1) * step for n, step in pairs) if tensor.numel() else 0
        if records.get(begin, -1) < max(memory.nbytes(), (skipped + reach) * size):
            return None
        place = Place(begin + skipped * size, tensor.dtype, reach, tuple(tensor.shape), tensor.stride())
        found[name] = place
    return found


def check_start(path: Path) -> None:
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


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file: 8 bytes of length, then JSON; and where the tensors start. The library's own
    reader lets a name come twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise CheckpointError(f"{path}: holds {', '.join(twice[:8])} twice; it cannot be trusted")
        return found

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
