"""The page of the demonstration: images and what a model read in them, in one HTML file without scripts."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from sightloop.data.atomic import atomic_write
from sightloop.data.images.decode import decode

_FOUND = 5  # images shown for a search


@dataclass(frozen=True, slots=True)
class DemoResult:
    """One image, a path or encoded bytes, and what was read in it; what is None or empty is not shown.

    texts: (text, probability of a match, whether it is true, None where nobody knows). classes: (label, probability),
    best first. answers: (question, answer).
    """

    name: str
    picture: str | bytes
    credit: str = ""
    caption: str | None = None
    texts: tuple[tuple[str, float, bool | None], ...] = ()
    classes: tuple[tuple[str, float], ...] = ()
    answers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class DemoSearch:
    """query: a text, or the place of an image. found: (place of an image, cosine), best first. right: the place of
    the image that a text means, None where nobody knows."""

    query: str | int
    found: tuple[tuple[int, float], ...]
    right: int | None = None


def write_page(
    path: Path,
    title: str,
    readings: Sequence[DemoResult],
    searches: Sequence[DemoSearch],
    notes: Sequence[str],
    warning: str = "",
) -> Path:
    """Writes the page, whole or not at all, and returns its path. Raises ImageError for an image that is none."""
    large = [_image(reading, 400) for reading in readings]
    small = [_image(reading, 200) for reading in readings]
    body = [
        "<header><h1>sightloop</h1>",
        f"<p class=lead>{_text(title)}</p>",
        f"<p class=warning>{_text(warning)}</p>" if warning else "",
        *(f"<p>{_text(note)}</p>" for note in notes),
        "</header>",
        "<section class=cards>",
        *(_card(reading, image) for reading, image in zip(readings, large, strict=True)),
        "</section>",
        _searches("Search by text", [s for s in searches if isinstance(s.query, str)], small),
        _searches("Search by image", [s for s in searches if isinstance(s.query, int)], small),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>sightloop: {_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)
    return path


def _text(value: str) -> str:
    return escape(value.encode("utf-8", "backslashreplace").decode())


def _image(reading: DemoResult, side: int) -> str:
    """The tag with the image in it: a JPEG of at most `side` pixels a side."""
    image = decode(reading.picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{_text(reading.name)}">'


def _card(reading: DemoResult, image: str) -> str:
    credit = f"<small>{_text(reading.credit)}</small>" if reading.credit else ""
    caption = (
        "" if reading.caption is None else f"<blockquote>{_text(reading.caption) or '(nothing)'}</blockquote>"
    )
    texts = "".join(
        _bar(text, score, "" if true is None else "true" if true else "false")
        for text, score, true in reading.texts
    )
    classes = "".join(_bar(label, probability, "class") for label, probability in reading.classes)
    answers = "".join(
        f"<p class=qa>{_text(asked)} <b>{_text(said) or '-'}</b></p>" for asked, said in reading.answers
    )
    return (
        f"<article><figure>{image}"
        f"<figcaption>{_text(reading.name)} {credit}</figcaption></figure><div>"
        + caption
        + _part("does the text fit?", texts)
        + _part("which label?", classes)
        + _part("asked", answers)
        + "</div></article>"
    )


def _part(name: str, inside: str) -> str:
    return f"<h3>{name}</h3>{inside}" if inside else ""


def _bar(text: str, share: float, kind: str) -> str:
    percent = f"{100 * share:.0f}"
    said = f" <i>{kind}</i>" if kind in ("true", "false") else ""
    return (
        f'<div class="bar {kind}"><span>{_text(text)}{said}</span><b>{percent} %</b>'
        f'<div><div style="width:{percent}%"></div></div></div>'
    )


def _searches(name: str, searches: Sequence[DemoSearch], images: Sequence[str]) -> str:
    rows: list[str] = []
    for search in searches:
        query = f"<p>{_text(search.query)}</p>" if isinstance(search.query, str) else images[search.query]
        found = "".join(
            f"<figure{' class=right' if place == search.right else ''}>{images[place]}"
            f"<figcaption>{cosine:.2f}</figcaption></figure>"
            for place, cosine in search.found[:_FOUND]
        )
        rows.append(f"<div class=search><div class=query>{query}</div>{found}</div>")
    if not rows:
        return ""
    frame = any(search.right is not None for search in searches)
    key = "; the image that is meant has a frame" if frame else ""
    note = f"<p>Nearest first, with the cosine of the embeddings{key}.</p>"
    return f"<section><h2>{name}</h2>{note}{''.join(rows)}</section>"


_STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf7;--ink:#1d2126;--soft:#6b7178;--rule:#e4e1d9;--card:#fff;
--track:#eceae4;--good:#2f8f5b;--bad:#c9705f;--line:#4a6fa5}
@media(prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e6e6e3;--soft:#969ba1;--rule:#2b2f34;--card:#1c1f23;
--track:#2b2f34;--good:#58b985;--bad:#d98b7c;--line:#7d9fd0}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 64px}
h1{font:600 34px/1.1 Georgia,serif;margin:0 0 6px;letter-spacing:-.01em}
h2{font:600 23px/1.2 Georgia,serif;margin:44px 0 2px}
h3{font-size:11px;font-weight:600;letter-spacing:.08em;text-transform:uppercase;color:var(--soft);margin:16px 0 5px}
header p,section>p{color:var(--soft);margin:3px 0;max-width:78ch}header .lead{color:var(--ink);font-size:17px}
header .warning{border-left:4px solid var(--bad);background:var(--card);border-radius:4px;padding:9px 14px;
margin:14px 0 12px;color:var(--ink)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(520px,100%),1fr));gap:20px;margin-top:28px}
article{display:grid;grid-template-columns:210px 1fr;gap:20px;background:var(--card);border:1px solid var(--rule);
border-radius:14px;padding:18px;align-items:start}
figure{margin:0}img{display:block;width:100%;border-radius:8px}
figcaption{font-size:13px;color:var(--soft);margin-top:6px}figcaption small{display:block;font-size:11px}
blockquote{margin:0;font:italic 20px/1.35 Georgia,serif;text-wrap:balance}
.bar{display:grid;grid-template-columns:1fr auto;column-gap:10px;font-size:13.5px;line-height:1.35;margin:6px 0}
.bar b{font-weight:500;font-variant-numeric:tabular-nums}.bar i{font-size:11px;font-style:normal;color:var(--soft)}
.bar>div{grid-column:1/3;height:6px;border-radius:3px;background:var(--track);overflow:hidden;margin-top:3px}
.bar>div>div{height:100%;border-radius:3px;background:var(--line)}
.true>div>div{background:var(--good)}.true i{color:var(--good)}.false>div>div{background:var(--bad)}
.qa{margin:0;font-size:14px}.qa b{margin-left:6px}
.search{display:grid;grid-template-columns:1.25fr repeat(5,1fr);gap:14px;align-items:center;padding:14px 0;
border-top:1px solid var(--rule)}section>p+.search{margin-top:12px}
.query p{font:italic 19px/1.3 Georgia,serif;margin:0;text-wrap:balance}.search img{aspect-ratio:4/3;object-fit:cover}
.query img{width:78%}.search figcaption{text-align:center;margin-top:3px;font-variant-numeric:tabular-nums}
.right img{outline:3px solid var(--good);outline-offset:2px}
@media(max-width:640px){article{grid-template-columns:1fr}.search{grid-template-columns:1fr 1fr 1fr}
.query{grid-column:1/4}}
"""
