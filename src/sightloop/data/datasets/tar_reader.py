"""Reader of the member headers of tar archives (ustar, pax, GNU), also of damaged ones.

Bodies are skipped, nothing is extracted, and links, devices and names that lead out of a folder are marked as refused.

    | header "x" | "24 path=..." + padding | header "0" | body + padding | ... | 512 zeros | 512 zeros |
    ^ start                                             ^ body           ^ end

A header is a block of 512 bytes; bodies are padded to whole blocks. Fields of a header used here:

    offset  bytes
       0     100    name, ended by a zero
     124      12    size of the body, octal digits; binary after the byte 0x80 (GNU, beyond 8 GB)
     148       8    checksum, octal digits: sum of the header's bytes with these 8 counted as spaces
     156       1    type: "0" file, "1" "2" links, "3" "4" devices, "5" folder, "6" pipe; "x" "g" (pax) and "L" "K"
                    (GNU) extend the header that follows, for example by a long name
     257       6    "ustar" and a zero
     345     155    prefix of the name, if the above is there
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

UNSAFE_NAME = "a name that leads out of its folder"

_BLOCK = 512
_MAX_NAME_BYTES = 1 << 20  # of an extended header
_MAX_ZERO_BYTES = 1 << 21  # after the end: tar pads to a multiple of 10,240 bytes, or of what it is asked for
_REFUSED_TYPES = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
_TYPES_WITHOUT_BODY = (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENDED_TYPES = (b"x", b"g", b"L", b"K")


class Readable(Protocol):
    """A binary stream."""

    def read(self, size: int, /) -> bytes: ...


class Seekable(Readable, Protocol):
    """A binary file, or `ForwardFile`."""

    def seek(self, position: int, /) -> object: ...


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member and its position in the archive.

    Attributes:
        name: path in the archive.
        refusal: why it must not be read ("a link"), or "".
        start: offset of its first header, which may be an extended one.
        body: offset of its content.
        size: bytes of its content.
    """

    name: str
    refusal: str
    start: int
    body: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the next header."""
        return self.body + _padded(self.size)


class TarDamageError(ValueError):
    """The archive cannot be read any further. The message is part of the fingerprint of a shard.

    Attributes:
        is_clean: it ends between two members, so no member is cut.
        member: the member whose body is cut short, if it is one.
    """

    def __init__(self, reason: str, is_clean: bool = False, member: TarMember | None = None) -> None:
        super().__init__(reason)
        self.is_clean, self.member = is_clean, member


class ForwardFile:
    """A stream with `seek` in forward direction, by reading."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._position = stream, 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes."""
        data = self._stream.read(size)
        self._position += len(data)
        return data

    def seek(self, position: int) -> None:
        """Reads up to a position; one before the current position changes nothing."""
        while (distance := position - self._position) > 0:
            if not self.read(min(distance, 1 << 20)):
                raise TarDamageError("it is cut short")


def read_members(
    file: Seekable, length: int | None, start: int = 0, stop: int | None = None
) -> Iterator[TarMember]:
    """Members of an archive, folders excluded. The caller may read the body of a member before it takes the next.

    In a file, reading continues after the end mark if another archive follows (`cat a.tar b.tar`); anything else there
    is damage.

    Args:
        file: positioned anywhere, or at 0 for a `ForwardFile`.
        length: bytes of the archive; None for a stream, or if the range is known to be complete.
        start: offset of the first header.
        stop: offset where the last member ends; None to read until the end mark.

    Raises:
        TarDamageError: a header is damaged, or the archive is cut short.
    """
    position = first = start  # of this header, and of the first header of this member
    zeros = 0  # bytes of zeros before this header
    name, size = "", None  # from extended headers, for the member that follows
    while stop is None or position < stop:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            is_clean = not header.strip(b"\0")
            if zeros and is_clean:
                return
            raise TarDamageError("it has no end mark" if is_clean else "a header is cut short", is_clean)
        if not header.strip(b"\0"):  # a block of the end mark
            if length is None:
                return
            position, first, zeros = position + _BLOCK, position + _BLOCK, zeros + _BLOCK
            if zeros > _MAX_ZERO_BYTES:
                raise TarDamageError("zeros follow, and nothing else", True)
            continue
        zeros = 0
        kind, header_size = header[156:157], _read_size(header)
        if kind in _EXTENDED_TYPES:
            data = file.read(header_size) if header_size <= _MAX_NAME_BYTES else b""
            if len(data) < header_size:
                raise TarDamageError("an extended header is cut short or too long")
            if kind == b"L":
                name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                name, size = _read_pax(data, name, size)
            position += _BLOCK + _padded(header_size)
            continue
        name = name or _read_name(header)
        body_size = 0 if kind in _TYPES_WITHOUT_BODY else header_size if size is None else size
        member = TarMember(name, _refusal(kind, name), first, position + _BLOCK, body_size)
        if length is not None and member.end > length:
            raise TarDamageError(f"{name!r} is cut short", member=member)
        if kind != b"5" and not name.endswith("/"):  # folders
            yield member
        position = first = member.end
        name, size = "", None


def _padded(size: int) -> int:
    """Whole blocks: 0 -> 0, 1 -> 512, 512 -> 512, 513 -> 1024."""
    return -(-size // _BLOCK) * _BLOCK


def _read_size(header: bytes) -> int:
    """Size of the body, once the checksum of the header is verified."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        field = header[124:136]
        is_binary = field[0] & 0x80
        size = int.from_bytes(field[1:]) if is_binary else int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise TarDamageError("a damaged header, or no tar archive") from None
    if checksum != sum(header) - sum(header[148:156]) + 8 * 32 or size < 0:
        raise TarDamageError("a damaged header, or no tar archive")
    return size


def _read_name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape")


def _read_pax(data: bytes, name: str, size: int | None) -> tuple[str, int | None]:
    """Name and size of a pax header, or those given where it has none.

    Records are "LENGTH KEY=VALUE\\n"; LENGTH counts the whole record: b"12 path=a/b\\n" b"11 size=42\\n".
    """
    while data:
        try:
            length = int(data.split(b" ", 1)[0])
            key, value = data[:length].rstrip(b"\n").split(b" ", 1)[1].split(b"=", 1)
            if not 5 <= length <= len(data):  # the shortest record is "5 a=\n"
                raise ValueError
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                size = int(value)
                if size < 0:  # the next header would be before this one, again and again
                    raise ValueError
            elif key.startswith(b"GNU.sparse"):
                raise TarDamageError("a sparse member")
        except (ValueError, IndexError) as error:
            if isinstance(error, TarDamageError):
                raise
            raise TarDamageError("a damaged extended header") from None
        data = data[length:]
    return name, size


def _refusal(kind: bytes, name: str) -> str:
    if kind in _REFUSED_TYPES:
        return _REFUSED_TYPES[kind]
    parts = name.replace("\\", "/").split("/")
    return UNSAFE_NAME if parts[0] == "" or ".." in parts or ":" in parts[0] else ""
