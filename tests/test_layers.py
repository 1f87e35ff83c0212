"""The ladder: who may import whom, who may use which library, and what there is only one of.

A file imports from the rungs below its own as the table says, and of its own rung only what NAMED grants it.
"""

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
    PACKAGE,
    REPOSITORY,
    Module,
    base_names,
    called,
    imported,
    none,
    own_imports,
    read_package,
    write_package,
)

CONTRACTS = {"errors", "types"}
NETWORKS = CONTRACTS | {"nn", "towers", "fusion"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "data": CONTRACTS,
    "nn": CONTRACTS,
    "towers": CONTRACTS | {"nn"},
    "fusion": CONTRACTS | {"nn"},
    "models": NETWORKS,
    "objectives": CONTRACTS,
    "tasks": CONTRACTS,
    "pipelines": NETWORKS | {"data", "models", "objectives", "tasks"},
    "apps": CONTRACTS | {"pipelines"},
    "": CONTRACTS | {"pipelines"},  # sightread/__init__.py, which hands out what pipelines make
    "__main__": {"apps"},
}

# What single files may know beside that: siblings, and the catalogue and atomic files, which import nothing themselves.
NAMED: dict[str, set[str]] = {
    "": {"data.samples"},  # open_dataset
    "data.augment": {"data.randomness"},
    "data.coco": {"data.records", "data.runs"},
    "data.decoder": {"data.pixels"},
    "data.folders": {"data.images", "data.records"},
    "data.images": {"data.headers"},
    "data.masking": {"data.randomness"},
    "data.noise": {"data.randomness"},
    "data.pieces": {"data.padding", "data.tokens"},
    "data.pixels": {"data.images", "data.resample", "data.tiles"},
    "data.records": {"data.runs"},
    "data.reader": {"data.decoder", "data.images", "data.pixels"},
    "data.tokens": {"data.padding"},
    "data.world": {"data.atomic", "data.randomness"},
    "data.yolo": {"data.folders", "data.images"},
    "data.samples": {"data.coco", "data.folders", "data.shards", "data.tables", "data.yolo"},
    "data.shards": {"data.folders", "data.images", "data.records"},
    "data.tables": {"data.records"},
    "nn.blocks": {"nn.attention"},
    "nn.initial": {"nn.attention", "nn.blocks"},
    "nn.training": {"nn.blocks"},
    "nn.lora": {"nn.attention", "nn.packing"},
    "nn.packing": {"nn.attention"},
    "nn.quantise": {"nn.attention"},
    "models.clip_checkpoints": {"models.clip", "models.clip_resnet", "models.settings", "models.weights"},
    "models.siglip_checkpoints": {"models.settings", "models.siglip", "models.weights"},
    "models.settings": {"models.weights"},
    "models.blip_checkpoints": {"models.blip", "models.settings", "models.weights"},
    "models.blip2_checkpoints": {
        "models.blip2",
        "models.blip_checkpoints",
        "models.language_checkpoints",
        "models.seq2seq_checkpoints",
        "models.settings",
        "models.weights",
    },
    "models.sizes": {"models.blip", "models.blip2", "models.clip", "models.siglip"},
    "models.blip2": {"models.blip", "models.dialogues"},
    "models.language_checkpoints": {"models.weights"},
    "models.seq2seq_checkpoints": {"models.language_checkpoints", "models.weights"},
    "models.paligemma_checkpoints": {
        "models.language_checkpoints",
        "models.paligemma",
        "models.settings",
        "models.siglip_checkpoints",
        "models.weights",
    },
    "models.segments": {"models.weights"},
    "tasks.regions": {"tasks.location_strings"},
    "pipelines.saving": {"pipelines.habits", "pipelines.segments"},
    "models.families": {
        "models.blip",
        "models.blip2",
        "models.blip2_checkpoints",
        "models.blip_checkpoints",
        "models.clip",
        "models.clip_checkpoints",
        "models.clip_resnet",
        "models.florence",
        "models.florence_checkpoints",
        "models.llava",
        "models.llava_checkpoints",
        "models.paligemma",
        "models.paligemma_checkpoints",
        "models.settings",
        "models.siglip",
        "models.siglip_checkpoints",
        "models.weights",
    },
    "models.files": {"models.catalog", "models.safe", "data.atomic"},
    "models.llava": {"models.dialogues"},
    "models.llava_checkpoints": {
        "models.dialogues",
        "models.language_checkpoints",
        "models.llava",
        "models.settings",
        "models.weights",
    },
    "objectives.contrastive": {"objectives.gather", "objectives.matching"},
    "tasks.describe": {"tasks.generate"},
    "data.vocabulary": {"data.atomic", "data.pieces"},
    "pipelines.checkpoints": {"data.atomic", "pipelines.ranks"},
    "pipelines.optimiser": {"pipelines.ranks"},
    "pipelines.sharding": {"pipelines.feed", "pipelines.ranks"},
    "pipelines.calibration": {
        "pipelines.checkup",
        "pipelines.engine",
        "pipelines.metrics.matching",
        "pipelines.model",
        "pipelines.rerank",
        "pipelines.run_events",
    },
    "pipelines.checkup": {
        "pipelines.metrics.captions",
        "pipelines.metrics.detection",
        "pipelines.model",
        "pipelines.recipes",
    },
    "pipelines.feed": {"pipelines.prompted", "pipelines.recipes"},
    "pipelines.recipes": {"pipelines.optimiser", "pipelines.typed"},
    "pipelines.terms": {"pipelines.features", "pipelines.feed", "pipelines.recipes"},
    "pipelines.train": {
        "pipelines.calibration",
        "pipelines.checkpoints",
        "pipelines.checkup",
        "pipelines.compiling",
        "pipelines.features",
        "pipelines.feed",
        "pipelines.leakage",
        "pipelines.memory",
        "pipelines.model",
        "pipelines.optimiser",
        "pipelines.ranks",
        "pipelines.recipes",
        "pipelines.run_events",
        "pipelines.run_log",
        "pipelines.run_report",
        "pipelines.saving",
        "pipelines.sharding",
        "pipelines.terms",
        "pipelines.trainee",
        "pipelines.watch",
    },
    "pipelines.trainee": {
        "pipelines.engine",
        "pipelines.feed",
        "pipelines.prompted",
        "pipelines.recipes",
    },
    "apps.train": {"apps.training"},
    "pipelines.bootstrap.rules": {"pipelines.captions"},
    "pipelines.bootstrap.estimate": {"pipelines.bootstrap.unit"},
    "pipelines.bootstrap.report": {"pipelines.bootstrap.rules", "pipelines.bootstrap.unit"},
    "pipelines.bootstrap.cluster": {"pipelines.bootstrap.unit", "pipelines.bootstrap.workers"},
    "pipelines.bootstrap.endpoint": {"pipelines.bootstrap.rules"},
    "pipelines.bootstrap.unit": {
        "pipelines.bootstrap.endpoint",
        "pipelines.bootstrap.rules",
        "pipelines.convert",
        "pipelines.engine",
        "pipelines.model",
        "pipelines.rerank",
        "pipelines.writers",
    },
    "pipelines.bootstrap.workers": {"pipelines.bootstrap.unit"},
    "pipelines.capfilt": {
        "pipelines.bootstrap.cluster",
        "pipelines.bootstrap.endpoint",
        "pipelines.bootstrap.estimate",
        "pipelines.bootstrap.ledger",
        "pipelines.bootstrap.report",
        "pipelines.bootstrap.rules",
        "pipelines.bootstrap.unit",
        "pipelines.bootstrap.workers",
        "pipelines.evaluate",
        "pipelines.events",
    },
    "pipelines.captions": {"pipelines.events", "pipelines.jobs"},
    "pipelines.convert": {"pipelines.events", "pipelines.writers"},
    "pipelines.engine": {
        "pipelines.habits",
        "pipelines.memory",
        "pipelines.model",
        "pipelines.prompted",
        "pipelines.saving",
        "pipelines.segments",
    },
    "pipelines.inputs": {"pipelines.events"},
    "pipelines.jobs": {"pipelines.events"},
    "pipelines.region_files": {"data.atomic", "pipelines.drawing", "pipelines.writers"},
    "pipelines.rerank": {"pipelines.model"},
    "pipelines.evaluate": {
        "pipelines.engine",
        "pipelines.evaluation.choosing",
        "pipelines.evaluation.finding",
        "pipelines.evaluation.material",
        "pipelines.evaluation.measures",
        "pipelines.evaluation.predictions",
        "pipelines.evaluation.report",
        "pipelines.evaluation.retrieval",
        "pipelines.evaluation.tasks",
        "pipelines.evaluation.writing",
        "pipelines.events",
        "pipelines.leakage",
        "pipelines.metrics.intervals",
        "pipelines.model",
    },
    "pipelines.evaluation.choosing": {
        "pipelines.evaluation.measures",
        "pipelines.evaluation.predictions",
        "pipelines.evaluation.tasks",
        "pipelines.evaluation.templates",
        "pipelines.metrics.matching",
        "pipelines.metrics.ptb",
    },
    "pipelines.evaluation.finding": {
        "pipelines.evaluation.measures",
        "pipelines.evaluation.predictions",
        "pipelines.evaluation.tasks",
        "pipelines.metrics.detection",
    },
    "pipelines.evaluation.material": {"pipelines.events", "pipelines.model"},
    "pipelines.evaluation.measures": {"pipelines.leakage", "pipelines.metrics.intervals"},
    "pipelines.evaluation.report": {"pipelines.evaluation.material", "pipelines.evaluation.measures"},
    "pipelines.evaluation.retrieval": {
        "pipelines.evaluation.measures",
        "pipelines.evaluation.predictions",
        "pipelines.evaluation.tasks",
        "pipelines.events",
        "pipelines.metrics.retrieval",
        "pipelines.rerank",
    },
    "pipelines.evaluation.tasks": {
        "pipelines.evaluation.material",
        "pipelines.evaluation.measures",
        "pipelines.evaluation.predictions",
        "pipelines.evaluation.templates",
        "pipelines.events",
        "pipelines.model",
    },
    "pipelines.evaluation.writing": {
        "pipelines.evaluation.measures",
        "pipelines.evaluation.predictions",
        "pipelines.evaluation.tasks",
        "pipelines.metrics.captions",
        "pipelines.metrics.jars",
        "pipelines.metrics.ptb",
        "pipelines.metrics.vqa",
    },
    "pipelines.prompted": {"pipelines.arguments"},
    "pipelines.conversing": {"pipelines.arguments", "pipelines.prompted"},
    "pipelines.model": {
        "pipelines.arguments",
        "pipelines.batching",
        "pipelines.conversing",
        "pipelines.habits",
        "pipelines.encoding",
        "pipelines.prompted",
        "pipelines.regions",
        "pipelines.saving",
    },
    "pipelines.run_log": {"pipelines.run_events"},
    "pipelines.run_report": {"pipelines.run_events", "pipelines.run_log"},
    "pipelines.metrics": {
        "pipelines.metrics.captions",
        "pipelines.metrics.detection",
        "pipelines.metrics.intervals",
        "pipelines.metrics.jars",
        "pipelines.metrics.matching",
        "pipelines.metrics.ptb",
        "pipelines.metrics.retrieval",
        "pipelines.metrics.vqa",
    },
    "pipelines.metrics.captions": {
        "pipelines.metrics.aligned",
        "pipelines.metrics.jars",
        "pipelines.metrics.ptb",
    },
    "pipelines.metrics.vqa": {"pipelines.metrics.aligned"},
    "pipelines.sidecars": {"pipelines.captions", "pipelines.events", "pipelines.inputs"},
    "pipelines.tables": {"pipelines.captions", "pipelines.events"},
    "pipelines.vectors": {"pipelines.tables"},
    "pipelines.watch": {"pipelines.run_events"},
    "apps.cli": {
        "",
        "apps.bootstrapping",
        "apps.chatting",
        "apps.converting",
        "apps.evaluating",
        "apps.listing",
        "apps.options",
        "apps.regions",
        "apps.running",
        "apps.show",
        "apps.train",
        "apps.worlds",
        "models.catalog",
    },
    "apps.bootstrapping": {"apps.options", "apps.show", "data.samples", "models.catalog"},
    "apps.converting": {"", "apps.options", "apps.show"},
    "apps.evaluating": {"apps.options", "apps.show", "models.catalog"},
    "apps.demo": {"apps.demo_pictures", "apps.options", "apps.running", "apps.show", "models.catalog"},
    "apps.demo_pictures": {"data.world"},
    "apps.listing": {"apps.show", "models.catalog"},
    "apps.options": {"models.catalog"},
    "apps.show": {"models.catalog"},
    "apps.training": {"apps.show"},
    "apps.worlds": {"apps.options", "apps.show", "data.world"},
    "data.bart": {"data.padding", "data.tokens"},
    "models.florence_checkpoints": {
        "models.florence",
        "models.language_checkpoints",
        "models.seq2seq_checkpoints",
        "models.weights",
    },
    "pipelines.regions": {"pipelines.arguments", "pipelines.prompted", "pipelines.segments"},
    "apps.chatting": {"apps.options", "apps.running", "apps.show"},
    "apps.regions": {"apps.options", "apps.running", "apps.show"},
    "apps.running": {"apps.options", "apps.show"},
}

# The only libraries there are, and who may use each.
OWNERS: dict[str, set[str]] = {
    "torch": {
        "types",
        "data.pixels",
        "data.resample",
        "nn",
        "towers",
        "fusion",
        "models",
        "objectives",
        "tasks",
        "pipelines",
    },
    "numpy": {"types", "data", "tasks", "pipelines"},
    "PIL": {"types", "data", "pipelines"},
    "simplejpeg": {"data"},
    "pillow_heif": {"data"},
    "tokenizers": {"data"},
    "ftfy": {"data"},
    "safetensors": {"models.files", "models.safe"},
    "huggingface_hub": {"models.files"},
    "pyarrow": {"data.tables", "pipelines"},
    "tensorboard": {"pipelines.run_log"},
    "faster_coco_eval": {"pipelines.metrics.detection"},
    "nltk": {"pipelines.metrics.vqa"},
    "ray": {"pipelines.bootstrap.cluster"},
    "cyclopts": {"apps"},
    "rich": {"apps"},
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "faster_coco_eval": "faster-coco-eval",
    "pillow_heif": "pillow-heif",
    "huggingface_hub": "huggingface-hub",
}

# Networks, objectives and tasks see tensors: no file, no network, no other process.
UNWORLDLY = {"nn", "towers", "fusion", "models", "objectives", "tasks"}
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
MESSENGERS = {"models.files", "models.safe"}


def broken_layers(modules: list[Module], named: dict[str, set[str]] = NAMED) -> list[str]:
    names = {module.name for module in modules}
    found: list[str] = []
    for module in modules:
        if module.rung not in BELOW:
            found.append(f"{module.path}: {module.rung} is no rung of the ladder")
            continue
        for line, other in own_imports(module, names):
            rung = other.partition(".")[0]
            if rung not in BELOW[module.rung] and other not in named.get(module.name, set()):
                found.append(
                    f"{module.path}:{line}: {module.name or 'the root'} may not import {other or 'the root'}"
                )
    return found


def stale_names(modules: list[Module], named: dict[str, set[str]] = NAMED) -> list[str]:
    names = {module.name for module in modules}
    used = {module.name: {other for _, other in own_imports(module, names)} for module in modules}
    return [f"{a} -> {b}" for a, others in named.items() for b in others if b not in used.get(a, set())]


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
            if library in sys.stdlib_module_names or library == "sightread":
                continue
            if not {module.rung, module.name} & OWNERS.get(library, set()):
                found.append(f"{module.path}:{line}: {module.name} may not use {library}")
    return found


def broken_seclusion(modules: list[Module]) -> list[str]:
    found: list[str] = []
    for module in modules:
        if module.rung not in UNWORLDLY or module.name in MESSENGERS:
            continue
        found += [
            f"{module.path}:{line}: {module.name} may not use {dotted}"
            for line, dotted in imported(module)
            if dotted.partition(".")[0] in WORLD
        ]
        found += [f"{module.path}: {module.name} opens a file" for n in module.nodes() if called(n) == "open"]
    return found


def hidden_imports(modules: list[Module]) -> list[str]:
    return [
        f"{module.path}: {called(node)} hides an import from this test"
        for module in modules
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


def test_no_named_pair_is_stale(package: list[Module]) -> None:
    none(stale_names(package))


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


@pytest.mark.parametrize("module", ["sightread", "sightread.models.catalog", "sightread.apps.cli"])
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
    assert loaded_by("sightread.pipelines.metrics", PACKAGE.parent, heavy) == set()


# Each checker sees what it is there to see.

BROKEN: list[tuple[Callable[[list[Module]], list[str]], dict[str, str]]] = [
    (broken_layers, {"nn/a.py": "from sightread.data.b import c", "data/b.py": ""}),
    (broken_layers, {"nn/a.py": "def f():\n    import sightread.towers.b", "towers/b.py": ""}),
    (broken_layers, {"types.py": "if TYPE_CHECKING:\n    from sightread import errors", "errors.py": ""}),
    (broken_layers, {"towers/a.py": "from sightread.towers import b", "towers/b.py": ""}),
    (broken_layers, {"tasks/a.py": "from sightread.models.b import C", "models/b.py": ""}),
    (broken_layers, {"apps/a.py": "import sightread.data.b as b", "data/b.py": ""}),
    (broken_layers, {"pipelines/a.py": "from sightread import load", "__init__.py": ""}),
    (broken_layers, {"data/a.py": "from sightread.data.b import *", "data/b.py": ""}),
    (broken_layers, {"utils/a.py": ""}),
    (stale_names, {"nn/blocks.py": ""}),
    (cycles, {"nn/a.py": "import sightread.nn.b", "nn/b.py": "def f():\n    from sightread.nn import a"}),
    (broken_owners, {"models/a.py": "def f():\n    import transformers"}),
    (broken_owners, {"models/a.py": "from torchvision.ops import nms"}),
    (broken_owners, {"apps/cli.py": "import numpy as np"}),
    (broken_owners, {"apps/cli.py": "if TYPE_CHECKING:\n    from torch import Tensor"}),
    (broken_owners, {"tasks/a.py": "import tokenizers"}),
    (broken_owners, {"models/clip.py": "from huggingface_hub import snapshot_download"}),
    (broken_seclusion, {"models/a.py": "from pathlib import Path"}),
    (broken_seclusion, {"nn/a.py": "def f(p):\n    return open(p)"}),
    (broken_seclusion, {"tasks/a.py": "import urllib.request"}),
    (hidden_imports, {"nn/a.py": "import importlib\nimportlib.import_module('sightread.data.b')"}),
    (hidden_imports, {"nn/a.py": "__import__('torch')"}),
]


@pytest.mark.parametrize(("checker", "files"), BROKEN)
def test_a_broken_rule_is_seen(
    tmp_path: Path, checker: Callable[[list[Module]], list[str]], files: dict[str, str]
) -> None:
    named = {"nn.blocks": {"nn.attention"}}
    modules = write_package(tmp_path, files)
    assert stale_names(modules, named) if checker is stale_names else checker(modules)


def test_what_is_allowed_is_not_seen(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from sightread.errors import E",
        "errors.py": "import os",
        "nn/__init__.py": "",
        "nn/a.py": "import torch\nfrom sightread.types import B\nfrom sightread.errors import E",
        "nn/b.py": "from sightread.nn.a import Attention",
        "types.py": "from PIL import Image",
        "models/clip.py": "from sightread.nn import a\nfrom sightread.nn.a import Attention",
        "pipelines/p.py": "from pathlib import Path\nimport sightread.models.clip",
        "apps/cli.py": "import rich\nfrom sightread.pipelines.p import x",
    }
    modules = write_package(tmp_path, files)
    named = {"nn.b": {"nn.a"}}
    assert broken_layers(modules, named) == stale_names(modules, named) == cycles(modules) == []
    assert broken_owners(modules) == broken_seclusion(modules) == hidden_imports(modules) == []


def test_a_second_one_is_seen(tmp_path: Path) -> None:
    loop = "def f(m):\n    while True:\n        x = m.next_logits(x)"
    files = {
        "nn/a.py": "class Attention(nn.Module): ...\nclass BlockConfig: ...",
        "towers/t.py": "class CrossAttention(Module): ...",
        "tasks/generate.py": loop,
        "tasks/second.py": loop.replace("while True", "for _ in y"),
        "tasks/once.py": "def f(m):\n    return m.next_logits(x)",
    }
    modules = write_package(tmp_path, files)
    assert networks_called(modules, "Attention") == ["nn.a.Attention", "towers.t.CrossAttention"]
    assert networks_called(modules, "Block") == []
    assert files_with_loops_over(modules, "next_logits") == ["tasks.generate", "tasks.second"]


def test_a_heavy_import_is_seen_through_other_modules(tmp_path: Path) -> None:
    write_package(tmp_path, {"light/__init__.py": "from light import b", "light/b.py": "import sqlite3"})
    assert loaded_by("light", tmp_path, {"sqlite3", "smtplib"}) == {"sqlite3"}
