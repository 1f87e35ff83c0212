"""The README cannot drift: its commands and Python run, its make targets exist, its tree is the tree.

Everything runs in one fresh folder, top to bottom as a reader would: a small random checkpoint stands under the name of
every model, and a small image under every image's name, that a line mentions. Nothing is fetched.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from sightloop.checkpoints.catalog import CATALOG
from sightloop.checkpoints.hub import BUNDLED_FOLDER
from tests.rules import PACKAGE, REPOSITORY

README = (REPOSITORY / "README.md").read_text("utf-8")
PICTURES = re.compile(r"(?<![\w/])((?:[\w.-]+/)*[\w-]+\.(?:jpe?g|png|webp|gif|bmp|tiff?))(?![\w/])")
FOLDERS = re.compile(r"(?<![\w./-])([\w-]+(?:/[\w-]+)*)/(?=[\s\"')]|$)")
TIMEOUT = 600


@dataclass(frozen=True)
class Block:
    """A fenced block: the word behind the fence, and the text."""

    language: str
    text: str


def blocks(markdown: str) -> list[Block]:
    found = re.findall(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)^```[ \t]*$", markdown, re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def command_lines(markdown: str) -> list[str]:
    """The commands of bash blocks, and those behind `$` of console blocks; continued lines joined, comments gone."""
    lines: list[str] = []
    for block in blocks(markdown):
        if block.language not in ("bash", "sh", "shell", "console"):
            continue
        joined = re.sub(r"\\\n\s*", " ", block.text).splitlines()
        if block.language == "console":
            joined = [line[2:] for line in joined if line.startswith("$ ")]
        lines += [line.strip() for line in joined if words(line)]
    return lines


def words(line: str) -> list[str]:
    """A command's words, without its comment."""
    return shlex.split(line, comments=True)


def commands(markdown: str, program: str) -> list[str]:
    return [line for line in command_lines(markdown) if words(line)[0] == program]


def python_of(markdown: str) -> str:
    """All Python blocks as one program: what one defines, the next may use."""
    return "\n".join(block.text for block in blocks(markdown) if block.language in ("python", "py"))


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))


def strange_targets(markdown: str, makefile: str) -> list[str]:
    known = make_targets(makefile)
    asked = [word for line in commands(markdown, "make") for word in words(line)[1:] if "=" not in word]
    return [word for word in asked if not word.startswith("-") and word not in known]


def strange_extras(markdown: str, extras: set[str]) -> list[str]:
    named = re.findall(r"sightloop\[([\w,\s-]+)\]", markdown)
    return [extra for names in named for extra in re.split(r"\s*,\s*", names) if extra not in extras]


def tree_in(markdown: str) -> set[str] | None:
    """The files in a block that begins with `src/sightloop/` (indented names, comments behind); None without one."""
    for block in blocks(markdown):
        lines = block.text.splitlines()
        if lines and lines[0].split() and lines[0].split()[0] == "src/sightloop/":
            return set(_listed(lines[1:]))
    return None


def _listed(lines: list[str]) -> list[str]:
    found: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in lines:
        text = re.sub(r"[│├└─]", " ", line)
        depth = len(text) - len(text.lstrip())
        while folders and folders[-1][0] >= depth:
            folders.pop()
        parent = "".join(name for _, name in folders)
        for word in text.split():
            if word.endswith("/"):
                folders.append((depth, word))
            elif word.endswith(".py"):
                found.append(parent + word)
            else:
                break  # the comment
    return found


def real_tree(root: Path) -> set[str]:
    """Every Python file but the empty ones that make a folder a package."""
    files = (
        path for path in root.rglob("*.py") if path.name != "__init__.py" or path.read_text("utf-8").strip()
    )
    return {path.relative_to(root).as_posix() for path in files}


def furnish(folder: Path, text: str) -> None:
    """Put a checkpoint, an image or a folder of images where `text` names one."""
    from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip
    from tests.tiny_checkpoints.florence import write_florence
    from tests.tiny_checkpoints.llava import LLAVA_15, write_llava

    for entry in CATALOG:
        if entry.name in text and entry.family == "clip":
            write_clip(folder / entry.name)
        elif entry.name in text and entry.family == "florence":
            write_florence(folder / entry.name)
        elif entry.name in text and entry.family == "llava":
            write_llava(folder / entry.name, tiled=False, template=LLAVA_15)
        elif entry.name in text and entry.layout != "original":
            head = next(head for head in ("answer", "match", "caption") if head in entry.capabilities)
            write_blip(folder / entry.name, head=head)
    for name in set(PICTURES.findall(text)):
        draw(folder / name)
    for name in set(FOLDERS.findall(text)):
        for i in range(2):
            draw(folder / name / f"{i}.jpg")


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((48, 36), 80).convert("RGB").save(path)


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
    )


def failures(markdown: str, folder: Path) -> list[str]:
    """What of a README's commands and Python does not run, with what it said."""
    found: list[str] = []
    for line in commands(markdown, "sightloop"):
        done = run(["bash", "-euo", "pipefail", "-c", line], folder)
        if done.returncode:
            found.append(f"{line}\n{done.stderr}")
    program = python_of(markdown)
    if program:
        done = run([sys.executable, "-c", program], folder)
        if done.returncode:
            found.append(done.stderr)
    return found


def test_what_the_readme_says_to_type_runs(tmp_path: Path) -> None:
    runnable = "\n".join([*commands(README, "sightloop"), python_of(README)])
    if not runnable.strip():
        pytest.skip("the README has no command and no Python yet")
    if not BUNDLED_FOLDER.is_dir():
        pytest.skip("this source tree has no bundled model")
    furnish(tmp_path, runnable)
    assert failures(README, tmp_path) == []


def test_make_targets_exist() -> None:
    assert strange_targets(README, (REPOSITORY / "Makefile").read_text("utf-8")) == []


def test_extras_exist() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    assert strange_extras(README, set(project["optional-dependencies"])) == []


def test_the_tree_is_the_tree() -> None:
    listed = tree_in(README)
    if listed is None:
        pytest.skip("the README has no tree yet")
    assert listed == real_tree(PACKAGE)


def test_links_into_the_repository_lead_somewhere() -> None:
    assert dead_links(README, REPOSITORY) == []


def dead_links(markdown: str, root: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", prose)
    names = [a or b for a, b in targets]
    return [name for name in names if "://" not in name and not (root / name).exists()]


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
```python
assert x == 1
```

```
src/sightloop/
  __init__.py      the public surface
  data/            bytes to batches, see a.py
    a.py b.py      two
  models/
    c.py
```
"""


def test_commands_are_found() -> None:
    assert [words(line) for line in commands(SAMPLE, "sightloop")] == [
        ["sightloop", "caption", "photos/", "--model", "Salesforce/blip-vqa-base"],
        ["sightloop", "models", "--json"],
    ]
    assert len(commands(SAMPLE, "make")) == 2


def test_python_blocks_are_one_program(tmp_path: Path) -> None:
    assert python_of(SAMPLE) == "x = 1\n\nassert x == 1\n"
    assert failures("```python\nx = 1\n```\n```python\nassert x == 1\n```\n", tmp_path) == []
    assert failures("```python\nassert 1 == 2\n```\n", tmp_path)


def test_a_command_that_fails_is_seen(tmp_path: Path) -> None:
    assert len(failures("```bash\nsightloop --help\nsightloop no-such-verb\n```\n", tmp_path)) == 1


def test_targets_and_extras_that_do_not_exist_are_seen() -> None:
    makefile = "test: lint\n\techo\nVENV := x\nbench:\n"
    assert make_targets(makefile) == {"test", "bench"}
    assert strange_targets(SAMPLE, makefile) == ["demo"]
    assert strange_extras("pip install 'sightloop[heif, nothing]'", {"heif"}) == ["nothing"]


def test_the_tree_is_read(tmp_path: Path) -> None:
    assert tree_in(SAMPLE) == {"__init__.py", "data/a.py", "data/b.py", "models/c.py"}
    assert tree_in("```\nsrc/other/\n```\n") is None
    drawn = "```\nsrc/sightloop/\n├── data/   x\n│   ├── a.py   y\n│   └── b.py\n└── c.py\n```\n"
    assert tree_in(drawn) == {"data/a.py", "data/b.py", "c.py"}
    for name, text in {"a.py": "", "b/__init__.py": "", "b/c.py": "x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert real_tree(tmp_path) == {"a.py", "b/c.py"}


def test_dead_links_are_seen(tmp_path: Path) -> None:
    (tmp_path / "here.md").write_text("")
    text = "[a](here.md) [b](gone.md#x) [c](https://x.y) ![d](pic.png)\n```\n[e](code.md)\n```\n"
    assert dead_links(text, tmp_path) == ["gone.md", "pic.png"]


def test_pictures_and_folders_are_noticed() -> None:
    line = "sightloop caption photos/ holiday/2024/ --out x.jsonl; model.caption('cat.jpg', \"a/b/dog.png\")"
    assert PICTURES.findall(line) == ["cat.jpg", "a/b/dog.png"]
    assert FOLDERS.findall(line) == ["photos", "holiday/2024"]
