"""Embedding file: vectors of many images in one .npy or .parquet file, written in constant memory by atomic rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sightloop.data.atomic import atomic_path, atomic_write, check_regular, remove_stale_temporaries
from sightloop.data.datasets.schema import portable_name
from sightloop.errors import UsageError

if TYPE_CHECKING:
    from sightloop.types import Floats32

_GROUP_ROWS = 16_384  # of one parquet row group


class EmbeddingFile:
    """Writer of embeddings under their images' names; a context manager.

    The file appears when the context exits without an error; without any row no file is made and an older one is
    kept. Rows are float32, one vector for each image, or q vectors for each (BLIP-2):

        x.npy      `[n, d]` or `[n, q, d]`, and x.names.txt with the name of each row, one a line
        x.parquet  columns `name` (string) and `embedding` (fixed-size list of d floats, or of q such lists)

    What they were made of is stored as a digest, in x.about.json or in the metadata of the parquet file.

    Args:
        path: The file, ending in .npy or .parquet.
        model: Name of the model, stored beside the digest.
        origin: Digest of model, options and images (see `digest_of_files`); "" to store none.

    Raises:
        UsageError: The file cannot be written.
    """

    def __init__(self, path: Path, model: str = "", origin: str = "") -> None:
        if path.suffix.lower() not in (".npy", ".parquet"):
            raise UsageError(f"--out {path}: the file must end in .npy or .parquet.")
        if path.is_dir():
            raise UsageError(f"--out {path}: this is a folder; name a file.")
        if not path.parent.is_dir():
            raise UsageError(f"--out {path}: the folder {path.parent} does not exist; make it first.")
        if not os.access(path.parent, os.W_OK):
            raise UsageError(f"--out {path}: the folder {path.parent} cannot be written to.")
        check_regular(path)
        remove_stale_temporaries(path.parent)
        self.path = path
        self.rows = 0
        self._about = {"model": model, "origin": origin}
        self._temporary = ExitStack()  # holds `atomic_path`
        self._writer: _NpyWriter | _ParquetWriter | None = None

    @property
    def is_current(self) -> bool:
        """Whether the file exists already, complete and made of the same model, options and images."""
        if not self._about["origin"] or not self.path.is_file():
            return False
        stored = _stored_parquet(self.path) if self.path.suffix.lower() == ".parquet" else self._stored_npy()
        return stored == self._about["origin"]

    def forget(self) -> None:
        """Stores no digest, because an image could not be embedded: the next call tries it again."""
        self._about["origin"] = ""

    def _stored_npy(self) -> str:
        """The digest in x.about.json; "" if there is none, or it is of another x.npy."""
        try:
            about = json.loads(self.path.with_suffix(".about.json").read_text("utf-8"))
            return str(about["origin"]) if about["file"] == _state(self.path) else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return ""

    def __enter__(self) -> EmbeddingFile:
        return self

    def add(self, names: Sequence[str], vectors: Floats32) -> None:
        """Adds n rows: their names and float32 vectors `[n, d]` or `[n, q, d]`."""
        if self._writer is None:
            writer = _NpyWriter if self.path.suffix.lower() == ".npy" else _ParquetWriter
            temporary = self._temporary.enter_context(atomic_path(self.path))
            self._writer = writer(temporary, vectors.shape[1:], self._about)
        self._writer.add([portable_name(name) for name in names], vectors)
        self.rows += len(names)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._temporary:
            if self._writer is None:
                return
            self._writer.close(self._about)
            if error is not None:
                raise error  # inside `atomic_path`, which then removes the temporary file
            if isinstance(self._writer, _NpyWriter):  # before x.npy, so that a new x.npy always has its names
                names = "".join(f"{_escape(name)}\n" for name in self._writer.names)
                atomic_write(self.path.with_suffix(".names.txt"), names)
        if isinstance(self._writer, _NpyWriter) and self._about["origin"]:
            about = self._about | {"file": _state(self.path)}
            atomic_write(self.path.with_suffix(".about.json"), json.dumps(about) + "\n")


def digest_of_files(settings: Sequence[object], files: Iterable[str | Path]) -> str:
    """Digest of settings, and of the names, sizes and times of files; their content is not read.

    Raises:
        OSError: A file does not exist.
    """
    digest = hashlib.sha256(repr(settings).encode("utf-8", "surrogateescape"))
    for file in files:
        digest.update(f"{os.fspath(file)}\0{_state(Path(file))}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]


def _state(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _stored_parquet(path: Path) -> str:
    """The digest in the metadata of a parquet file; "" if there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowException, OSError):
        return ""
    return metadata.get(b"sightloop.origin", b"").decode("ascii", "replace")


class _NpyWriter:
    def __init__(self, path: Path, shape: tuple[int, ...], about: Mapping[str, str]) -> None:
        self.names: list[str] = []
        self._shape = shape
        self._file: IO[bytes] = path.open("r+b")
        self._write_header()

    def add(self, names: list[str], vectors: Floats32) -> None:
        self.names += names
        self._file.write(np.ascontiguousarray(vectors, dtype="<f4").data)

    def close(self, about: Mapping[str, str]) -> None:
        self._file.seek(0)
        self._write_header()  # of the same length: NumPy pads it for any number of rows
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.names), *self._shape)}
        np.lib.format.write_array_header_1_0(self._file, header)


class _ParquetWriter:
    def __init__(self, path: Path, shape: tuple[int, ...], about: Mapping[str, str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        vector = pa.float32()
        for width in reversed(shape):
            vector = pa.list_(vector, width)
        self._shape = shape
        fields = [pa.field("name", pa.string()), pa.field("embedding", vector)]
        self._schema = pa.schema(fields, metadata={"sightloop.model": about["model"]})
        self._writer: Any = pq.ParquetWriter(str(path), self._schema)  # pyarrow has no type hints
        self._names: list[str] = []
        self._vectors: list[Floats32] = []

    def add(self, names: list[str], vectors: Floats32) -> None:
        self._names += names
        self._vectors.append(vectors)
        if len(self._names) >= _GROUP_ROWS:
            self._flush()

    def close(self, about: Mapping[str, str]) -> None:
        self._flush()
        if about["origin"]:
            self._writer.add_key_value_metadata({"sightloop.origin": about["origin"]})
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._names:
            # [n, q, d] as one flat array of n * q * d floats, wrapped into lists of d, and those into lists of q
            vectors: Any = pa.array(np.concatenate(self._vectors).astype("<f4", copy=False).ravel())
            for width in reversed(self._shape):
                vectors = pa.FixedSizeListArray.from_arrays(vectors, width)
            self._writer.write_table(pa.table([pa.array(self._names), vectors], schema=self._schema))
            self._names, self._vectors = [], []


def _escape(name: str) -> str:
    """The name on one line: characters that are not printable become escapes (newline -> `\\n`)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
