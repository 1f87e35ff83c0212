"""HTML page of the demonstration: images and results in one file, without scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sightloop.data.atomic import atomic_write
from sightloop.data.images.decode import decode
from sightloop.reports import html
from sightloop.reports.html import Html

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
    large = [html.inline_image(decode(result.image), 420, result.name) for result in results]
    small = [html.inline_image(decode(result.image), 220, result.name) for result in results]
    cards = [_card(result, image) for result, image in zip(results, large, strict=True)]
    page = html.page(
        "sightloop demonstration",
        title,
        html.warning(warning) if warning else "",
        *(html.paragraph(note) for note in notes),
        html.element("section", *cards, class_="cards"),
        _search_section("Search by text", [s for s in searches if isinstance(s.query, str)], small),
        _search_section("Search by image", [s for s in searches if isinstance(s.query, int)], small),
        style=_STYLE,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page)
    return path


def _card(result: DemoResult, image: Html) -> Html:
    caption = (
        Html("") if result.caption is None else html.element("blockquote", result.caption or "(no caption)")
    )
    texts = [
        html.share_bar(
            html.join(
                [html.text(text), "" if true is None else html.element("i", " true" if true else " false")]
            ),
            score,
            "" if true is None else "good" if true else "bad",
        )
        for text, score, true in result.texts
    ]
    classes = [html.share_bar(label, probability) for label, probability in result.classes]
    answers = [
        html.element("p", question, " ", html.element("b", answer or "-"), class_="answer")
        for question, answer in result.answers
    ]
    credit = html.element("small", result.credit) if result.credit else ""
    return html.element(
        "article",
        html.figure(image, result.name, " ", credit),
        html.element(
            "div",
            caption,
            _part("Does the text match?", texts),
            _part("Which label?", classes),
            _part("Questions", answers),
        ),
    )


def _part(heading: str, content: Sequence[Html]) -> Html:
    return html.join([html.element("h3", heading), *content]) if content else Html("")


def _search_section(name: str, searches: Sequence[DemoSearch], images: Sequence[Html]) -> Html:
    rows: list[Html] = []
    for search in searches:
        query = html.paragraph(search.query) if isinstance(search.query, str) else images[search.query]
        figures = (
            html.element(
                "figure",
                images[index],
                html.element("figcaption", f"{cosine:.2f}"),
                class_="target" if index == search.target else "",
            )
            for index, cosine in search.matches[:_SHOWN]
        )
        rows.append(
            html.element("div", html.element("div", query, class_="query"), *figures, class_="search")
        )
    has_targets = any(search.target is not None for search in searches)
    legend = "; the image that the text describes has a frame" if has_targets else ""
    return html.section(
        name, *rows, note=f"Best first, with the cosine similarity of the embeddings{legend}."
    )


_STYLE = """
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(500px,100%),1fr));gap:18px;margin-top:22px}
article{display:grid;grid-template-columns:200px 1fr;gap:18px;background:var(--card);border-radius:10px;padding:16px;
align-items:start}article h3{font-size:13px;color:var(--soft);font-weight:500;margin:14px 0 4px}
article img{width:100%}blockquote{margin:0;font-size:18px;line-height:1.35}
.bar i{font-size:12px;font-style:normal;color:var(--soft)}.answer{margin:0}
.search{display:grid;grid-template-columns:1.25fr repeat(5,1fr);gap:12px;align-items:center;padding:12px 0;
border-top:1px solid var(--rule)}.search img{width:100%;aspect-ratio:4/3;object-fit:cover}
.search figcaption{text-align:center;font-variant-numeric:tabular-nums}.query p{font-size:16px;margin:0}
.target img{outline:3px solid var(--good);outline-offset:2px}
@media(max-width:640px){article{grid-template-columns:1fr}.search{grid-template-columns:repeat(3,1fr)}
.query{grid-column:1/4}.query img{max-width:60%}}
"""
