"""The documentation cannot drift: its blocks run, its links lead somewhere, its generated parts have everything."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import sightloop
from sightloop.apps.cli import main as cli
from sightloop.checkpoints.hub import BUNDLED_FOLDER
from sightloop.evaluation.task_names import TASK_DESCRIPTIONS
from sightloop.training.config import OBJECTIVES
from sightloop.training.model_sizes import SIZES
from sightloop.training.recipes import RECIPES
from tests.documents import (
    FOLDERS,
    IMAGES,
    anchors,
    blocks,
    commands,
    dead_links,
    make_targets,
    run_pages,
    sightloop_arguments,
    slug,
    steps,
    strange_extras,
    strange_scripts,
    strange_targets,
    words,
)
from tests.rules import REPOSITORY, ROOMS, none
from tests.slow_tests import LONGEST_FILES, SLOW_FILES

DOCS = REPOSITORY / "docs"


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()
PAGES = {path: path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}
ROOT_PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
NAMES = [path.relative_to(REPOSITORY).as_posix() for path in PAGES]


@pytest.fixture(scope="module")
def expanded() -> dict[Path, str]:
    """Every page as the build makes it."""
    pages = {path: generate.expand(text) for path, text in PAGES.items()}
    return pages | {path: path.read_text("utf-8") for path in ROOT_PAGES}


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What of each page does not run."""
    if not BUNDLED_FOLDER.is_dir():
        pytest.skip("this source tree has no bundled model")
    pages = {name: text for name, text in zip(NAMES, PAGES.values(), strict=True) if steps(text)}
    return run_pages(pages, tmp_path_factory.mktemp("pages"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, text in zip(NAMES, PAGES.values(), strict=True) if steps(text)])
def test_what_a_page_says_to_type_runs(name: str, failures: dict[str, list[str]]) -> None:
    assert failures[name] == []


def test_links_and_anchors_lead_somewhere(expanded: dict[Path, str]) -> None:
    none([f"{path}: {link}" for path in expanded for link in dead_links(path, expanded)])


@pytest.mark.parametrize("path", [*PAGES, *ROOT_PAGES], ids=lambda path: path.name)
def test_programs_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert strange_targets(text, (REPOSITORY / "Makefile").read_text("utf-8")) == []
    assert strange_extras(text, set(project["optional-dependencies"])) == []
    assert strange_scripts(text, REPOSITORY) == []


@pytest.mark.parametrize("path", [*PAGES, *ROOT_PAGES], ids=lambda path: path.name)
def test_every_command_has_options_that_exist(path: Path) -> None:
    """Also of the commands that are not run, and of the examples in the generated help."""
    for arguments in sightloop_arguments(path.read_text("utf-8")):
        if arguments[:1] != ["--version"]:
            cli.app.parse_args(arguments, exit_on_error=False, print_error=False)


def test_every_python_block_compiles() -> None:
    for path, text in PAGES.items():
        for block in blocks(text):
            if block.language in ("python", "py"):
                compile(block.text, str(path), "exec")


def test_every_page_is_in_the_navigation_once() -> None:
    lines = (REPOSITORY / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2].splitlines()
    listed = [line.split()[-1] for line in lines if line.endswith(".md")]
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in PAGES)


# The generated parts.


def test_every_command_and_option_is_in_the_reference() -> None:
    text = generate.command_line()
    modules = [value for value in vars(cli).values() if hasattr(value, "COMMANDS")]
    named = {command.__name__ for each in modules for command in each.COMMANDS}
    assert set(generate.commands()) == named | {"completion"}
    for name in generate.commands():
        section = text.partition(f"\n## sightloop {name}\n")[2].partition("\n## ")[0]
        options = {
            option
            for argument in cli.app[name].assemble_argument_collection()
            if argument.show
            for option in argument.names
            if option.startswith("-")
        }
        assert [option for option in options if not re.search(rf"{option}(?![\w-])", section)] == [], name


def test_every_recipe_and_setting_is_in_the_reference() -> None:
    text = generate.expand((DOCS / "reference" / "recipes.md").read_text("utf-8"))
    for name in RECIPES:
        assert f"\n### {name}\n" in text
        assert f'"name": "{name}"' in text  # with all its settings
    listed = generate.SETTING.findall((DOCS / "reference" / "recipes.md").read_text("utf-8"))
    assert sorted(listed) == sorted(generate.default_settings())
    for word in (*OBJECTIVES, *SIZES):
        assert f"`{word}`" in text


def test_every_exit_status_is_in_the_reference() -> None:
    source = Path(cli.__file__).read_text("utf-8")
    returned = {int(number) for number in re.findall(r"return (\d+)$", source, re.MULTILINE)}
    named = {int(number) for number in re.findall(r"^_[A-Z_]+ = (\d+)", source, re.MULTILINE)}
    assert set(generate.EXIT_STATUSES) == {0} | returned | named
    for status in generate.EXIT_STATUSES:
        assert f"| {status} |" in generate.exit_statuses()


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "reference" / "python.md").read_text("utf-8")
    named = anchors(text)
    assert [n for n in sightloop.__all__ if n != "__version__" and f"sightloop.{n}" not in named] == []


def test_every_room_is_in_the_architecture() -> None:
    assert generate.rooms_of_rules() == ROOMS
    assert list(generate.ROOM_CONTENTS) == list(ROOMS)
    assert generate.rooms().count("\n| `") == len(ROOMS)


def test_every_task_and_environment_variable_is_documented() -> None:
    measure = (DOCS / "tutorials" / "measure.md").read_text("utf-8")
    assert [task for task in TASK_DESCRIPTIONS if f"| `{task}` |" not in measure] == []
    environment = (DOCS / "reference" / "environment.md").read_text("utf-8")
    package = "\n".join(path.read_text("utf-8") for path in Path(sightloop.__file__).parent.rglob("*.py"))
    read = set(re.findall(r"environ(?:\.get\(|\.setdefault\(|\[)\"([A-Z_]+)\"", package))
    read |= set(re.findall(r"\"(SIGHTLOOP_\w+)\"", package))
    assert [name for name in sorted(read) if f"`{name}`" not in environment] == []


def test_a_marker_is_replaced_and_an_unknown_one_is_an_error() -> None:
    assert "| 130 |" in generate.on_page_markdown("a\n\n<!-- generate: exit_statuses -->\n")
    with pytest.raises(KeyError):
        generate.expand("<!-- generate: nothing -->")


# Quick and slow tests.


def test_slow_files_exist_and_the_quick_targets_leave_them_out() -> None:
    none([name for name in sorted(SLOW_FILES) if not (REPOSITORY / "tests" / name).is_file()])
    assert set(LONGEST_FILES) <= SLOW_FILES
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    recipe = makefile.partition("\nquick: ")[2].partition("\n\n")[0]
    assert '-m "not slow"' in recipe
    assert "--durations" in recipe  # which tests became slow
    assert "slow" not in makefile.partition("\nunit: ")[2].partition("\n\n")[0]


# The machinery sees what it is there to see.

SAMPLE = """
# x

```bash
make test        # everything
make demo MODEL=some/where
sightloop caption photos/ \\
    --model Salesforce/blip-vqa-base   # a comment
git clone x && cd x
```

```console
$ sightloop models --json
output sightloop nothing
```

```python
x = 1
```
between

<!-- not run: needs a cluster -->
```bash
torchrun --nproc-per-node 8 -m sightloop train world --data x --out y
sightloop bootstrap x --out y --engine ray
python -m benchmarks.nothing
```

```python
assert x == 1
```
"""


def test_commands_are_found() -> None:
    assert [words(line) for line in commands(SAMPLE, "sightloop")] == [
        ["sightloop", "caption", "photos/", "--model", "Salesforce/blip-vqa-base"],
        ["sightloop", "models", "--json"],
        ["sightloop", "bootstrap", "x", "--out", "y", "--engine", "ray"],
    ]
    assert len(commands(SAMPLE, "make")) == 2
    assert [arguments[0] for arguments in sightloop_arguments(SAMPLE)] == [
        "caption",
        "models",
        "train",
        "bootstrap",
    ]


def test_steps_are_in_order_and_without_what_is_not_run() -> None:
    kinds = [kind for kind, _ in steps(SAMPLE)]
    assert kinds == ["sightloop", "sightloop", "python", "python"]
    assert all("ray" not in text for _, text in steps(SAMPLE))


def test_pages_run_apart_and_what_fails_is_named(tmp_path: Path) -> None:
    fine = "```python\nx = 1\n```\n```bash\nsightloop --version\n```\n```python\nassert x == 1\n```\n"
    broken = "```bash\nsightloop no-such-verb\n```\n```python\nx\n```\n"
    report = run_pages({"fine.md": fine, "broken.md": broken}, tmp_path)
    assert report["fine.md"] == []
    assert ["no-such-verb" in report["broken.md"][0], "NameError" in report["broken.md"][1]] == [True, True]


def test_targets_extras_and_scripts_that_do_not_exist_are_seen() -> None:
    makefile = "test: lint\n\techo\nVENV := x\nbench:\n"
    assert make_targets(makefile) == {"test", "bench"}
    assert strange_targets(SAMPLE, makefile) == ["demo"]
    assert strange_extras("pip install 'sightloop[heif, nothing]'", {"heif"}) == ["nothing"]
    assert strange_scripts(SAMPLE, REPOSITORY) == ["benchmarks.nothing"]


def test_anchors_are_those_of_the_site() -> None:
    page = "# Many `GPUs`\n## What the run *checks*\n## A\n## A\n```\n## no\n```\n::: sightloop.load\n"
    assert anchors(page) == {"many-gpus", "what-the-run-checks", "a", "a_1", "sightloop.load"}
    assert slug("nano: what [it](x.md) is, and isn't") == "nano-what-it-is-and-isnt"


def test_dead_links_and_anchors_are_seen(tmp_path: Path) -> None:
    here, other = tmp_path / "here.md", tmp_path / "other.md"
    text = (
        "# Top\n[a](other.md#there) [b](other.md#gone) [c](https://x.y) ![d](image.png) [e](#top) [f](#gone)\n"
        "```\n[g](code.md)\n```\n    ```\n    [h](code.md)\n    ```\n"
    )
    pages = {here: text, other: "## There\n"}
    for path, content in pages.items():
        path.write_text(content)
    assert dead_links(here, pages) == ["other.md#gone", "image.png", "#gone"]


def test_images_and_folders_are_noticed() -> None:
    line = "sightloop caption photos/ holiday/2024/ --out x.jsonl; model.caption('cat.jpg', \"a/b/dog.png\")"
    assert IMAGES.findall(line) == ["cat.jpg", "a/b/dog.png"]
    assert FOLDERS.findall(line) == ["photos", "holiday/2024"]
