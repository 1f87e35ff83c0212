"""The public surface: what `import sightloop` offers is there, sorted, documented and typed."""

from __future__ import annotations

import ast
import importlib
import inspect
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
    """Modules whose `__all__` names a thing twice or is not in ruff's order: constants, classes, the rest."""

    def order(name: str) -> tuple[int, str]:
        return (0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2, name)

    found: list[str] = []
    for module in modules:
        names = exports(module)
        if names is not None and names != sorted(set(names), key=order):
            found.append(f"{module.path}: __all__ is not sorted")
    return found


def test_all_is_sorted_everywhere() -> None:
    assert unsorted(read_package()) == []


def test_an_unsorted_all_is_seen(tmp_path: Path) -> None:
    files = {"a.py": '__all__ = ["b", "a"]', "b.py": '__all__ = ["a", "a"]', "c.py": '__all__ = ["a", "B"]'}
    assert len(unsorted(write_package(tmp_path, files | {"d.py": '__all__ = ["Z", "AB", "Ab", "b"]'}))) == 4
    assert (
        unsorted(write_package(tmp_path / "fine", {"a.py": '__all__ = ["AB", "Ab", "Z", "_c", "b"]'})) == []
    )


@pytest.mark.parametrize("name", sightloop.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(sightloop, name)
    assert name.startswith("__") or inspect.getdoc(value)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__.startswith("sightloop.")


@pytest.mark.parametrize(
    "module", [m for m in read_package() if exports(m) is not None], ids=lambda m: m.name
)
def test_what_a_module_exports_it_has(module: Module) -> None:
    loaded = importlib.import_module(f"sightloop.{module.name}".rstrip("."))
    for name in exports(module) or []:
        assert hasattr(loaded, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sightloop.nothing  # noqa: B018
    assert set(sightloop.__all__) >= {"Model", "load", "SightloopError"}


def test_the_version_is_that_of_the_project_and_the_changelog_knows_it() -> None:
    assert sightloop.__version__ == PROJECT["project"]["version"]
    changelog = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    assert f"[{sightloop.__version__}]" in changelog or "[Unreleased]" in changelog


def test_types_and_licence_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["src/sightloop"]}  # the whole folder, nothing left out
    assert (REPOSITORY / PROJECT["project"]["license-files"][0]).is_file()


def test_the_command_is_there() -> None:
    module, _, function = PROJECT["project"]["scripts"]["sightloop"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
