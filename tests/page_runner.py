"""Runs the commands and the Python of pages: `python -m tests.page_runner REPORT`, the plan on standard input.

The commands run in this process, so that torch is imported once. The plan is a list of [page, folder, steps], a step
("sightloop", line) or ("python", text); the report maps each page to what failed. The Python of a page is one program:
what a block defines, the next may use.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
import traceback
from pathlib import Path


def run_command(line: str) -> None:
    """One command. Raises RuntimeError with what it printed on standard error if it fails."""
    from sightloop.apps.cli.main import main

    arguments = shlex.split(line, comments=True)[1:]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(arguments)
    if status:
        raise RuntimeError(f"exit status {status}\n{errors.getvalue()[-2000:]}")


def run_page(steps: list[tuple[str, str]]) -> list[str]:
    """What of a page's steps fails."""
    failed: list[str] = []
    names: dict[str, object] = {"__name__": "__page__"}
    for kind, text in steps:
        try:
            if kind == "sightloop":
                run_command(text)
            else:
                exec(compile(text, "<page>", "exec"), names)
        except BaseException:  # a page may also call sys.exit
            failed.append(f"{text}\n{traceback.format_exc(limit=-4)}")
    return failed


def run_plan(plan: list[tuple[str, str, list[tuple[str, str]]]]) -> dict[str, list[str]]:
    """Page -> failures."""
    report: dict[str, list[str]] = {}
    for name, folder, steps in plan:
        os.chdir(folder)
        report[name] = run_page(steps)
    return report


if __name__ == "__main__":
    plan = json.load(sys.stdin)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # `chat` reads standard input
    sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 (for the life of the process)
    report = run_plan(plan)
    Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
