"""WebDataset shards: tar archives in which the files that share a name up to its first dot are one sample.

A reader of our own: the headers are walked once, bodies are seeked over, and what is kept are two places in the archive
for each sample. Nothing is extracted; links, devices, and names that lead out of a folder are refused by name.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import stat
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from sightloop.data.datasets import schema
from sightloop.data.datasets.folder import LARGEST, SIDECARS, unescape_key
from sightloop.data.images.decode import EXTENSIONS
from sightloop.errors import ImageError
from sightloop.types import Limits, Sample

_BLOCK = 512
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)  # WebDataset's rule
_MAX_NAME = 1 << 20  # bytes of an extended header
_MAX_ZEROS = 1 << 21  # bytes of zeros: tar pads to a multiple of 10,240, or of what it is told
_TEXTS = frozenset(("txt", "json", "cls"))
_PICTURES = frozenset(ending.removeprefix(".") for ending in EXTENSIONS)
_REFUSED = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_LEADS_OUT = "a name that leads out of its folder"
_BODILESS = (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENDED = (b"x", b"g", b"L", b"K")


class _Seekable(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def seek(self, place: int, /) -> object: ...


class _EndError(ValueError):
    """The archive cannot be read any further. is_clean: it ends between members. key: the sample that is cut."""

    def __init__(self, reason: str, is_clean: bool = False, key: str | None = None) -> None:
        super().__init__(reason)
        self.is_clean, self.key = is_clean, key


class _Forward:
    """A stream that is sought forwards only, by reading."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._place = file, 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._place += len(data)
        return data

    def seek(self, place: int) -> None:
        while (ahead := place - self._place) > 0:
            if not self.read(min(ahead, 1 << 20)):
                raise _EndError("it is cut short")


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    refused: str  # why it is no file to read, or ""
    start: int  # of its first header
    body: int
    size: int

    @property
    def end(self) -> int:
        return self.body + _padded(self.size)

    def split(self) -> tuple[str, str] | None:
        """Key and ending, in lower case; None for what belongs to no sample."""
        if self.refused == _LEADS_OUT:  # of no sample perhaps, but never passed over in silence
            stem, dot, ending = self.name.rpartition(".")
            return unescape_key(stem if dot else self.name), ending.lower()
        found = _KEY.fullmatch(self.name)
        hidden = self.name.rpartition("/")[2].startswith(("._", "__"))
        return None if found is None or hidden else (unescape_key(found[1]), found[2].lower())


class ShardSource:
    """A source: one seekable .tar. What of it cannot be read is one more sample at its end, which raises."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, path.name
        self._starts, self._ends, self._hashes = array("q"), array("q"), array("q")
        self._lost = ""
        left_out, endings, last = Counter[str](), set[str](), None
        with path.open("rb") as file:
            try:
                for member in _members(file, path.stat().st_size):
                    parts = member.split()
                    if parts is None:
                        continue
                    if parts[0] != last or parts[1] in endings:  # a second one of a kind is the next sample's
                        self._starts.append(member.start)
                        self._ends.append(member.end)
                        self._hashes.append(schema.key_hash(parts[0]))
                        endings.clear()
                    last, self._ends[-1] = parts[0], member.end
                    endings.add(parts[1])
                    left_out[parts[1]] += parts[1] not in _TEXTS | _PICTURES
            except _EndError as error:
                if last is not None and _is_torn(error, last):
                    for places in (self._starts, self._ends, self._hashes):
                        places.pop()
                self._lost = _loss(error, len(self._starts))
        kinds = ", ".join(f"{count:,} .{ending}" for ending, count in sorted(left_out.items()) if count)
        self.notes = (f"{path.name}: members of other kinds are left out: {kinds}",) if kinds else ()

    def __len__(self) -> int:
        return len(self._starts) + bool(self._lost)

    def hashes(self) -> Iterator[int]:
        """key_hash() of every key."""
        return chain(self._hashes, [schema.key_hash(self._path.name)] * bool(self._lost))

    def key(self, index: int) -> str:
        """The key of a record."""
        if index == len(self._starts):
            return self._path.name
        parts = next(self._walk(index)).split()
        return self._path.name if parts is None else parts[0]

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError where it is broken."""
        if index == len(self._starts):
            raise ValueError(self._lost)
        with self._path.open("rb") as file:
            parts: list[_Part] = []
            for member in self._walk(index):
                file.seek(member.body)
                parts.append((member, file.read(member.size) if _is_wanted(member) else b""))
        return _sample(key, parts)

    def digest(self) -> str:
        """Of the names and sizes of the members, and of the contents of those that are text."""
        whole = hashlib.sha256()
        with self._path.open("rb") as file:
            try:
                for member in _members(file, self._path.stat().st_size):
                    whole.update(repr((member.name, member.size)).encode("utf-8", "surrogateescape"))
                    if (member.split() or ("", ""))[1] in _TEXTS and member.size <= LARGEST:
                        file.seek(member.body)
                        whole.update(file.read(member.size))
            except _EndError as error:
                whole.update(str(error).encode())
        return whole.hexdigest()

    def _walk(self, index: int) -> Iterator[_Member]:
        with self._path.open("rb") as file:
            yield from _members(file, None, self._starts[index], self._ends[index])


class StreamSource:
    """A source that can be read once and in order: a tar on standard input or in a named pipe, or a .tar.gz. Of keys it
    remembers the hashes, to tell apart those that repeat; what is to come it cannot know, so "a#2" may become "a#2#2".
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path | None) -> None:
        """path: None for standard input."""
        self._path = path
        self._name = "standard input" if path is None else path.name

    def _open(self) -> AbstractContextManager[BinaryIO]:
        if self._path is None:
            return nullcontext(sys.stdin.buffer)
        is_plain = stat.S_ISFIFO(self._path.stat().st_mode)
        return self._path.open("rb") if is_plain else cast(BinaryIO, gzip.open(self._path))

    def samples(self) -> Iterator[Sample | ImageError]:
        """Every sample, and for a broken one the error in its place."""
        parts: list[_Part] = []
        key, count, endings = None, 0, set[str]()
        seen: dict[int, int] = {}
        error: Exception | None = None
        with self._open() as source:
            file = _Forward(source)
            try:
                for member in _members(file, None):
                    split = member.split()
                    if split is None:
                        continue
                    if key is not None and (split[0] != key or split[1] in endings):
                        count += 1
                        yield _sample_or_error(_named(key, seen), parts)
                        parts = []
                        endings.clear()
                    key = split[0]
                    endings.add(split[1])
                    data = file.read(member.size) if _is_wanted(member) else b""
                    if _is_wanted(member) and len(data) < member.size:
                        raise _EndError(f"{member.name!r} is cut short", key=key)
                    parts.append((member, data))
            except (_EndError, EOFError, OSError, zlib.error) as caught:  # but for the first, gzip's
                error = caught
        if key is not None and (error is None or not _is_torn(error, key)):
            count += 1
            yield _sample_or_error(_named(key, seen), parts)
        if error is not None:
            yield ImageError(self._name, _loss(error, count))


_Part = tuple[_Member, bytes]


def _is_wanted(member: _Member) -> bool:
    ending = (member.split() or ("", ""))[1]
    largest = LARGEST if ending in _TEXTS else Limits().max_file_bytes if ending in _PICTURES else -1
    return not member.refused and member.size <= largest


def _named(key: str, seen: dict[int, int]) -> str:
    """The key, with a number behind it where one before it has it. seen: hash of a key -> the last number behind it."""
    name, number = key, seen.get(hash(key), 1)
    while hash(name) in seen:
        number += 1
        name = f"{key}#{number}"
    seen[hash(key)] = number
    seen.setdefault(hash(name), 1)
    return name


def _sample_or_error(key: str, parts: list[_Part]) -> Sample | ImageError:
    try:
        return _sample(key, parts)
    except (ValueError, RecursionError) as error:
        return ImageError(key, str(error))


def _sample(key: str, parts: list[_Part]) -> Sample:
    """The fields of the .json; captions that it lacks from the .txt, a label from the .cls."""
    bodies: dict[str, bytes] = {}
    picture: bytes | None = None
    for member, data in parts:
        if member.refused:
            raise ValueError(f"its member {member.name!r} is {member.refused}, which is not followed")
        ending = (member.split() or ("", ""))[1]
        if ending in _TEXTS | _PICTURES and not _is_wanted(member):
            raise ValueError(f"its member {member.name!r} is too large: {member.size:,} bytes")
        if ending in _PICTURES and picture is None:
            picture = data
        bodies.setdefault(ending, data)
    if picture is None:
        raise ValueError(f"no image among its members: {', '.join(member.name for member, _ in parts)}")
    json_name, text_name = f"{key}{SIDECARS[1]}", f"{key}{SIDECARS[0]}"
    fields = schema.json_object(bodies["json"], json_name) if "json" in bodies else {}
    if "txt" in bodies and schema.first_field(fields, schema.CAPTION_FIELDS) is None:
        fields["captions"] = schema.lines(bodies["txt"], text_name)
    if "cls" in bodies:
        fields.setdefault("label", bodies["cls"].decode("utf-8", "replace").strip())
    return schema.sample_from_fields(key, picture, fields)


def _loss(error: Exception, count: int) -> str:
    return f"the archive cannot be read beyond its first {count:,} samples: {error}"


def _is_torn(error: Exception, key: str | None) -> bool:
    """Whether the sample before the damage may lack members: not so between members, or in another's member."""
    if not isinstance(error, _EndError) or key is None:
        return True
    return not error.is_clean and error.key in (key, None)


def _members(
    file: _Seekable, limit: int | None, start: int = 0, stop: int | None = None
) -> Iterator[_Member]:
    """The members from `start` until `stop` or the end mark. limit: where the archive ends, None for a stream.

    A file goes on behind its end mark where another archive was joined to it; what else is there is damage. Whoever
    takes a member may read its body first. Raises `_EndError` where the archive is damaged or cut short.
    """
    position = first = start
    zeros = 0
    name, size = "", None  # from extended headers, for the member behind them
    while stop is None or position < stop:
        file.seek(position)
        head = file.read(_BLOCK)
        if len(head) < _BLOCK:
            is_clean = not head.strip(b"\0")
            if zeros and is_clean:
                return
            raise _EndError("it has no end mark" if is_clean else "a header is cut short", is_clean)
        if not head.strip(b"\0"):
            if limit is None:
                return
            position, first, zeros = position + _BLOCK, position + _BLOCK, zeros + _BLOCK
            if zeros > _MAX_ZEROS:
                raise _EndError("zeros follow, and nothing else", True)
            continue
        zeros = 0
        kind, stated = head[156:157], _checked_size(head)
        member = _Member(name or _name(head), "", first, position + _BLOCK, stated if size is None else size)
        if kind in _EXTENDED:
            data = file.read(stated) if stated <= _MAX_NAME else b""
            if len(data) < stated:
                raise _EndError("an extended header is cut short or too long")
            if kind == b"L":
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                name, size = _extended(data, name, size)
            position += _BLOCK + _padded(stated)
            continue
        refused, size = _refusal(kind, member.name), 0 if kind in _BODILESS else member.size
        member = _Member(member.name, refused, first, member.body, size)
        if limit is not None and member.end > limit:
            raise _EndError(f"{member.name!r} is cut short", key=(member.split() or ("",))[0])
        if kind != b"5" and not member.name.endswith("/"):
            yield member
        position = first = member.end
        name, size = "", None


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _checked_size(head: bytes) -> int:
    try:
        checksum = int(head[148:156].strip(b" \0"), 8)
        field = head[124:136]
        large = field[0] & 0x80  # GNU's way for sizes beyond 8 GB
        size = int.from_bytes(field[1:]) if large else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise _EndError("a damaged header, or no tar archive") from None
    if checksum != sum(head) - sum(head[148:156]) + 8 * 32 or size < 0:
        raise _EndError("a damaged header, or no tar archive")
    return size


def _name(head: bytes) -> str:
    name = head[:100].split(b"\0", 1)[0]
    prefix = head[345:500].split(b"\0", 1)[0] if head[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _extended(data: bytes, name: str, size: int | None) -> tuple[str, int | None]:
    """Name and size as a pax header states them, in records of the form "LENGTH KEY=VALUE\\n"."""
    while data:
        try:
            length = int(data.split(b" ", 1)[0])
            key, value = data[:length].rstrip(b"\n").split(b" ", 1)[1].split(b"=", 1)
            if length < 5:
                raise ValueError
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise _EndError("a sparse member")
        except (ValueError, IndexError) as error:
            raise error if isinstance(error, _EndError) else _EndError("a damaged extended header") from None
        data = data[length:]
    return name, size


def _refusal(kind: bytes, name: str) -> str:
    if kind in _REFUSED:
        return _REFUSED[kind]
    parts = name.replace("\\", "/").split("/")
    return _LEADS_OUT if parts[0] == "" or ".." in parts or ":" in parts[0] else ""
