"""Reader of SentencePiece files (`spiece.model`, `tokenizer.model`): pieces, scores, and the table of characters."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sightloop.errors import TokenizerError


@dataclass(frozen=True, slots=True)
class PieceModel:
    """What a SentencePiece file holds: pieces with their scores and types, and how a text is made ready.

    merged: byte-pair encoding, else Unigram. charsmap: a compiled table of characters and what becomes of them.
    """

    pieces: tuple[tuple[str, float, int], ...]
    is_bpe: bool
    byte_fallback: bool
    unk_id: int
    charsmap: bytes


# Types of pieces and of models in sentencepiece_model.proto.
CONTROL, USER_DEFINED = 3, 4
_UNIGRAM, _BPE = 1, 2


def read_piece_model(data: bytes, *, source: str = "<bytes>") -> PieceModel:
    """Reads the protocol buffer of sentencepiece_model.proto. Raises TokenizerError for anything else."""
    try:
        model = _message(data)
        trainer, normal = (_message(model.get(number, [b""])[-1]) for number in (2, 3))
        kind = trainer.get(3, [_UNIGRAM])[-1]
        if kind not in (_UNIGRAM, _BPE):
            raise ValueError(f"type {kind}, neither Unigram nor BPE")
        return PieceModel(
            pieces=tuple(_piece(_message(piece)) for piece in model[1]),
            is_bpe=kind == _BPE,
            byte_fallback=bool(trainer.get(35, [0])[-1]),
            unk_id=trainer.get(40, [0])[-1],
            charsmap=normal.get(2, [b""])[-1],
        )
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise TokenizerError(f"{source} is no SentencePiece model ({error!r}); fetch it again.") from error


def _piece(fields: dict[int, list[Any]]) -> tuple[str, float, int]:
    return fields[1][-1].decode("utf-8"), struct.unpack("<f", fields[2][-1])[0], fields.get(3, [1])[-1]


def _message(data: bytes) -> dict[int, list[Any]]:
    """Field number -> its values: numbers as int, all else as bytes (protocol buffers, wire format)."""
    out: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        if tag & 7 == 0:
            value, at = _number(data, at)
        else:
            length, at = _number(data, at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = data[at : at + length], at + length
            if at > len(data):
                raise ValueError("cut short")
        out.setdefault(tag >> 3, []).append(value)
    return out


def _number(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length number and where the next field starts: seven bits a byte, the lowest first."""
    value, shift = 0, 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def character_map(data: bytes) -> Callable[[str], str]:
    """SentencePiece's compiled table of replacements: the longest entry that matches at a position is replaced.

    The table is a double-array trie over UTF-8 (32-bit units: label, offset to the children, whether a value hangs
    there), then the replacements, each ended by a zero byte.
    """
    if not data:
        return str
    (size,) = struct.unpack_from("<I", data)
    units = struct.unpack_from(f"<{size // 4}I", data, 4)
    texts = data[4 + size :]

    def find(text: bytes, start: int) -> tuple[int, bytes]:
        """How many bytes the longest entry takes, and what they become; one letter as it is where there is none."""
        length = next(
            (n for n in range(1, 4) if (text[start + n : start + n + 1] or b"\0")[0] & 0xC0 != 0x80), 4
        )
        replacement = text[start : start + length]
        node = _children(units[0])
        for at in range(start, len(text)):
            unit = units[node ^ text[at]]
            if unit & 0x800000FF != text[at]:
                break
            node = node ^ text[at] ^ _children(unit)
            if unit >> 8 & 1:
                value = units[node] & 0x7FFFFFFF
                length, replacement = at + 1 - start, texts[value : texts.index(b"\0", value)]
        return length, replacement

    def replace(text: str) -> str:
        source, out, at = text.encode(), bytearray(), 0
        while at < len(source):
            length, replacement = find(source, at)
            out += replacement
            at += length
        return out.decode()

    return replace


def _children(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
