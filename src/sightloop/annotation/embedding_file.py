"""Embeddings of many images in one file, .npy or .parquet: whole or not at all, however many there are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sightloop.data.atomic import atomic_path, atomic_write, remove_stale_temporaries
from sightloop.data.datasets.schema import portable_name
from sightloop.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GROUP = 16_384  # rows of one row group of a parquet file


class EmbeddingFile:
    """Embeddings under their images' names; a context that puts the file in place when it is left well.

    `x.npy` is float32 `[n, d]` (`[n, q, d]` where an image has q vectors), and `x.names.txt` beside it has the name of
    each row, one a line. `x.parquet` has the columns `name` (string) and `embedding` (float32 list of fixed length d,
    or q of them). Memory does not grow with n. Without a single row no file is made and an older one stays.
    """

    def __init__(self, path: Path, model: str = "") -> None:
        """Raises `UsageError` where no such file can be written. `model` is noted in a parquet file."""
        if path.suffix.lower() not in (".npy", ".parquet"):
            raise UsageError(f"--out {path}: the file must end in .npy or .parquet.")
        if path.is_dir():
            raise UsageError(f"--out {path}: this is a folder; name a file.")
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"--out {path}: the folder {path.parent} cannot be written to.")
        remove_stale_temporaries(path.parent)
        self.path = path
        self.rows = 0
        self._model = model
        self._place = ExitStack()
        self._writer: _NpyWriter | _ParquetWriter | None = None

    def __enter__(self) -> EmbeddingFile:
        return self

    def add(self, names: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Adds rows: n names and float32 `[n, d]` or `[n, q, d]`."""
        if self._writer is None:
            kind = _NpyWriter if self.path.suffix.lower() == ".npy" else _ParquetWriter
            temporary = self._place.enter_context(atomic_path(self.path))
            self._writer = kind(temporary, vectors.shape[1:], self._model)
        self._writer.add([portable_name(name) for name in names], vectors)
        self.rows += len(names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._place:
            if self._writer is None:
                return
            self._writer.close()
            if error is not None:
                raise error  # into the place of the file, which then takes the temporary away
            if isinstance(self._writer, _NpyWriter):  # the names first: whoever sees the new .npy finds them
                names = "".join(f"{_one_line(name)}\n" for name in self._writer.names)
                atomic_write(self.path.with_suffix(".names.txt"), names)


class _NpyWriter:
    def __init__(self, path: Path, shape: tuple[int, ...], model: str) -> None:
        self.names: list[str] = []
        self._shape = shape
        self._file: IO[bytes] = path.open("r+b")
        self._write_header()

    def add(self, names: list[str], vectors: NDArray[np.float32]) -> None:
        self.names += names
        self._file.write(np.ascontiguousarray(vectors, dtype="<f4").data)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()  # NumPy keeps room for the digits of the first axis, so the length stays the same
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.names), *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _ParquetWriter:
    def __init__(self, path: Path, shape: tuple[int, ...], model: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._vector = pa.float32()
        for width in reversed(shape):
            self._vector = pa.list_(self._vector, width)
        self._shape = shape
        metadata = {"sightloop.model": model}
        fields = [pa.field("name", pa.string()), pa.field("embedding", self._vector)]
        self._schema = pa.schema(fields, metadata=metadata)
        self._writer: Any = pq.ParquetWriter(str(path), self._schema)
        self._names: list[str] = []
        self._vectors: list[NDArray[np.float32]] = []

    def add(self, names: list[str], vectors: NDArray[np.float32]) -> None:
        self._names += names
        self._vectors.append(vectors)
        if len(self._names) >= _GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._names:
            vectors: Any = pa.array(np.concatenate(self._vectors).astype("<f4", copy=False).ravel())
            for width in reversed(self._shape):
                vectors = pa.FixedSizeListArray.from_arrays(vectors, width)
            self._writer.write_table(pa.table([pa.array(self._names), vectors], schema=self._schema))
            self._names, self._vectors = [], []


def _one_line(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
