"""Which copies of photographs are found, and how many false ones: `python -m benchmarks.duplicates -d dev-000.tar`.

Every photograph is changed in each way, and the changed ones are searched among all originals. False pairs are
counted among the originals themselves, all pairs of them, and among all that was found.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

import sightloop
from sightloop.data.copies.copies import CopySet
from sightloop.data.copies.image_hash import draft_hashes
from sightloop.data.images.decode import decode


def _encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _cropped(
    share: float, left: float | None = 0.5, top: float | None = 0.5
) -> Callable[[Image.Image], bytes]:
    """A crop of a share of both sides; None for a random place."""
    rng = np.random.default_rng(0)

    def crop(image: Image.Image) -> bytes:
        width, height = image.size
        x = round(width * (1 - share) * (rng.random() if left is None else left))
        y = round(height * (1 - share) * (rng.random() if top is None else top))
        return _encoded(image.crop((x, y, x + round(width * share), y + round(height * share))))

    return crop


def _recolored(image: Image.Image) -> bytes:
    """The image with each hue turned by a third of the circle: as a shirt of the same shape in another color."""
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] += np.uint8(85)
    return _encoded(Image.fromarray(hsv, "HSV").convert("RGB"))


def _transposed(method: Image.Transpose) -> Callable[[Image.Image], bytes]:
    return lambda image: _encoded(image.transpose(method))


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG, quality 30": lambda im: _encoded(im, "JPEG", quality=30),
    "half size": lambda im: _encoded(im.resize((im.width // 2, im.height // 2))),
    "25 % brighter": lambda im: _encoded(ImageEnhance.Brightness(im).enhance(1.25)),
    "gray": lambda im: _encoded(im.convert("L")),
    "5 % off one side": lambda im: _encoded(im.crop((0, 0, im.width, round(im.height * 0.95)))),
    "95 % of the sides, center": _cropped(0.95),
    "95 %, corner": _cropped(0.95, 0.0, 0.0),
    "95 %, anywhere": _cropped(0.95, None, None),
    "90 %, center (5 % off each side)": _cropped(0.9),
    "90 %, anywhere": _cropped(0.9, None, None),
    "80 %, anywhere": _cropped(0.8, None, None),
    "black frame of 4 %": lambda im: _encoded(ImageOps.expand(im, round(im.width * 0.04), 0)),
    "mirrored": _transposed(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": _transposed(Image.Transpose.FLIP_TOP_BOTTOM),
    "quarter turn": _transposed(Image.Transpose.ROTATE_90),
    "half turn": _transposed(Image.Transpose.ROTATE_180),
    "three quarters": _transposed(Image.Transpose.ROTATE_270),
    "half as saturated": lambda im: _encoded(ImageEnhance.Color(im).enhance(0.5)),
    "another hue (no copy)": lambda im: _recolored(im),
    "turned by 3 degrees": lambda im: _encoded(im.rotate(3, Image.Resampling.BICUBIC)),
}


def copy_set_of(encoded: Iterable[bytes]) -> CopySet:
    """Encoded images as a set in which copies are searched."""
    spectra, colors = zip(*map(draft_hashes, encoded), strict=True)
    return CopySet(np.stack(spectra), np.stack(colors))


def pairs_of(first: CopySet, second: CopySet | None = None) -> set[tuple[int, int]]:
    """Rows of the copies between two sets, or within one."""
    found = first.copies() if second is None else first.copies_in(second)
    pairs = {(int(a), int(b)) for copies in found for a, b in zip(copies.first, copies.second, strict=True)}
    pairs |= (
        {(int(rows[0]), int(row)) for rows in first.same for row in rows[1:]} if second is None else set()
    )
    return {(min(a, b), max(a, b)) for a, b in pairs} if second is None else pairs


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the shares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--data", required=True, help="photographs")
    parser.add_argument("--images", type=int, default=1000, help="of the data (1,000)")
    options = parser.parse_args(arguments)
    dataset = sightloop.open_dataset(options.data)
    dataset = dataset.select(range(min(options.images, len(dataset))))
    images = [decode(sample.image) for sample in dataset]
    originals = copy_set_of(_encoded(image) for image in images)
    start = time.perf_counter()
    false = pairs_of(originals)
    seconds = time.perf_counter() - start
    count = len(images) * (len(images) - 1) // 2
    print(f"{len(images):,} photographs, {count:,} pairs in {seconds:.1f} s: {len(false)} called copies")
    print("".join(f"  {dataset.key(a)} = {dataset.key(b)}\n" for a, b in sorted(false)), end="")
    for name, change in CHANGES.items():
        changed = copy_set_of(change(image) for image in images)
        pairs = pairs_of(changed, originals)
        right = {a for a, b in pairs if a == b}
        others = {(a, b) for a, b in pairs if a != b and (min(a, b), max(a, b)) not in false}
        print(
            f"{name:<34} found {100 * len(right) / len(images):5.1f} %   false pairs {len(others)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
