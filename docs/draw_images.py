"""Draws the images of the documentation: `python docs/draw_images.py`."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent / "images"
SIDE, GAP = 192, 12
# Of the unseen scenes with seed 3.
SCENES = (
    "a black circle left of two white squares",
    "a yellow star inside a green square",
    "two blue crosses left of two purple rings",
)
# R@1 by ITC on rendered scenes, with its 95 % interval (docs/explanation/capfilt.md).
CAPFILT = {
    "none": (0.508, 0.083),
    "captioner": (0.641, 0.014),
    "filter": (0.743, 0.044),
    "both": (0.797, 0.026),
}


def draw_scenes() -> Image.Image:
    """Three rendered scenes in a row."""
    from sightloop.data.datasets.synthetic import synthetic_world

    scenes = {sample.captions[0]: sample.image for sample in synthetic_world("unseen", 12, 3, size=SIDE)}
    row = Image.new("RGB", (len(SCENES) * (SIDE + GAP) - GAP, SIDE), "white")
    for place, caption in enumerate(SCENES):
        image = scenes[caption]
        assert isinstance(image, bytes)
        row.paste(Image.open(io.BytesIO(image)).convert("RGB"), (place * (SIDE + GAP), 0))
    return row


def draw_bars() -> str:
    """A bar with its interval for each use of CapFilt, as SVG."""
    height, left, scale = 34, 96, 420
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 {len(CAPFILT) * height + 34}" '
        'font-family="sans-serif" font-size="14">'
    ]
    parts.append('<rect width="100%" height="100%" fill="#fff"/>')
    for row, (name, (value, interval)) in enumerate(CAPFILT.items()):
        y = row * height + 8
        low, high = (left + scale * (value + sign * interval) for sign in (-1, 1))
        middle = y + 10
        parts += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end" fill="#333">{name}</text>',
            f'<rect x="{left}" y="{y}" width="{scale * value:.1f}" height="20" fill="#5c6bc0"/>',
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {y + 5}v10M{high:.1f} {y + 5}v10" '
            'stroke="#1a237e" stroke-width="1.5"/>',
            f'<text x="{high + 8:.1f}" y="{y + 15}" fill="#333">{value:.3f} ± {interval:.3f}</text>',
        ]
    bottom = len(CAPFILT) * height + 22
    parts.append(
        f'<text x="{left}" y="{bottom}" fill="#333">R@1 by ITC after CapFilt, rendered scenes, 5 seeds</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    draw_scenes().save(FOLDER / "scenes.jpg", quality=85)
    (FOLDER / "capfilt.svg").write_text(draw_bars(), encoding="utf-8")
