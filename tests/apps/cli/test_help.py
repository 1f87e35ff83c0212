"""The help texts: recipes and tasks are complete, texts wrap to the terminal."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from sightloop.apps.cli import main
from sightloop.apps.cli.help_format import joined_lines
from sightloop.evaluation.task_names import TASK_DESCRIPTIONS, TaskName
from sightloop.training.recipe_names import RECIPE_DESCRIPTIONS
from sightloop.training.recipes import RECIPES


def listed(help_text: str, heading: str) -> list[str]:
    """The first words of the indented lines under a heading."""
    block = help_text.split(f"\n{heading}:\n")[1].split("\n\n")[0]
    return re.findall(r"^  (\w+) ", block, re.MULTILINE)


def test_help_of_train_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["train", "--help"]) == 0
    assert listed(capsys.readouterr().out, "Recipes") == list(RECIPES) == list(RECIPE_DESCRIPTIONS)


def test_help_of_evaluate_lists_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["evaluate", "--help"]) == 0
    assert listed(capsys.readouterr().out, "Tasks") == list(get_args(TaskName)) == list(TASK_DESCRIPTIONS)


@pytest.mark.parametrize("command", sorted(name for name in main.app if not name.startswith("-")))
def test_help_fits_into_80_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main.main([command, "--help"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(f"Usage: sightloop {command} ")
    assert all(len(line) <= 80 for line in output.splitlines())


def test_lines_of_a_paragraph_are_joined() -> None:
    assert joined_lines("One\n  two.\n\nThree\nfour.\n") == "One two.\n\nThree four."
