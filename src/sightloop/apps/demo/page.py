"""HTML page of the demonstration: images and results in one file, without scripts."""

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

_SHOWN = 5  # images per search


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Results for one image; what is None or empty is not shown.

    Args:
        name: Name of the image.
        image: Path of a file, or encoded bytes.
        credit: Author of the image.
        caption: The generated caption.
        texts: Text, matching probability, and whether the text is true (None if unknown).
        classes: Label and probability, best first.
        answers: Question and answer.
    """

    name: str
    image: str | bytes
    credit: str = ""
    caption: str | None = None
    texts: tuple[tuple[str, float, bool | None], ...] = ()
    classes: tuple[tuple[str, float], ...] = ()
    answers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class DemoSearch:
    """Result of one search.

    Args:
        query: A text, or the index of an image.
        matches: Index and cosine of images, best first.
        target: Index of the image that the text describes, None if unknown.
    """

    query: str | int
    matches: tuple[tuple[int, float], ...]
    target: int | None = None


def write_page(
    path: Path,
    title: str,
    results: Sequence[DemoResult],
    searches: Sequence[DemoSearch],
    notes: Sequence[str],
    warning: str = "",
) -> Path:
    """Writes the page atomically.

    Args:
        path: The file; its folder is made.
        title: What the page shows.
        results: One card per image.
        searches: Searches among these images.
        notes: Lines under the title.
        warning: A marked line under the title; empty for none.

    Returns:
        `path`.

    Raises:
        ImageError: An image cannot be decoded.
    """
    large = [_image_tag(result, 400) for result in results]
    small = [_image_tag(result, 200) for result in results]
    body = [
        "<header><h1>sightloop</h1>",
        f"<p class=lead>{_text(title)}</p>",
        f"<p class=warning>{_text(warning)}</p>" if warning else "",
        *(f"<p>{_text(note)}</p>" for note in notes),
        "</header>",
        "<section class=cards>",
        *(_card(result, tag) for result, tag in zip(results, large, strict=True)),
        "</section>",
        _search_section("Search by text", [s for s in searches if isinstance(s.query, str)], small),
        _search_section("Search by image", [s for s in searches if isinstance(s.query, int)], small),
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
    """`value` escaped for HTML; what UTF-8 cannot encode is shown as \\udcff."""
    return escape(value.encode("utf-8", "backslashreplace").decode())


def _image_tag(result: DemoResult, side: int) -> str:
    """The tag with the image in it: a JPEG of at most `side` x `side` pixels."""
    image = decode(result.image)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{_text(result.name)}">'


def _card(result: DemoResult, tag: str) -> str:
    credit = f"<small>{_text(result.credit)}</small>" if result.credit else ""
    caption = (
        "" if result.caption is None else f"<blockquote>{_text(result.caption) or '(nothing)'}</blockquote>"
    )
    texts = "".join(
        _bar(text, score, "" if true is None else "true" if true else "false")
        for text, score, true in result.texts
    )
    classes = "".join(_bar(label, probability, "class") for label, probability in result.classes)
    answers = "".join(
        f"<p class=qa>{_text(question)} <b>{_text(answer) or '-'}</b></p>"
        for question, answer in result.answers
    )
    return (
        f"<article><figure>{tag}"
        f"<figcaption>{_text(result.name)} {credit}</figcaption></figure><div>"
        + caption
        + _part("does the text match?", texts)
        + _part("which label?", classes)
        + _part("questions", answers)
        + "</div></article>"
    )


def _part(name: str, content: str) -> str:
    return f"<h3>{name}</h3>{content}" if content else ""


def _bar(text: str, share: float, kind: str) -> str:
    """A text with a bar for its probability, 0 to 1. kind: "true", "false", "class" or ""."""
    percent = f"{100 * share:.0f}"
    tag = f" <i>{kind}</i>" if kind in ("true", "false") else ""
    return (
        f'<div class="bar {kind}"><span>{_text(text)}{tag}</span><b>{percent} %</b>'
        f'<div><div style="width:{percent}%"></div></div></div>'
    )


def _search_section(name: str, searches: Sequence[DemoSearch], tags: Sequence[str]) -> str:
    rows: list[str] = []
    for search in searches:
        query = f"<p>{_text(search.query)}</p>" if isinstance(search.query, str) else tags[search.query]
        figures = "".join(
            f"<figure{' class=right' if index == search.target else ''}>{tags[index]}"
            f"<figcaption>{cosine:.2f}</figcaption></figure>"
            for index, cosine in search.matches[:_SHOWN]
        )
        rows.append(f"<div class=search><div class=query>{query}</div>{figures}</div>")
    if not rows:
        return ""
    has_targets = any(search.target is not None for search in searches)
    legend = "; the image that the text describes has a frame" if has_targets else ""
    note = f"<p>Best first, with the cosine of the embeddings{legend}.</p>"
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
