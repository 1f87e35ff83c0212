"""The package's source, parsed once, for the tests that hold the rules of the house (layers, budgets, exports)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "sightloop"


CONTRACTS = {"errors", "types", "protocols"}
DATA = {"data", "data.images", "data.text", "data.datasets"}
NETWORKS = {"nn", "towers", "models"}
# Room -> the rooms that its files may import from, beside their own. Read downwards: no room imports from a later one.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "protocols": {"types"},
    "data": CONTRACTS,
    "data.images": CONTRACTS | {"data"},
    "data.text": CONTRACTS | {"data"},
    "data.video": CONTRACTS | {"data.images"},
    "data.copies": CONTRACTS | {"data", "data.images"},
    "data.datasets": CONTRACTS | {"data", "data.copies", "data.images", "data.video"},
    "nn": CONTRACTS,
    "towers": CONTRACTS | {"nn"},
    "models": CONTRACTS | {"nn", "towers"},
    "objectives": CONTRACTS,
    "tasks": CONTRACTS,
    "ranking": CONTRACTS,
    "reports": CONTRACTS,
    "workers": CONTRACTS,
    "checkpoints": CONTRACTS | NETWORKS | {"data"},
    "inference": CONTRACTS
    | {"checkpoints", "data", "data.images", "data.text", "data.video", "models", "nn", "ranking", "tasks"},
    "annotation": CONTRACTS | DATA - {"data.text"} | {"data.video", "tasks"},
    "metrics": CONTRACTS,
    "evaluation": CONTRACTS
    | {
        "data",
        "data.copies",
        "data.datasets",
        "data.images",
        "data.video",
        "inference",
        "metrics",
        "ranking",
        "reports",
        "tasks",
    },
    "training": CONTRACTS
    | DATA - {"data.copies"}
    | NETWORKS
    | {"checkpoints", "data.copies", "inference", "metrics", "objectives", "ranking", "reports", "tasks"},
    "capfilt": CONTRACTS
    | DATA - {"data.text"}
    | {"checkpoints", "inference", "ranking", "reports", "tasks", "workers"},
    # search/ embeds and judges with loaded models, lists images as datasets, and shows its hits as a page. It asks
    # neither annotation/ (which writes beside images) nor evaluation/.
    "search": CONTRACTS
    | DATA - {"data.text"}
    | {"data.copies", "data.video", "inference", "reports", "workers"},
    # dialogue/ sees an index and a model through protocols of its own.
    "dialogue": CONTRACTS,
    # sightloop/__init__.py, which hands out what the rooms make.
    "": CONTRACTS
    | {"capfilt", "data.datasets", "dialogue", "evaluation", "inference", "metrics", "search", "training"},
    "apps.web": set(),
    "apps.server": CONTRACTS
    | {
        "",
        "annotation",
        "apps.web",
        "checkpoints",
        "data",
        "data.datasets",
        "data.images",
        "data.video",
        "inference",
        "search",
    },
    "apps.cli": CONTRACTS
    | {
        "",
        "annotation",
        "apps.server",
        "capfilt",
        "checkpoints",
        "data.datasets",
        "data.images",
        "data.video",
        "dialogue",
        "evaluation",
        "inference",
        "ranking",
        "search",
        "tasks",
        "training",
        "workers",
    },
    "apps.demo": CONTRACTS
    | DATA - {"data.text"}
    | {"annotation", "apps.cli", "checkpoints", "inference", "reports"},
    "__main__": {"apps.cli"},
}


def room_of(name: str) -> str:
    """The room of a module: "data.images" of "data.images.decode", "nn" of "nn.attention", "" of the package itself."""
    head = ".".join(name.split(".")[:2])
    return head if head in ROOMS else name.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """One file. `name`: dotted, without the package; "nn" for a folder's own file, "" for the root's."""

    name: str
    path: Path

    @cached_property
    def source(self) -> str:
        return self.path.read_text("utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, str(self.path))

    def nodes(self) -> Iterator[ast.AST]:
        return ast.walk(self.tree)


def read_package(root: Path = PACKAGE) -> list[Module]:
    """Every Python file below `root`, by name."""
    modules: list[Module] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules.append(Module(".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return modules


def none(found: list[str]) -> None:
    """Fail with every finding on a line of its own."""
    assert not found, "\n" + "\n".join(found)


def write_package(root: Path, files: dict[str, str]) -> list[Module]:
    """A small tree to show that a rule's checker sees what breaks the rule."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_package(root)


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a module imports anywhere: at the top, in functions, for type checkers."""
    for node in module.nodes():
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def own_imports(module: Module, names: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of the package's own modules that a module imports; `names` are all there are."""
    for line, dotted in imported(module):
        head, _, rest = dotted.partition(".")
        if head != "sightloop":
            continue
        # `from sightloop.a.b import c`: the module a.b.c, or something in a.b.
        while rest and rest not in names:
            rest = rest.rpartition(".")[0]
        if rest != module.name:
            yield line, rest


def called(node: ast.AST) -> str:
    """The last part of the name that a call calls: `torch.load(...)` -> "load"; "" for anything else."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def base_names(node: ast.ClassDef) -> list[str]:
    """The last part of the name of every base: `class A(nn.Module, Generic[T])` -> ["Module", "Generic"]."""
    names: list[str] = []
    for base in node.bases:
        inner = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(inner, ast.Attribute):
            names.append(inner.attr)
        elif isinstance(inner, ast.Name):
            names.append(inner.id)
    return names
