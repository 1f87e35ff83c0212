"""Tar shards full of what is not a good image. Every sample's key begins with a number of its own."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

Members = list[tuple[tarfile.TarInfo, bytes]]
# The members of one sample, from its number and a random source.
Maker = Callable[[str, random.Random], Members]


def good(shade: int = 90, form: str = "JPEG", size: tuple[int, int] = (48, 40)) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).point(lambda v: (v + shade) % 256).convert("RGB").save(file, form)
    return file.getvalue()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks, (b"IEND", b"")]
    found = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + found


def file(name: str, data: bytes = b"") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info, data


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def broken(data: bytes | Callable[[random.Random], bytes], ending: str = "jpg") -> Maker:
    return lambda key, draw: [file(f"{key}.{ending}", data if isinstance(data, bytes) else data(draw))]


def named(form: str) -> Maker:
    return lambda key, draw: [file(form.format(key), good(draw.randrange(99)))]


def told(text: bytes, ending: str = "json") -> Maker:
    return lambda key, draw: [file(f"{key}.jpg", good()), file(f"{key}.{ending}", text)]


def link(kind: bytes, secret: Path) -> Maker:
    return lambda key, draw: [special(f"{key}.jpg", kind, str(secret))]


def flipped(draw: random.Random) -> bytes:
    data = bytearray(good(form=draw.choice(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])))
    for _ in range(draw.randrange(1, 40)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def never(secret: Path) -> list[Maker]:
    """What must be reported and must not come out."""
    idat = (b"IDAT", zlib.compress(bytes(3 * 64 * 64 + 64)))
    magic = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\0", b"RIFF\0\0\0\0WEBP"]
    return [
        broken(b""),
        broken(b"\0" * 4096),
        broken(lambda draw: good(size=(400, 300))[: draw.randrange(4, 900)]),
        broken(lambda draw: good(form="PNG", size=(400, 300))[: draw.randrange(9, 60)], "png"),
        broken(lambda draw: draw.choice(magic) + draw.randbytes(draw.randrange(2000))),
        broken(png(60_000, 60_000, idat), "png"),
        broken(png(2**31 - 1, 2**31 - 1, idat), "png"),
        broken(png(0, 0, idat), "png"),
        broken(png(64, 64, (b"IDAT", b"no zlib")), "png"),
        broken(b"BM" + struct.pack("<IIIIiiHH", 54, 0, 54, 40, 2**30, -(2**30), 1, 24) + bytes(24), "bmp"),
        broken(b"GIF89a" + struct.pack("<HH", 65535, 65535) + bytes(60), "gif"),
        broken(b"II*\0\x08\0\0\0\xff\xff" + bytes(600), "tif"),
        broken(b'<svg xmlns="x"><image href="file:///etc/passwd"/></svg>'),
        broken(b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>', "png"),
        broken(b"%!PS\n(/tmp/pwned) (w) file closefile showpage", "jpg"),
        broken(b"#!/bin/sh\ntouch pwned\n", "png"),
        broken(b"MZ\x90\0" + bytes(300), "jpg"),
        broken(b"PK\x03\x04" + bytes(300), "jpg"),
        broken(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.", "jpg"),
        broken(b"P6\n99999999 99999999\n255\n", "jpg"),
        link(tarfile.SYMTYPE, secret),
        link(tarfile.LNKTYPE, secret),
        link(tarfile.CHRTYPE, secret),
        link(tarfile.BLKTYPE, secret),
        link(tarfile.FIFOTYPE, secret),
        lambda key, draw: [file(f"{key}.jpg", good()), special(f"{key}.txt", tarfile.SYMTYPE, str(secret))],
        named(f"{secret.parent}/{{}}.jpg"),
        named("../{}.jpg"),
        named("a/../../{}.jpg"),
        named("..\\{}.jpg"),
        named("C:/{}.jpg"),
        lambda key, draw: [file(f"{key}.txt", b"a text without an image")],
        told(b"{" * 5000),
        told(b"[1]"),
        told(b"\xff\xfe\x00"),
        told(b'{"caption": 7}'),
        told(b'{"caption": ["a", {}]}'),
        told(b'{"caption": "\\ud800"}'),
        told(b'{"caption": "a", "qa": [{"question": "?"}]}'),
        told(b'{"caption": "a", "regions": [{"box": [1, 2]}]}'),
        told(b"caf\xe9", "txt"),
    ]


def perhaps() -> list[Maker]:
    """Odd, but an image; or damaged in a way that a decoder may not see."""
    plain = b"a red square"
    return [
        broken(flipped),
        named("{}" + "n" * 300 + ".jpg"),
        named("{}" + "d/" * 40 + "n" * 3000 + ".jpg"),
        broken(lambda draw: good() + draw.randbytes(5000)),
        broken(
            png(
                64,
                64,
                (b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24))),
                (b"IDAT", good()),
                (b"x" * 4, b""),
            )
        ),
        broken(good(form="PNG"), "jpg"),
        lambda key, draw: [
            file(f"{key}.jpg", good(1)),
            file(f"{key}.png", good(2)),
            file(f"{key}.jpg", good(3)),
        ],
        named("{}$(touch pwned);`touch pwned`|touch pwned.jpg"),
        named("{}\n\x1b[31m\r\x07.jpg"),
        named("{}\udcff\udcfe.jpg"),
        named("{} <script>alert(1)</script> & 'x' \" .jpg"),
        told(b'{"caption": "<script>alert(1)</script>", "image": "/etc/passwd", "key": "../../x"}'),
        told(json.dumps({"caption": "word " * 20_000}).encode()),
        told(json.dumps({"captions": [f"text {i}" for i in range(30)]}).encode()),
        told(json.dumps({"caption": "a \u202e\u0000\u200b b", "n": 1e300}).encode()),
        told(b'{"caption": "a", "deep": ' + b"[" * 200 + b"]" * 200 + b"}"),
        told(plain, "txt"),
    ]


def write_shards(folder: Path, secret: Path, shards: int, each: int) -> tuple[set[str], set[str]]:
    """Shards of so many hostile samples with a good one at either end; (numbers that must fail, those that may)."""
    draw, must, may = random.Random(0), set[str](), set[str]()
    bad, odd = never(secret), perhaps()
    for shard in range(shards):
        path = folder / f"{shard:03}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
            samples: list[Members] = []
            for place in range(each):
                number = shard * each + place
                key = f"h{number:05}"
                if place % 5 == 4:
                    may.add(key)
                    samples.append(odd[number // 5 % len(odd)](key, draw))
                else:
                    must.add(key)
                    samples.append(bad[(number - number // 5) % len(bad)](key, draw))
            first, last = (
                [file(f"good{shard}{end}.jpg", good(shard)), file(f"good{shard}{end}.txt", b"a dog")]
                for end in "ab"
            )
            for info, data in (member for members in (first, *samples, last) for member in members):
                tar.addfile(info, io.BytesIO(data))
    return must, may
