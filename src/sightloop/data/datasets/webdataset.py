"""WebDataset shards: tar archives in which members whose names are equal up to the first dot are one sample.

    a/x.jpg  a/x.txt  a/x.json   b.png  b.cls      ->   samples "a/x" and "b"

Opening a shard walks its headers once; two offsets per sample are kept. Nothing is extracted. Links, devices and names
that lead out of a folder make their sample fail.
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
from itertools import chain
from pathlib import Path
from typing import TypeAlias

from sightloop.data.datasets import schema
from sightloop.data.datasets.folder import unescape_key
from sightloop.data.datasets.sidecar_files import CAPTION_EXTENSIONS, MAX_SIDECAR_BYTES
from sightloop.data.datasets.tar_reader import (
    UNSAFE_NAME,
    ForwardFile,
    Readable,
    TarDamageError,
    TarMember,
    read_members,
)
from sightloop.data.image_names import EXTENSIONS
from sightloop.errors import ImageError
from sightloop.types import Limits, Sample

# WebDataset's rule: "a/x.b.jpg" -> key "a/x", extension "b.jpg". Names with no dot, or one in front, are ignored.
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
_CAPTION_EXTENSIONS = tuple(extension.removeprefix(".") for extension in CAPTION_EXTENSIONS)
_TEXT_EXTENSIONS = frozenset((*_CAPTION_EXTENSIONS, "json", "cls"))
_IMAGE_EXTENSIONS = frozenset(extension.removeprefix(".") for extension in EXTENSIONS)

_Part: TypeAlias = tuple[TarMember, bytes]  # of a sample; the content is empty where it is not used


class ShardSource:
    """Source of the samples of a .tar file. Data that cannot be read is one more record at the end, which raises."""

    def __init__(self, path: Path) -> None:
        """Walks the headers."""
        self._path, self.name = path, path.name
        # Of each sample: offsets of its first header and of the end of its last member, hash of its key.
        self._starts, self._ends, self._key_hashes = array("q"), array("q"), array("q")
        self._damage = ""
        ignored, extensions, last_key = Counter[str](), set[str](), None
        with path.open("rb") as file:
            try:
                for member in read_members(file, path.stat().st_size):
                    parts = _split_name(member)
                    if parts is None:
                        continue
                    key, extension = parts
                    # A second .jpg of a key begins another sample with that key.
                    if key != last_key or extension in extensions:
                        self._starts.append(member.start)
                        self._ends.append(member.end)
                        self._key_hashes.append(schema.key_hash(key))
                        extensions.clear()
                    last_key, self._ends[-1] = key, member.end
                    extensions.add(extension)
                    ignored[extension] += extension not in _TEXT_EXTENSIONS | _IMAGE_EXTENSIONS
            except TarDamageError as error:
                if last_key is not None and _may_be_incomplete(error, last_key):
                    for values in (self._starts, self._ends, self._key_hashes):
                        values.pop()
                self._damage = _describe_damage(error, len(self._starts))
        kinds = ", ".join(f"{count:,} .{extension}" for extension, count in sorted(ignored.items()) if count)
        self.notes = (f"{path.name}: members of other kinds are left out: {kinds}",) if kinds else ()

    def __len__(self) -> int:
        return len(self._starts) + bool(self._damage)

    def key_hashes(self) -> Iterator[int]:
        """`schema.key_hash` of every key."""
        return chain(self._key_hashes, [schema.key_hash(self._path.name)] * bool(self._damage))

    def key(self, index: int) -> str:
        """The key of a record."""
        if index == len(self._starts):
            return self._path.name
        parts = _split_name(next(self._members(index)))
        return self._path.name if parts is None else parts[0]

    def sample(self, index: int, key: str) -> Sample:
        """The record under its key. Raises ValueError or OSError if it is broken."""
        if index == len(self._starts):
            raise ValueError(self._damage)
        with self._path.open("rb") as file:
            parts: list[_Part] = []
            for member in self._members(index):
                file.seek(member.body)
                parts.append((member, file.read(member.size) if _is_used(member) else b""))
        return _read_sample(key, parts)

    def digest(self) -> str:
        """SHA-256 of the names and sizes of the members, and of the contents of those that are text."""
        digest = hashlib.sha256()
        with self._path.open("rb") as file:
            try:
                for member in read_members(file, self._path.stat().st_size):
                    digest.update(repr((member.name, member.size)).encode("utf-8", "surrogateescape"))
                    if _extension(member) in _TEXT_EXTENSIONS and member.size <= MAX_SIDECAR_BYTES:
                        file.seek(member.body)
                        digest.update(file.read(member.size))
            except TarDamageError as error:
                digest.update(str(error).encode())
        return digest.hexdigest()

    def _members(self, index: int) -> Iterator[TarMember]:
        with self._path.open("rb") as file:
            yield from read_members(file, None, self._starts[index], self._ends[index])


class StreamSource:
    """Source that is read once and in order: a tar on standard input or in a named pipe, or a .tar.gz.

    Repeated keys are numbered as they come, by their hashes. Keys ahead are unknown, so "a", "a", "a#2" become "a",
    "a#2", "a#2#2", where a file would give "a", "a#3", "a#2".
    """

    notes: tuple[str, ...] = ()

    def __init__(self, path: Path | None) -> None:
        """path: None for standard input."""
        self._path = path
        self._name = "standard input" if path is None else path.name

    def _open(self) -> AbstractContextManager[Readable]:
        if self._path is None:
            return nullcontext(sys.stdin.buffer)
        is_pipe = stat.S_ISFIFO(self._path.stat().st_mode)
        return self._path.open("rb") if is_pipe else gzip.open(self._path)

    def samples(self) -> Iterator[Sample | ImageError]:
        """Every sample, and for a broken one its error. The end of a damaged archive is one more error."""
        parts: list[_Part] = []  # of the sample that is being collected
        key, count, extensions = None, 0, set[str]()
        last_numbers: dict[int, int] = {}
        error: Exception | None = None
        with self._open() as stream:
            file = ForwardFile(stream)
            try:
                for member in read_members(file, None):
                    names = _split_name(member)
                    if names is None:
                        continue
                    if key is not None and (names[0] != key or names[1] in extensions):
                        count += 1
                        yield _sample_or_error(_number_key(key, last_numbers), parts)
                        parts = []
                        extensions.clear()
                    key = names[0]
                    extensions.add(names[1])
                    data = file.read(member.size) if _is_used(member) else b""
                    if _is_used(member) and len(data) < member.size:
                        raise TarDamageError(f"{member.name!r} is cut short", member=member)
                    parts.append((member, data))
            except (TarDamageError, EOFError, OSError, zlib.error) as caught:  # all but the first are gzip's
                error = caught
        if key is not None and (error is None or not _may_be_incomplete(error, key)):
            count += 1
            yield _sample_or_error(_number_key(key, last_numbers), parts)
        if error is not None:
            yield ImageError(self._name, _describe_damage(error, count))


def _split_name(member: TarMember) -> tuple[str, str] | None:
    """Key and extension (lower case, without the dot) of a member; None if it is not part of a sample."""
    if member.refusal == UNSAFE_NAME:  # reported, even if the name has no extension
        stem, dot, extension = member.name.rpartition(".")
        return unescape_key(stem if dot else member.name), extension.lower()
    match = _KEY.fullmatch(member.name)
    is_hidden = member.name.rpartition("/")[2].startswith(("._", "__"))  # metadata of macOS and WebDataset
    return None if match is None or is_hidden else (unescape_key(match[1]), match[2].lower())


def _extension(member: TarMember) -> str:
    return (_split_name(member) or ("", ""))[1]


def _is_used(member: TarMember) -> bool:
    """Whether the content of a member is read: a text or an image that is not refused or too large."""
    extension = _extension(member)
    if extension in _TEXT_EXTENSIONS:
        max_bytes = MAX_SIDECAR_BYTES
    else:
        max_bytes = Limits().max_file_bytes if extension in _IMAGE_EXTENSIONS else -1
    return not member.refusal and member.size <= max_bytes


def _number_key(key: str, last_numbers: dict[int, int]) -> str:
    """The key, with the next free number if it repeats: "a", "a#2", "a#3". last_numbers: by hash of the key."""
    name, number = key, last_numbers.get(hash(key), 1)
    while hash(name) in last_numbers:
        number += 1
        name = f"{key}#{number}"
    last_numbers[hash(key)] = number
    last_numbers.setdefault(hash(name), 1)
    return name


def _sample_or_error(key: str, parts: list[_Part]) -> Sample | ImageError:
    try:
        return _read_sample(key, parts)
    except (ValueError, RecursionError) as error:
        return ImageError(key, str(error))


def _read_sample(key: str, parts: list[_Part]) -> Sample:
    """A sample from its members: fields of the .json, else captions of the .txt or .caption, label of the .cls."""
    contents: dict[str, bytes] = {}  # by extension
    image: bytes | None = None
    for member, data in parts:
        if member.refusal:
            raise ValueError(f"its member {member.name!r} is {member.refusal}, which is not followed")
        extension = _extension(member)
        if extension in _TEXT_EXTENSIONS | _IMAGE_EXTENSIONS and not _is_used(member):
            raise ValueError(f"its member {member.name!r} is too large: {member.size:,} bytes")
        if extension in _IMAGE_EXTENSIONS and image is None:
            image = data
        contents.setdefault(extension, data)
    if image is None:
        raise ValueError(f"no image among its members: {', '.join(member.name for member, _ in parts)}")
    fields = schema.json_object(contents["json"], f"{key}.json") if "json" in contents else {}
    text = next((extension for extension in _CAPTION_EXTENSIONS if extension in contents), None)
    if text is not None and schema.first_field(fields, schema.CAPTION_FIELDS) is None:
        fields["captions"] = schema.split_captions(contents[text], f"{key}.{text}")
    if "cls" in contents:
        fields.setdefault("label", contents["cls"].decode("utf-8", "replace").strip())
    return schema.sample_from_fields(key, image, fields)


def _describe_damage(error: Exception, count: int) -> str:
    return f"the archive cannot be read beyond its first {count:,} samples: {error}"


def _may_be_incomplete(error: Exception, key: str) -> bool:
    """Whether the last sample, `key`, may lack members because of the damage.

    Not if the archive ends between two members, or in the body of a member of another sample.
    """
    if not isinstance(error, TarDamageError):
        return True
    if error.is_clean:
        return False
    return error.member is None or (_split_name(error.member) or ("",))[0] == key
