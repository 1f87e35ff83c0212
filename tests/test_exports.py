"""The public names of `sightloop`: they exist, are sorted, documented, typed and imported lazily."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path

import pytest

import sightloop
from tests.rules import PACKAGE, REPOSITORY, Module, read_package, write_package

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def exports(module: Module) -> list[str] | None:
    """The literal `__all__` of a module, None without one."""
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def unsorted(modules: list[Module]) -> list[str]:
    """Modules whose `__all__` repeats a name or is not in ruff's order: constants, classes, the rest."""

    def order(name: str) -> tuple[int, str]:
        return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2, name)

    problems: list[str] = []
    for module in modules:
        names = exports(module)
        if names is not None and names != sorted(set(names), key=order):
            problems.append(f"{module.path}: __all__ is not sorted")
    return problems


def type_checking_imports(module: Module) -> dict[str, str]:
    """Name -> module of the imports under `if TYPE_CHECKING:`; a name that is a module has its own."""
    names: dict[str, str] = {}
    for node in module.tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                assert isinstance(line, ast.ImportFrom)
                for alias in line.names:
                    is_module = line.module == "sightloop"
                    names[alias.name] = f"sightloop.{alias.name}" if is_module else str(line.module)
    return names


def changelog_problems(changelog: str, version: str) -> list[str]:
    """A changelog starts with [Unreleased]; its newest release, if there is one, is this version."""
    headings = re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)
    problems: list[str] = []
    if headings[:1] != ["Unreleased"]:
        problems.append("the first heading is not [Unreleased]")
    releases = [heading for heading in headings if heading != "Unreleased"]
    if releases and releases[0] != version:
        problems.append(f"the newest release is {releases[0]}, __version__ is {version}")
    return problems


def test_all_is_sorted_everywhere() -> None:
    assert unsorted(read_package()) == []


def test_an_unsorted_all_is_found(tmp_path: Path) -> None:
    files = {"a.py": '__all__ = ["b", "a"]', "b.py": '__all__ = ["a", "a"]', "c.py": '__all__ = ["a", "B"]'}
    assert len(unsorted(write_package(tmp_path, files | {"d.py": '__all__ = ["Z", "AB", "Ab", "b"]'}))) == 4
    assert (
        unsorted(write_package(tmp_path / "fine", {"a.py": '__all__ = ["AB", "Ab", "Z", "_c", "b"]'})) == []
    )


@pytest.mark.parametrize("name", sightloop.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(sightloop, name)
    assert name.startswith("__") or inspect.getdoc(value)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__.startswith("sightloop.")


@pytest.mark.parametrize(
    "module", [m for m in read_package() if exports(m) is not None], ids=lambda m: m.name
)
def test_every_name_in_all_exists(module: Module) -> None:
    loaded = importlib.import_module(f"sightloop.{module.name}".rstrip("."))
    for name in exports(module) or []:
        assert hasattr(loaded, name)


def test_lazy_names_come_from_the_modules_that_type_checkers_see() -> None:
    root = next(module for module in read_package() if not module.name)
    assert type_checking_imports(root) == sightloop._MODULES
    assert set(sightloop._MODULES) <= set(sightloop.__all__)
    for name, module in sightloop._MODULES.items():
        if name != "metrics":  # the definition itself, not a re-export
            assert getattr(sightloop, name).__module__ == module


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sightloop.nothing  # noqa: B018


def test_dir_lists_the_public_names() -> None:
    assert dir(sightloop) == sorted(sightloop.__all__)


def test_metrics_are_an_attribute_and_a_module() -> None:
    import sightloop.metrics as metrics
    from sightloop.metrics import caption_scores

    assert sightloop.metrics is metrics
    assert metrics.caption_scores is caption_scores


def test_the_version_is_written_once() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    path = REPOSITORY / PROJECT["tool"]["hatch"]["version"]["path"]
    assert re.findall(r'^__version__ = "(.+)"$', path.read_text("utf-8"), re.MULTILINE) == [
        sightloop.__version__
    ]


def test_the_changelog_and_the_version_agree() -> None:
    changelog = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    assert changelog_problems(changelog, sightloop.__version__) == []


@pytest.mark.parametrize(
    ("changelog", "count"),
    [
        ("# Changelog\n## [Unreleased]\n", 0),
        ("## [Unreleased]\n## [0.2.0] - 2026-01-01\n## [0.1.0] - 2025-01-01\n", 0),
        ("## [Unreleased]\n## [0.1.0] - 2025-01-01\n", 1),
        ("## [0.3.0]\n", 2),
        ("", 1),
    ],
)
def test_a_changelog_that_lacks_the_version_is_found(changelog: str, count: int) -> None:
    assert len(changelog_problems(changelog, "0.2.0")) == count


def test_types_and_license_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/sightloop"]}  # the whole folder
    assert (REPOSITORY / PROJECT["project"]["license-files"][0]).is_file()


def test_the_command_is_callable() -> None:
    module, _, function = PROJECT["project"]["scripts"]["sightloop"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
