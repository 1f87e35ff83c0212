"""The words: one type name in one file, few untyped values, the field's names, shapes wherever there are tensors."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rules import Module, none, read_package, write_package

ANYS = 150
CASTS = 30
# Variables that say who spoke, and not what it is.
VAGUE = {"found", "said", "told", "given", "mine", "theirs"}
# Word -> the field's word for it.
AVOIDED = {
    r"\w*pictures?\w*": "image",
    r"words? of places?|segment words?": "location tokens, segmentation tokens",
    r"no_things?": "ignored_phrases",
    r"optimis\w+|quantis\w+|normalis\w+|initialis\w+|regularis\w+|recognis\w+": "the spelling of torch",
    r"habits?|trainees?": "decoding defaults, trainable model",
}
TENSORS = {"Tensor", "NDArray", "Encoded", "Floats", "Integers"}
SHAPE = re.compile(r"\[[^\]\n]*\]")

# Where a word is data: a column that other programs write, what the synthetic captions say.
DATA_WORDS = {"data.datasets.schema", "data.datasets.caption_noise", "data.datasets.synthetic"}

Checker = Callable[[list[Module]], list[str]]


def types_of(module: Module) -> Iterator[str]:
    """Names of the classes and type aliases that a file defines."""
    for node in module.tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation).endswith("TypeAlias"):
                yield node.target.id
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, ast.unparse(node.value)
            if re.fullmatch(r"_?[A-Z][a-z]\w*", name) and re.match(
                r"(NDArray|Literal|tuple|dict|list|Callable)\[", value
            ):
                yield name


def repeated_types(modules: list[Module]) -> list[str]:
    homes: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        for name in types_of(module):
            homes[name].append(module.name)
    return [f"{name}: {', '.join(files)}" for name, files in homes.items() if len(files) > 1]


def anys(modules: list[Module]) -> list[str]:
    """Where `Any` stands, its imports aside."""
    return [
        f"{module.path}:{node.lineno}: Any"
        for module in modules
        for node in module.nodes()
        if (isinstance(node, ast.Name) and node.id == "Any")
        or (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.search(r"\bAny\b", node.value)
            and "[" in node.value
        )
    ]


def casts(modules: list[Module]) -> list[str]:
    return [
        f"{module.path}:{node.lineno}: cast"
        for module in modules
        for node in module.nodes()
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "typing.cast")
    ]


def vague_variables(modules: list[Module]) -> list[str]:
    problems: list[str] = []
    for module in modules:
        for node in module.nodes():
            name = ""
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.arg):
                name = node.arg
            if name in VAGUE:
                problems.append(f"{module.path}:{getattr(node, 'lineno', 0)}: the variable {name}")
    return problems


def avoided_words(modules: list[Module]) -> list[str]:
    return [
        f"{module.path}:{number}: {match[0]!r}; say: {better}"
        for module in modules
        for number, line in enumerate(module.source.split("\n"), start=1)
        for pattern, better in AVOIDED.items()
        for match in re.finditer(rf"(?<![A-Za-z])(?:{pattern})(?![a-z])", line, re.IGNORECASE)
        if not (module.name in DATA_WORDS and "picture" in match[0] and '"' in line)
    ]


def _names_of(hint: ast.AST) -> Iterator[str]:
    """Names in a type, without those of a mapping's values: tensors by name have many shapes."""
    if isinstance(hint, ast.Subscript) and ast.unparse(hint.value) in ("Mapping", "dict", "Callable"):
        return
    if isinstance(hint, ast.Name | ast.Attribute):
        yield hint.id if isinstance(hint, ast.Name) else hint.attr
    for part in ast.iter_child_nodes(hint):
        yield from _names_of(part)


def without_shapes(modules: list[Module]) -> list[str]:
    """Public functions and methods that take or return tensors or arrays, and whose docstring has no shape."""
    problems: list[str] = []
    for module in modules:
        for owner in [module.tree, *(n for n in module.tree.body if isinstance(n, ast.ClassDef))]:
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                text = ast.get_docstring(node)
                names = {
                    name
                    for hint in [
                        node.returns,
                        *(arg.annotation for arg in [*node.args.args, *node.args.kwonlyargs]),
                    ]
                    if hint is not None
                    for name in _names_of(hint)
                }
                # A Protocol's docstring, or that of what is overridden, speaks for its members.
                if text is not None and names & TENSORS and not SHAPE.search(text):
                    problems.append(f"{module.path}:{node.lineno}: {node.name} gives no shape")
    return problems


@pytest.fixture(scope="module")
def package() -> list[Module]:
    return read_package()


@pytest.mark.parametrize("checker", [repeated_types, vague_variables, avoided_words, without_shapes])
def test_the_package_keeps_it(package: list[Module], checker: Checker) -> None:
    none(checker(package))


def test_few_values_are_untyped(package: list[Module]) -> None:
    assert len(anys(package)) < ANYS
    assert len(casts(package)) < CASTS


# Each checker sees what it is there to see.

BROKEN: list[tuple[Checker, dict[str, str]]] = [
    (repeated_types, {"a.py": "class Box: ...", "b.py": "Box: TypeAlias = 'tuple[int, int]'"}),
    (repeated_types, {"a.py": "Floats = NDArray[np.float32]", "b.py": "Floats = NDArray[np.float64]"}),
    (anys, {"a.py": "def f(x: dict[str, Any]): ..."}),
    (anys, {"a.py": "X: TypeAlias = 'dict[str, Any]'"}),
    (casts, {"a.py": "x = typing.cast(int, y)"}),
    (vague_variables, {"a.py": "for found in x: ..."}),
    (vague_variables, {"a.py": "def f(*, given): ..."}),
    (avoided_words, {"a.py": "def read_pictures(): ..."}),
    (avoided_words, {"a.py": "# the picture's size"}),
    (avoided_words, {"a.py": "normalise = 1"}),
    (without_shapes, {"a.py": "def f(x: Tensor):\n    'No shape.'"}),
    (without_shapes, {"a.py": "class A:\n    def f(self) -> NDArray[np.uint8]:\n        'None.'"}),
]


@pytest.mark.parametrize(("checker", "files"), BROKEN)
def test_what_breaks_a_rule_is_seen(tmp_path: Path, checker: Checker, files: dict[str, str]) -> None:
    assert checker(write_package(tmp_path, files))


def test_what_keeps_the_rules_is_not_seen(tmp_path: Path) -> None:
    files = {
        "a.py": "class Box: ...\ndef f(x: Tensor) -> Tensor:\n    'x `[B, D]` -> `[B]`.'\n    regions = g(found=x)",
        "b.py": "from a import Box\nfrom typing import Any\nclass P(Protocol):\n"
        "    def f(self, x: Tensor) -> Tensor: ...",
    }
    modules = write_package(tmp_path, files)
    checkers = (repeated_types, anys, casts, vague_variables, avoided_words, without_shapes)
    assert [problem for checker in checkers for problem in checker(modules)] == []
