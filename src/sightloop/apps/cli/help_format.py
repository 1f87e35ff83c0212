"""Layout of `--help`: texts wrapped to the terminal's width instead of at the line ends of the source."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts.help import HelpPanel
    from rich.console import Console, ConsoleOptions


class WrappingFormatter:
    """Help formatter of cyclopts that joins the lines of each paragraph, so that the terminal can wrap them."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Prints one panel of commands or options."""
        from cyclopts.help.formatters import DefaultFormatter

        for entry in panel.entries:
            _join_lines(entry.description)
        DefaultFormatter()(console, options, panel)

    def render_usage(self, console: Console, options: ConsoleOptions, usage: object) -> None:
        """Prints the usage line."""
        from cyclopts.help.formatters import DefaultFormatter

        DefaultFormatter().render_usage(console, options, usage)

    def render_description(self, console: Console, options: ConsoleOptions, description: object) -> None:
        """Prints the text between the usage line and the panels."""
        _join_lines(description)
        console.print(description)


def joined_lines(text: str) -> str:
    """`text` with the lines of each paragraph joined by spaces. An empty line ends a paragraph."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _join_lines(description: object) -> None:
    """Joins the lines of a cyclopts description in place. Other renderables are left as they are."""
    from rich.text import Text

    text = getattr(description, "primary_renderable", None)  # of cyclopts.help.InlineText
    if isinstance(text, Text):
        text.plain = joined_lines(text.plain)
