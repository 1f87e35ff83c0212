"""The rooms: which may import from which, who may use which library, and what there is only one of."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from tests.rules import (
    CONTRACTS,
    DATA,
    NETWORKS,
    PACKAGE,
    REPOSITORY,
    ROOMS,
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

# How many files of a room may be imported from outside of it.
DOORS = 7
# objectives: one door an objective; models: one door a family, for the file that reads its checkpoints.
FEW_DOORS = {"training": 3, "evaluation": 3, "capfilt": 3, "models": 9, "objectives": 8}

# The only libraries there are, and who may use each.
OWNERS: dict[str, set[str]] = {
    "torch": NETWORKS
    | {
        "types",
        "protocols",
        "data.images",
        "objectives",
        "ranking",  # for types alone
        "tasks",
        "checkpoints",
        "inference",
        "evaluation",
        "training",
        "capfilt",
        "search",
    },
    "numpy": DATA
    | {
        "data.copies",
        "data.video",
        "types",
        "tasks",
        "checkpoints",
        "inference",
        "annotation",
        "metrics",
        "evaluation",
        "training",
        "capfilt",
        "search",
    },
    "PIL": DATA
    | {
        "data.copies",
        "data.video",
        "types",
        "inference",
        "annotation",
        "evaluation",
        "reports",
        "training",
        "capfilt",
        "search",
        "apps.demo",
    },
    "av": {"data.video"},
    "simplejpeg": {"data.images"},
    "pillow_heif": {"data.images"},
    "tokenizers": {"data.text"},
    "ftfy": {"data.text"},
    "safetensors": {"checkpoints"},
    "huggingface_hub": {"checkpoints.hub"},
    "pyarrow": {"data.datasets", "annotation", "evaluation", "search"},
    "lancedb": {"search.lance"},
    "qdrant_client": {"search.qdrant"},
    "yaml": {"data.datasets.yolo_names"},
    "tensorboard": {"training.log"},
    "faster_coco_eval": {"metrics.detection"},
    "nltk": {"metrics.vqa"},
    "ray": {"workers.ray_actors"},
    "fastapi": {"apps.server"},
    "starlette": {"apps.server"},
    "pydantic": {"apps.server"},
    "uvicorn": {"apps.server"},
    "prometheus_client": {"apps.server.metrics"},
    "cyclopts": {"apps.cli", "apps.demo"},
    "rich": {"apps.cli", "apps.demo"},
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "faster_coco_eval": "faster-coco-eval",
    "pillow_heif": "pillow-heif",
    "qdrant_client": "qdrant-client",
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "prometheus_client": "prometheus-client",
}

# Networks, objectives and tasks see tensors: no file, no network, no other process.
UNWORLDLY = NETWORKS | {"objectives", "tasks"}
WORLD = {
    "asyncio",
    "ftplib",
    "glob",
    "gzip",
    "http",
    "io",
    "mmap",
    "multiprocessing",
    "os",
    "pathlib",
    "shutil",
    "signal",
} | {"socket", "sqlite3", "ssl", "subprocess", "tarfile", "tempfile", "urllib", "zipfile"}


def broken_layers(modules: list[Module]) -> list[str]:
    names = {module.name for module in modules}
    broken: list[str] = []
    for module in modules:
        room = room_of(module.name)
        if room not in ROOMS and module.source.strip():
            broken.append(f"{module.path}: {room} is no room of the house")
            continue
        for line, other in own_imports(module, names):
            if room_of(other) not in ROOMS.get(room, set()) | {room}:
                broken.append(
                    f"{module.path}:{line}: {module.name or 'the root'} may not import {other or 'the root'}"
                )
    return broken


def upward_rooms(rooms: dict[str, set[str]] = ROOMS) -> list[str]:
    """Rooms that may import from one that stands below them in the table."""
    order = list(rooms)
    return [
        f"{room} -> {other}"
        for room in rooms
        for other in rooms[room]
        if order.index(other) > order.index(room)
    ]


def stale_rooms(modules: list[Module], rooms: dict[str, set[str]] = ROOMS) -> list[str]:
    """What the table allows and nothing uses."""
    names = {module.name for module in modules}
    used = {(room_of(m.name), room_of(other)) for m in modules for _, other in own_imports(m, names)}
    return [
        f"{room} -> {other}"
        for room in rooms
        for other in rooms[room] - CONTRACTS
        if (room, other) not in used
    ]


def many_doors(modules: list[Module]) -> list[str]:
    """Rooms of which too many files are imported from outside."""
    names = {module.name for module in modules}
    doors: dict[str, set[str]] = {}
    for module in modules:
        for _, other in own_imports(module, names):
            if room_of(other) != room_of(module.name):
                doors.setdefault(room_of(other), set()).add(other)
    return [
        f"{room}: {len(files)} doors: {', '.join(sorted(files))}"
        for room, files in doors.items()
        if len(files) > FEW_DOORS.get(room, DOORS)
    ]


def cycles(modules: list[Module]) -> list[str]:
    names = {module.name for module in modules}
    graph = {module.name: {other for _, other in own_imports(module, names)} for module in modules}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    return sorted(graph)


def broken_owners(modules: list[Module]) -> list[str]:
    found: list[str] = []
    for module in modules:
        for line, dotted in imported(module):
            library = dotted.partition(".")[0]
            if library in sys.stdlib_module_names or library == "sightloop":
                continue
            if not {room_of(module.name), module.name} & OWNERS.get(library, set()):
                found.append(f"{module.path}:{line}: {module.name} may not use {library}")
    return found


def broken_seclusion(modules: list[Module]) -> list[str]:
    found: list[str] = []
    for module in modules:
        if room_of(module.name) not in UNWORLDLY:
            continue
        found += [
            f"{module.path}:{line}: {module.name} may not use {dotted}"
            for line, dotted in imported(module)
            if dotted.partition(".")[0] in WORLD
        ]
        found += [f"{module.path}: {module.name} opens a file" for n in module.nodes() if called(n) == "open"]
    return found


def hidden_imports(modules: list[Module]) -> list[str]:
    """Imports by a computed name. The root's table of lazy names is allowed: test_exports compares it with imports."""
    return [
        f"{module.path}: {called(node)} hides an import from this test"
        for module in modules
        if module.name
        for node in module.nodes()
        if called(node) in ("import_module", "__import__", "run_module", "run_path")
    ]


def networks_called(modules: list[Module], word: str) -> list[str]:
    return [
        f"{module.name}.{node.name}"
        for module in modules
        for node in module.nodes()
        if isinstance(node, ast.ClassDef) and re.search(word, node.name) and "Module" in base_names(node)
    ]


def files_with_loops_over(modules: list[Module], method: str) -> list[str]:
    """The files in which some loop calls `.method(...)` again and again."""
    loops = (ast.For, ast.While, ast.ListComp, ast.GeneratorExp)
    return sorted(
        {
            module.name
            for module in modules
            for loop in module.nodes()
            if isinstance(loop, loops) and any(called(node) == method for node in ast.walk(loop))
        }
    )


def loaded_by(module: str, path: Path, suspects: set[str]) -> set[str]:
    """Which of the suspects are loaded after `import module`, in an interpreter of its own."""
    code = f"import {module}, sys; print(*({suspects!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def package() -> list[Module]:
    return read_package()


def test_the_ladder(package: list[Module]) -> None:
    none(broken_layers(package))


def test_the_table_reads_downwards() -> None:
    none(upward_rooms())
    assert upward_rooms({"a": {"b"}, "b": set()})


def test_the_table_allows_what_is_used(package: list[Module]) -> None:
    none(stale_rooms(package))


def test_rooms_have_few_doors(package: list[Module]) -> None:
    none(many_doors(package))


def test_no_cycles(package: list[Module]) -> None:
    none(cycles(package))


def test_libraries_have_owners(package: list[Module]) -> None:
    none(broken_owners(package))


def test_the_owned_libraries_are_the_dependencies() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    listed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[<>=\[ ;]", line)[0] for line in listed}
    assert names == {DISTRIBUTIONS.get(library, library) for library in OWNERS}


def test_networks_and_tasks_see_no_file_and_no_network(package: list[Module]) -> None:
    none(broken_seclusion(package))


def test_no_import_hides(package: list[Module]) -> None:
    none(hidden_imports(package))


def test_one_attention_one_block_one_generation_loop_one_training_loop(package: list[Module]) -> None:
    assert networks_called(package, "Attention") == ["nn.attention.Attention"]
    assert networks_called(package, "Block") == ["nn.blocks.Block"]
    assert files_with_loops_over(package, "next_logits") == ["tasks.generate"]
    assert len(files_with_loops_over(package, "backward")) <= 1


@pytest.mark.parametrize("module", ["sightloop", "sightloop.checkpoints.catalog", "sightloop.apps.cli.main"])
def test_what_starts_quickly_loads_nothing_heavy(module: str) -> None:
    heavy = {
        "torch",
        "numpy",
        "PIL",
        "transformers",
        "huggingface_hub",
        "safetensors",
        "tokenizers",
        "pyarrow",
    }
    assert loaded_by(module, PACKAGE.parent, heavy) == set()


def test_metrics_need_no_torch() -> None:
    heavy = {"torch", "PIL", "pyarrow", "transformers", "faster_coco_eval", "nltk"}
    assert loaded_by("sightloop.metrics", PACKAGE.parent, heavy) == set()


# Each checker sees what it is there to see.

BROKEN: list[tuple[Callable[[list[Module]], list[str]], dict[str, str]]] = [
    (broken_layers, {"nn/a.py": "from sightloop.data.b import c", "data/b.py": ""}),
    (broken_layers, {"nn/a.py": "def f():\n    import sightloop.towers.b", "towers/b.py": ""}),
    (broken_layers, {"types.py": "if TYPE_CHECKING:\n    from sightloop import errors", "errors.py": ""}),
    (broken_layers, {"tasks/a.py": "from sightloop.models.b import C", "models/b.py": ""}),
    (broken_layers, {"apps/cli/a.py": "import sightloop.data.b as b", "data/b.py": ""}),
    (broken_layers, {"inference/a.py": "from sightloop import load", "__init__.py": ""}),
    (broken_layers, {"data/text/a.py": "from sightloop.data.images.b import *", "data/images/b.py": ""}),
    (broken_layers, {"data/rng.py": "import sightloop.data.text.a", "data/text/a.py": ""}),
    (broken_layers, {"utils/a.py": "import os"}),
    (stale_rooms, {"nn/blocks.py": ""}),
    (
        many_doors,
        {f"tasks/t{i}.py": "" for i in range(DOORS + 1)}
        | {"inference/a.py": "\n".join(f"import sightloop.tasks.t{i}" for i in range(DOORS + 1))},
    ),
    (cycles, {"nn/a.py": "import sightloop.nn.b", "nn/b.py": "def f():\n    from sightloop.nn import a"}),
    (broken_owners, {"models/a.py": "def f():\n    import transformers"}),
    (broken_owners, {"models/a.py": "from torchvision.ops import nms"}),
    (broken_owners, {"apps/cli/a.py": "import numpy as np"}),
    (broken_owners, {"apps/cli/a.py": "if TYPE_CHECKING:\n    from torch import Tensor"}),
    (broken_owners, {"tasks/a.py": "import tokenizers"}),
    (broken_owners, {"models/clip.py": "from huggingface_hub import snapshot_download"}),
    (broken_seclusion, {"models/a.py": "from pathlib import Path"}),
    (broken_seclusion, {"nn/a.py": "def f(p):\n    return open(p)"}),
    (broken_seclusion, {"tasks/a.py": "import urllib.request"}),
    (hidden_imports, {"nn/a.py": "import importlib\nimportlib.import_module('sightloop.data.b')"}),
    (hidden_imports, {"nn/a.py": "__import__('torch')"}),
]


@pytest.mark.parametrize(("checker", "files"), BROKEN)
def test_a_broken_rule_is_seen(
    tmp_path: Path, checker: Callable[[list[Module]], list[str]], files: dict[str, str]
) -> None:
    assert checker(write_package(tmp_path, files))


def test_what_is_allowed_is_not_seen(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from sightloop.errors import E",
        "errors.py": "import os",
        "nn/__init__.py": "",
        "nn/a.py": "import torch\nfrom sightloop.types import B\nfrom sightloop.errors import E",
        "nn/b.py": "from sightloop.nn.a import Attention",
        "types.py": "from PIL import Image",
        "models/clip.py": "from sightloop.nn import a\nfrom sightloop.nn.a import Attention",
        "data/images/a.py": "import sightloop.data.b",
        "data/b.py": "from pathlib import Path",
        "apps/__init__.py": "",
        "apps/cli/a.py": "import rich\nfrom sightloop.training.t import x",
        "training/t.py": "import sightloop.models.clip",
    }
    modules = write_package(tmp_path, files)
    assert broken_layers(modules) == cycles(modules) == many_doors(modules) == []
    assert broken_owners(modules) == broken_seclusion(modules) == hidden_imports(modules) == []
    assert stale_rooms(modules, {"models": {"nn"}, "data.images": {"data"}}) == []
