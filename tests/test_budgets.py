"""The budgets of the house: how long, how wide and how deep a thing may be, and what no file may hold."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rules import (
    Module,
    base_names,
    called,
    imported,
    none,
    own_imports,
    read_package,
    room_of,
    write_package,
)

FILE_LINES = 500
FUNCTION_LINES = 60
PARAMETERS = 8
FAMILY_LINES = 300
ROOM_SHARE = 0.22
READING_FILES, READING_LINES = 5, 1200

# models/ holds the families and these.
NOT_FAMILIES = {"chat_templates", "mask_decoder", "sizes"}
READ_THROUGH = {"nn", "towers"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(module: Module) -> int:
    return module.source.count("\n")


def code_lines_of(module: Module) -> int:
    """Lines that hold code: no docstring, no comment, none that is blank."""
    numbers: set[int] = set()
    for node in module.nodes():
        if isinstance(node, ast.stmt) and not (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            last = min([child.lineno for child in inner], default=(node.end_lineno or node.lineno) + 1)
            numbers.update(range(node.lineno, last))
    text = module.source.split("\n")
    return sum(
        bool(text[number - 1].strip()) and not text[number - 1].lstrip().startswith("#") for number in numbers
    )


def families(modules: list[Module]) -> list[Module]:
    """models/clip.py and the like; what reads their checkpoints (checkpoints/clip.py) is no part of a forward."""
    return [
        module
        for module in modules
        if module.name.startswith("models.") and module.name.removeprefix("models.") not in NOT_FAMILIES
    ]


def functions(module: Module) -> Iterator[tuple[str, Function]]:
    for node in module.nodes():
        if isinstance(node, Function):
            yield f"{module.path}:{node.lineno}: {node.name}", node


def long_files(modules: list[Module]) -> list[str]:
    found = [f"{m.path}: {lines_of(m)} lines" for m in modules if lines_of(m) > FILE_LINES]
    return found + [f"{m.path}: {lines_of(m)} lines" for m in families(modules) if lines_of(m) > FAMILY_LINES]


def large_rooms(modules: list[Module]) -> list[str]:
    """Rooms that hold too large a share of the package's lines."""
    sizes: dict[str, int] = {}
    for module in modules:
        sizes[room_of(module.name)] = sizes.get(room_of(module.name), 0) + lines_of(module)
    total = sum(sizes.values())
    return [
        f"{room}: {lines} of {total} lines" for room, lines in sizes.items() if lines > ROOM_SHARE * total
    ]


def long_functions(modules: list[Module]) -> list[str]:
    found: list[str] = []
    for module in modules:
        for where, node in functions(module):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{where}: {lines} lines")
    return found


def wide_functions(modules: list[Module]) -> list[str]:
    found: list[str] = []
    for module in modules:
        for where, node in functions(module):
            a = node.args
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if arg]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > PARAMETERS:
                found.append(f"{where}: {count} parameters")
    return found


def deep_classes(modules: list[Module]) -> list[str]:
    """A class of ours inherits from at most one class of ours, and that one from none of ours."""
    bases: dict[str, set[str]] = {}
    for module in modules:
        for node in module.nodes():
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(base_names(node))
    ours = {name: parents & bases.keys() - {name} for name, parents in bases.items()}
    return [
        f"{name} inherits from {', '.join(sorted(parents))}"
        for name, parents in ours.items()
        if len(parents) > 1 or any(ours[parent] for parent in parents)
    ]


def far_families(modules: list[Module]) -> list[str]:
    """Families that cannot be read, down to the last primitive, in a few files."""
    by_name = {module.name: module for module in modules}
    found: list[str] = []
    for family in families(modules):
        seen: set[str] = set()
        todo = [family.name]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            todo += [
                other
                for _, other in own_imports(by_name[name], set(by_name))
                if other.split(".")[0] in READ_THROUGH
            ]
        lines = sum(code_lines_of(by_name[name]) for name in seen)
        if len(seen) > READING_FILES or lines > READING_LINES:
            found.append(f"{family.path}: {len(seen)} files, {lines} lines: {', '.join(sorted(seen))}")
    return found


def forbidden(modules: list[Module]) -> list[str]:
    """Constructs that hide errors, run what a file says, or tie a file to its place."""
    return [
        f"{module.path}:{getattr(node, 'lineno', 0)}: {reason}"
        for module in modules
        for node in module.nodes()
        if (reason := _reason(node))
    ] + [
        f"{module.path}:{line}: imports {name}"
        for module in modules
        for line, name in imported(module)
        if name.partition(".")[0] in {"pickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
    ]


def _reason(node: ast.AST) -> str:
    if isinstance(node, ast.ImportFrom):
        return "relative import" if node.level else ""
    if isinstance(node, ast.ExceptHandler):
        return _swallows(node)
    if not isinstance(node, ast.Call):
        return ""
    name, options = called(node), {k.arg: k.value for k in node.keywords}

    def says(option: str, value: bool) -> bool:
        given = options.get(option)
        return isinstance(given, ast.Constant) and given.value is value

    if isinstance(node.func, ast.Name) and name in ("eval", "exec", "compile"):
        return f"{name}()"
    if says("strict", False) and name not in ("zip", "map", "resolve", "batched"):
        return "strict=False"
    of_torch = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "torch"
    if name == "load" and of_torch and not says("weights_only", True):
        return "torch.load without weights_only=True"
    if says("allow_pickle", True) or says("trust_remote_code", True) or says("shell", True):
        return "runs what it reads"
    if name == "suppress" and any(ast.unparse(a) in ("Exception", "BaseException") for a in node.args):
        return "suppresses every exception"
    return ""


def _swallows(node: ast.ExceptHandler) -> str:
    if node.type is None:
        return "bare except"
    everything = {"Exception", "BaseException"} & {
        n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)
    }
    idle = all(
        isinstance(line, ast.Pass | ast.Continue | ast.Break)
        or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
        or (isinstance(line, ast.Return) and (line.value is None or ast.unparse(line.value) == "None"))
        for line in node.body
    )
    return "catches everything and says nothing" if everything and idle else ""


def undocumented(modules: list[Module]) -> list[str]:
    """Public modules, functions, classes and methods without a docstring (empty files and overrides aside)."""
    found: list[str] = []
    for module in modules:
        if not module.tree.body or any(part.startswith("_") for part in module.name.split(".")):
            continue
        if not ast.get_docstring(module.tree):
            found.append(f"{module.path}: no docstring")
        found += [f"{module.path}:{line}: {name} has no docstring" for line, name in _silent(module.tree, "")]
    return found


# What a base class or the language defines, and says what it does.
_INHERITED = {"forward", "extra_repr", "run", "close", "write", "isatty", "flush", "columns"}


def _silent(tree: ast.Module | ast.ClassDef, owner: str) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        inherited = owner and node.name in _INHERITED
        setter = any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in node.decorator_list)
        if not ast.get_docstring(node) and not inherited and not setter:
            yield node.lineno, f"{owner}{node.name}"
        # A Protocol's docstring speaks for its members.
        if isinstance(node, ast.ClassDef) and "Protocol" not in base_names(node):
            yield from _silent(node, f"{node.name}.")


CHECKERS: list[Callable[[list[Module]], list[str]]] = [
    long_files,
    large_rooms,
    long_functions,
    wide_functions,
    deep_classes,
    far_families,
    forbidden,
    undocumented,
]


@pytest.fixture(scope="module")
def package() -> list[Module]:
    return read_package()


@pytest.mark.parametrize("checker", CHECKERS)
def test_the_package_keeps_it(package: list[Module], checker: Callable[[list[Module]], list[str]]) -> None:
    assert len(package) > 20
    none(checker(package))


def test_the_families_are_found(package: list[Module]) -> None:
    assert {"models.clip", "models.blip"} <= {family.name for family in families(package)}


# Each checker sees what it is there to see.

BIG = "x = 1\n"
LONG = "def f(x):\n" + "    x\n" * 60
CHAIN = {f"nn/m{i}.py": f"import sightloop.nn.m{i + 1}" for i in range(5)} | {"nn/m5.py": ""}

BROKEN: list[tuple[Callable[[list[Module]], list[str]], dict[str, str]]] = [
    (long_files, {"nn/a.py": BIG * 501}),
    (long_files, {"models/clip.py": BIG * 301}),
    (
        large_rooms,
        {"nn/a.py": BIG * 23, "data/b.py": BIG * 20, "models/c.py": BIG * 20, "tasks/d.py": BIG * 20},
    ),
    (long_functions, {"a.py": LONG}),
    (long_functions, {"a.py": "class A:\n" + "".join(f"    {line}\n" for line in LONG.splitlines())}),
    (wide_functions, {"a.py": "def f(a, b, c, d, e, f, g, h, i): ..."}),
    (wide_functions, {"a.py": "class A:\n    async def f(self, a, b, c, d, e, f, g, *h, i=1): ..."}),
    (wide_functions, {"a.py": "def f(a, b, c, d, /, e, f, g, *, h, **i): ..."}),
    (deep_classes, {"a.py": "class A: ...\nclass B(A): ...", "b.py": "import a\nclass C(a.B): ..."}),
    (deep_classes, {"a.py": "class A: ...\nclass B: ...\nclass C(A, B): ..."}),
    (deep_classes, {"a.py": "class A(Generic[T]): ...\nclass B(A[int]): ...\nclass C(B): ..."}),
    (far_families, {"models/clip.py": "import sightloop.nn.m0", **CHAIN}),
    (
        far_families,
        {"models/clip.py": "def f():\n    from sightloop.towers.vit import V", "towers/vit.py": BIG * 1200},
    ),
    (forbidden, {"a.py": "from . import b"}),
    (forbidden, {"a.py": "from .b import c"}),
    (forbidden, {"a.py": "net.load_state_dict(s, strict=False)"}),
    (forbidden, {"a.py": "try:\n    f()\nexcept:\n    raise"}),
    (forbidden, {"a.py": "try:\n    f()\nexcept Exception:\n    pass"}),
    (forbidden, {"a.py": "try:\n    f()\nexcept (ValueError, BaseException) as e:\n    ..."}),
    (forbidden, {"a.py": "for x in y:\n    try:\n        f()\n    except Exception:\n        continue"}),
    (forbidden, {"a.py": "def g():\n    try:\n        f()\n    except Exception:\n        return None"}),
    (forbidden, {"a.py": "with suppress(Exception):\n    f()"}),
    (forbidden, {"a.py": "torch.load(p)"}),
    (forbidden, {"a.py": "torch.load(p, weights_only=False)"}),
    (forbidden, {"a.py": "def f():\n    import pickle"}),
    (forbidden, {"a.py": "from pickle import loads"}),
    (forbidden, {"a.py": "eval('1')"}),
    (forbidden, {"a.py": "exec(code)"}),
    (forbidden, {"a.py": "np.load(p, allow_pickle=True)"}),
    (forbidden, {"a.py": "subprocess.run(c, shell=True)"}),
    (undocumented, {"a.py": "import os"}),
    (undocumented, {"a.py": '"""M."""\ndef f(): ...'}),
    (undocumented, {"a.py": '"""M."""\nclass A:\n    x = 1'}),
    (undocumented, {"a.py": '"""M."""\nclass A:\n    """A."""\n    def f(self): ...'}),
]


@pytest.mark.parametrize(("checker", "files"), BROKEN)
def test_a_broken_rule_is_seen(
    tmp_path: Path, checker: Callable[[list[Module]], list[str]], files: dict[str, str]
) -> None:
    assert checker(write_package(tmp_path, files))


def test_what_is_allowed_is_not_seen(tmp_path: Path) -> None:
    fine = '''"""M."""
class A(nn.Module, Generic[T]):
    """A."""
    def __init__(self, a, b, c, d, e, f, g, h): ...
    def forward(self, x): ...
    def _f(self): ...
class B(A):
    """B."""
class P(Protocol):
    """P."""
    def f(self): ...
def f(xs, ys):
    """F."""
    net.load_state_dict(s, strict=True)
    torch.load(p, weights_only=True)
    net.eval()
    re.compile("x")
    json.load(f)
    try:
        return list(zip(xs, ys, strict=False))
    except Exception as error:
        raise ValueError from error
    except OSError:
        pass
    try:
        return turn(x)
    except Exception:
        return 1
'''
    files = {
        "a.py": fine,
        "nn/__init__.py": "",
        "nn/b.py": '"""M."""\n' + BIG * 499,
        "models/clip.py": '"""M."""',
    }
    modules = write_package(
        tmp_path, files | {"nn/c.py": '"""M."""\n' + LONG.replace("    x\n", "", 1).replace("f(", "_f(")}
    )
    assert [
        problem for checker in CHECKERS if checker is not large_rooms for problem in checker(modules)
    ] == []
