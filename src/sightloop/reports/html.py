"""HTML pages of reports: page frame, style sheet, tiles, tables and figures, in one file without scripts or links.

Every function returns `Html`; whatever is not `Html` is escaped where it is put in.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from sightloop.reports.style import STYLE

_MISSING = "\u2013"


class Html(str):
    """Markup, in which all text is escaped."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Tile:
    """A result at the top of a report.

    Attributes:
        label: What it is.
        value: The value, for people.
        note: A smaller line below, such as an interval.
    """

    label: str
    value: str
    note: str = ""


def text(value: object) -> Html:
    """`value` as text: escaped, unless it is `Html`. What UTF-8 cannot encode is shown as \\udcff."""
    if isinstance(value, Html):
        return value
    return Html(escape(str(value).encode("utf-8", "backslashreplace").decode()))


def element(tag: str, *content: object, **attributes: object) -> Html:
    """An element; `class_` is the attribute "class". Attributes that are None or "" are left out.

    element("p", "a < b", class_="note") -> `<p class="note">a &lt; b</p>`
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for name, value in attributes.items()
        if value not in (None, "")
    )
    return Html(f"<{tag}{written}>{''.join(map(text, content))}</{tag}>")


def join(parts: Iterable[object], separator: str = "") -> Html:
    """Parts one after the other; empty ones are left out."""
    return Html(separator.join(text(part) for part in parts if part))


def page(title: str, status: str, *body: object, style: str = "") -> str:
    """The whole file.

    Args:
        title: Heading, also the title of the window.
        status: Line under the heading; "" for none.
        *body: Tiles, notes, sections.
        style: Style sheet of this report alone, after the common one.
    """
    header = element("header", element("h1", title), element("p", status, class_="status") if status else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>\n"
        + join([header, *body], "\n")
        + "\n</main></body></html>\n"
    )


def section(heading: str, *content: object, note: str = "") -> Html:
    """A section with a heading and a line below it; "" if it has no content."""
    if not any(content):
        return Html("")
    below = element("p", note, class_="note") if note else ""
    return element("section", element("h2", heading), below, *content)


def details(summary: str, *content: object) -> Html:
    """Content that is folded until the reader opens it; "" if there is none."""
    if not any(content):
        return Html("")
    return element("details", element("summary", summary), *content)


def paragraph(content: object) -> Html:
    """A paragraph."""
    return element("p", content)


def note(content: object) -> Html:
    """A paragraph in small gray letters: how to read what is above."""
    return element("p", content, class_="note")


def warning(content: object) -> Html:
    """A marked paragraph that the reader must not miss."""
    return element("p", content, class_="warning")


def tiles(shown: Sequence[Tile]) -> Html:
    """The results in a row."""
    return element(
        "div",
        *(
            element(
                "div",
                element("b", tile.value),
                element("span", tile.label),
                element("small", tile.note) if tile.note else "",
            )
            for tile in shown
        ),
        class_="tiles",
    )


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], text_columns: Iterable[int] = (0,)
) -> Html:
    """A table that scrolls sideways on narrow screens.

    Args:
        head: Column names.
        rows: Cells: texts, numbers, `Html`; None is shown as a dash.
        text_columns: Indices of columns that are aligned left; the others, of numbers, are aligned right.
    """
    left = set(text_columns)

    def cell(tag: str, index: int, content: object) -> Html:
        return element(tag, _MISSING if content is None else content, class_="" if index in left else "n")

    names = element("tr", *(cell("th", index, name) for index, name in enumerate(head)))
    body = [element("tr", *(cell("td", index, value) for index, value in enumerate(row))) for row in rows]
    contents = element("table", element("thead", names), element("tbody", *body))
    return element("div", contents, class_="wide")


def settings(values: Mapping[str, object]) -> Html:
    """Names and values, one a line; nested objects are shown as "name value, name value"."""
    rows = [[name.replace("_", " "), _setting(value)] for name, value in values.items()]
    return table(["setting", "value"], rows, text_columns=(0, 1)) if rows else Html("")


def _setting(value: object) -> str:
    if isinstance(value, Mapping):
        pairs = {str(k): v for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        shown = ", ".join(f"{name} {_setting(each)}" for name, each in pairs.items() if each)
        return shown or "the defaults"
    if isinstance(value, bool):
        return "yes" if value else "no"
    shown = _MISSING if value is None else str(value)  # pyright: ignore[reportUnknownArgumentType]
    return shown if len(shown) < 400 else shown[:400] + " ..."


def preformatted(content: str) -> Html:
    """Text with its line breaks, such as JSON."""
    return element("pre", content)


def items(lines: Sequence[object], limit: int = 200) -> Html:
    """A list; of more lines than `limit` only their number is shown."""
    more = [f"and {len(lines) - limit:,} more"] if len(lines) > limit else []
    return element("ul", *(element("li", line) for line in [*lines[:limit], *more]))


def gallery(figures: Sequence[Html]) -> Html:
    """Figures in a grid of as many columns as there is room for."""
    return element("div", *figures, class_="gallery") if figures else Html("")


def figure(image: Html, *caption: object) -> Html:
    """An image with its caption."""
    return element("figure", image, element("figcaption", *caption))


def inline_image(image: Image.Image, side: int, alt: str = "") -> Html:
    """An image inside the page: a JPEG of at most `side` x `side` pixels, to which `image` is shrunk."""
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return inline_jpeg(file.getvalue(), alt)


def inline_jpeg(data: bytes, alt: str = "") -> Html:
    """A JPEG inside the page."""
    source = base64.b64encode(data).decode()
    return Html(f'<img alt="{text(alt)}" src="data:image/jpeg;base64,{source}">')


def share_bar(label: object, share: float, kind: str = "") -> Html:
    """A label with a percentage and a bar. share: 0..1; kind: "good", "bad" or "", the color."""
    percent = f"{100 * share:.0f}"
    fill = element("div", element("div", style=f"width:{percent}%"))
    return element(
        "div", element("span", label), element("b", f"{percent} %"), fill, class_=f"bar {kind}".strip()
    )


def format_number(value: float) -> str:
    """Four significant digits: 0.1235, 1235, 1.23e-5."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e")


def format_count(count: int) -> str:
    """Three significant digits: 950, 14 M, 1.2 B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def format_percent(share: float | None) -> str:
    """0.123 -> "12.3 %"; a dash for None."""
    return _MISSING if share is None else f"{100 * share:.1f} %"


def format_duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds: "2 h 05 min", "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
