"""The HTML shell: everything is escaped and closed, nothing is fetched."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sightloop.reports import html
from sightloop.reports.html import Html, Tile

# What must come out as text: markup, entities, quotes, lone surrogates (which no file of UTF-8 can hold).
TEXTS = st.text(st.sampled_from("ab <>&\"'/=\udcff\u202e;-!"), max_size=12)
VOID = frozenset({"meta", "img"})


class Page(HTMLParser):
    """Tags and attributes, the text outside of the style sheet, and whether each element is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def shown(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()


@given(TEXTS)
def test_every_text_is_escaped(value: str) -> None:
    page = html.page(
        value,
        value,
        html.tiles([Tile(value, value, value)]),
        html.warning(value),
        html.section(value, html.table([value], [[value], [None]]), note=value),
        html.details(value, html.preformatted(value), html.items([value])),
        html.settings({value: {value: value}, "list": [value]}),
        html.gallery([html.figure(html.inline_image(Image.new("RGB", (9, 9)), 9, value), value)]),
        html.share_bar(value, 0.5),
        value,
    )
    page.encode()
    parsed = Page(page)
    assert {tag for tag, _ in parsed.tags} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "header",
            "h1",
            "h2",
            "p",
            "div",
            "b",
            "span",
        ),
        *(
            "small",
            "section",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "details",
            "summary",
            "pre",
            "ul",
            "li",
        ),
        *("figure", "figcaption", "img"),
    }
    assert parsed.text.count(shown(value)) >= 10 or not value.strip()
    assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)


def test_nothing_is_fetched() -> None:
    image = html.inline_image(Image.new("RGB", (300, 200)), 100)
    page = Page(html.page("title", "", image))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert "href" not in attributes
        assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert "url(" not in html.STYLE
    assert "@import" not in html.STYLE


def test_text_columns_are_aligned_left_and_numbers_right() -> None:
    page = Page(html.table(["name", "value", "reason"], [["a", 1, "b"]], text_columns=(0, 2)))
    cells = [attributes.get("class") for tag, attributes in page.tags if tag in ("th", "td")]
    assert cells == [None, "n", None] * 2


@pytest.mark.parametrize("part", [html.section("heading", "", Html("")), html.details("summary", "")])
def test_a_heading_without_content_is_left_out(part: Html) -> None:
    assert part == ""


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.12345, "0.1235"), (1234.5, "1234"), (1e-5, "1.00e-5"), (2.5e7, "2.50e7"), (-0.5, "-0.5")],
)
def test_numbers(value: float, expected: str) -> None:
    assert html.format_number(value) == expected


def test_counts_shares_and_durations() -> None:
    assert [html.format_count(n) for n in (950, 12_300, 7_960_000, 10**9)] == [
        "950",
        "12.3 k",
        "7.96 M",
        "1 B",
    ]
    assert html.format_percent(0.1234) == "12.3 %"
    assert html.format_percent(None) == "\u2013"
    assert html.format_duration(200) == "3 min 20 s"
    assert html.format_duration(7500) == "2 h 05 min"
