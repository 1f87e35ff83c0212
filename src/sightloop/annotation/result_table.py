"""Results of many images in one file: tables of rows, backed by a journal during the run, and embeddings."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from sightloop.annotation.table_files import check_table_path, rows_by_name, write_rows
from sightloop.data.atomic import atomic_path, atomic_write, check_regular, remove_stale_temporaries
from sightloop.data.datasets.schema import json_text, portable_name
from sightloop.data.journal import Journal, JournalLine
from sightloop.errors import SightloopError, UsageError
from sightloop.types import JsonDict, JsonMapping

if TYPE_CHECKING:
    from sightloop.types import Floats32

Rows: TypeAlias = list[JsonDict]
_GROUP_ROWS = 16_384  # of one row group of a Parquet file of embeddings
_EMBEDDINGS_A_SYNC = 64  # images between two syncs of the journal


class ResultTable:
    """Table with one or more rows an image; a row is an object with a "name", the image's path.

    During the run, rows go to the journal `FILE.partial`; `finish` writes FILE in input order by atomic rename and
    removes the journal. A run after a kill resumes from the journal.

    Args:
        path: FILE, ending in .jsonl, .csv or .parquet.
        mode: "skip" keeps the rows of an existing FILE as they are, including columns added by hand; rows of images
            that are not among the inputs come first. "overwrite" replaces FILE.
        settings: Settings of the run. In mode "overwrite" a journal is resumed only if its settings are equal.
        columns: The first columns of a CSV or Parquet file, in order.

    Raises:
        UsageError: FILE cannot be read or written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["skip", "overwrite"] = "skip",
        settings: JsonMapping | None = None,
        columns: Sequence[str] = ("name",),
    ) -> None:
        check_table_path(path)
        self.path = path
        self.journal_path = path.with_name(path.name + ".partial")
        self._mode = mode
        self._columns = tuple(columns)
        self._file_id = _file_id(path)
        self._settings: JsonDict = json.loads(json.dumps({"mode": mode, **(settings or {})}, default=str))
        finished_rows = rows_by_name(path) if mode == "skip" and path.exists() else {}
        self._offsets: dict[str, int] = {}  # name -> start of its latest line in the journal
        self._resumable: bool | None = None  # None: the journal has no line yet
        self._journal = self._open_journal()
        remove_stale_temporaries(path.parent)
        self._has_new_rows = bool(self._offsets)  # rows that FILE does not have
        self._changed = self._has_new_rows or not path.exists() or mode == "overwrite"
        # Rows of FILE, which may be edited by hand, take precedence over rows of a killed run.
        for name, rows in finished_rows.items():
            self._offsets[name] = self._journal.add({"name": name, "rows": rows})
        self._order = array("q")  # journal offsets of the images, in input order
        self._ordered_names: set[str] = set()

    def __contains__(self, image: str) -> bool:
        """Whether FILE or the journal of an earlier run has the image."""
        return portable_name(image) in self._offsets

    def entry(self, image: str) -> JsonDict:
        """What FILE, or an earlier run, has of an image: its "rows", and what else was added with them; else {}."""
        start = self._offsets.get(portable_name(image))
        return {} if start is None else self._journal.read(start)

    def add(self, image: str, rows: Iterable[JsonMapping], **more: object) -> None:
        """Adds one line to the journal.

        Args:
            image: Path of the image.
            rows: Its rows, without the "name"; none if nothing is to be written to FILE.
            more: JSON values for the journal alone, which `finish` hands to its `arrange`.
        """
        name = portable_name(image)
        line = {"name": name, "rows": [{"name": name, **row} for row in rows], **more}
        start = self._journal.add(line)
        if name in self._offsets:  # it replaces older rows
            self._offsets[name] = start
            self._put_in_order(name)
        else:
            self._order.append(start)
        self._changed = self._has_new_rows = True

    def note_skipped(self, image: str) -> None:
        """Puts the existing rows of a skipped image at its position among the inputs."""
        name = portable_name(image)
        if name in self._offsets:
            self._put_in_order(name)

    def commit(self) -> None:
        """Forces the journal onto the disk (fsync)."""
        self._journal.sync()

    def finish(self, arrange: Callable[[Iterator[JsonDict]], Rows] | None = None) -> Rows | None:
        """Writes FILE and removes the journal.

        Args:
            arrange: Makes the rows of FILE from all journal entries, in input order. By default their rows as they are.

        Returns:
            What `arrange` made, all in memory; None without it.

        Raises:
            SightloopError: another program changed FILE during the run; the journal is kept.
        """
        self.commit()
        if self._mode == "skip" and _file_id(self.path) != self._file_id:
            raise SightloopError(
                f"{self.path} was changed during the run, so it was left as it is. The new rows are in "
                f"{self.journal_path.name}: run the same command again to merge them."
            )
        arranged = None if arrange is None else arrange(self._entries())
        if self._changed:
            write_rows(self.path, lambda: self._rows() if arranged is None else arranged, self._columns)
        self._journal.remove()
        return arranged

    def close(self) -> None:
        """Closes the journal and deletes it if it has no new rows; does nothing after `finish`."""
        if not self._journal.closed:
            self.commit()
            if self._has_new_rows:
                self._journal.close()
            else:
                self._journal.remove()

    def _put_in_order(self, name: str) -> None:
        if name not in self._ordered_names:
            self._ordered_names.add(name)
            self._order.append(self._offsets[name])

    def _open_journal(self) -> Journal:
        try:
            journal = Journal(self.journal_path, self._load_line, dumps=json_text)
        except OSError as error:
            raise UsageError(f"--out: {self.journal_path} cannot be written: {error.strerror}.") from error
        if not self._resumable:
            journal.clear()
            try:
                journal.add({"name": "", "settings": self._settings})
            except OSError:
                journal.remove()
                raise
        return journal

    def _load_line(self, line: JournalLine) -> None:
        """Records the offset of a row. The first line holds the settings of the run that began the journal."""
        if self._resumable is False:
            return
        entry = line.entry
        is_first = line.number == 1
        if entry is None or not isinstance(entry.get("name"), str) or is_first != ("settings" in entry):
            raise UsageError(f"{self.journal_path} is not the journal of a run: move it elsewhere.")
        if is_first:
            self._resumable = self._mode == "skip" or entry["settings"] == self._settings
        else:
            self._offsets[entry["name"]] = line.start

    def _entries(self) -> Iterator[JsonDict]:
        """All entries: first those of images that are not among the inputs, then in input order."""
        for name, offset in self._offsets.items():
            if name not in self._ordered_names:
                yield self._journal.read(offset)
        for offset in self._order:
            yield self._journal.read(offset)

    def _rows(self) -> Iterator[JsonDict]:
        for entry in self._entries():
            yield from entry["rows"]


def _file_id(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and modification time, which tell whether a file was changed; None if it does not exist."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns)


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


class EmbeddingJournal:
    """Embeddings by image in `FILE.partial`; those of images that changed since do not count.

    Args:
        file: that is written in the end.
        settings: what decides the embeddings beside the images; a journal of others is begun anew.

    Raises:
        UsageError: the journal cannot be written, or another run is writing it.
    """

    def __init__(self, file: Path, settings: str) -> None:
        self._path = file.with_name(file.name + ".partial")
        self._settings = settings
        self._offsets: dict[str, tuple[int, str]] = {}  # image -> start of its line, digest of its state
        self._order: dict[str, None] = {}
        self._is_same = False
        try:
            self._journal = Journal(self._path, self._load_line, sync_every=_EMBEDDINGS_A_SYNC)
        except OSError as error:
            raise UsageError(f"--out: {self._path} cannot be written: {error.strerror}.") from error
        if not self._is_same:
            self._journal.clear()
            self._journal.add({"settings": settings})

    def __contains__(self, image: str) -> bool:
        """Whether the image was embedded and has not changed since."""
        return image in self._offsets and self._offsets[image][1] == _digest_of_state(image)

    def add(self, image: str, vectors: Floats32) -> None:
        """Adds the vectors of an image, float32 `[d]` or `[q, d]`."""
        state = _digest_of_state(image)
        data = base64.b64encode(np.ascontiguousarray(vectors, "<f4").tobytes()).decode("ascii")
        line: JsonDict = {"name": image, "state": state, "shape": list(vectors.shape), "data": data}
        self._offsets[image] = self._journal.add(line), state
        self._order[image] = None

    def note_skipped(self, image: str) -> None:
        """Puts an image that was embedded before at its position among the inputs."""
        if image in self._offsets:
            self._order[image] = None

    @property
    def images(self) -> Sequence[str]:
        """The images of this run that are embedded, in the order of the inputs."""
        return list(self._order)

    def vectors(self, image: str) -> Floats32:
        """The vectors of an image."""
        line = self._journal.read(self._offsets[image][0])
        return np.frombuffer(base64.b64decode(line["data"]), "<f4").reshape(line["shape"])

    def remove(self) -> None:
        """Deletes the journal: the file has what it holds."""
        self._journal.remove()

    def close(self) -> None:
        """Closes the journal and deletes it if it is empty; does nothing after `remove`."""
        if self._journal.closed:
            return
        if self._offsets:
            self._journal.close()
        else:
            self._journal.remove()

    def _load_line(self, line: JournalLine) -> None:
        entry = line.entry
        if entry is None or (line.number == 1) != ("settings" in entry):
            raise UsageError(f"{self._path} is not the journal of a run: move it elsewhere.")
        if line.number == 1:
            self._is_same = entry["settings"] == self._settings
        elif self._is_same:
            self._offsets[entry["name"]] = line.start, entry["state"]


def _digest_of_state(image: str) -> str:
    """Size and time of a file; "" if it is gone."""
    try:
        return digest_of_files((), [image])
    except OSError:
        return ""
