"""Generated parts of the documentation: command line, exit statuses, recipes, rooms. A hook of MkDocs.

A page holds a marker such as `<!-- generate: command_line -->`; the build replaces it with what the code says at that
moment. Nothing generated is kept in the repository. `python docs/generate.py PAGE` prints a page as the build sees it.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"^<!-- generate: (\w+) -->$", re.MULTILINE)
# A setting of a recipe with its meaning, in docs/reference/recipes.md; the build adds the default.
SETTING = re.compile(r"^- `([\w.]+)`: ", re.MULTILINE)

# Exit status -> meaning. The tests compare the keys with those of `sightloop.apps.cli.main`.
EXIT_STATUSES = {
    0: "Success: every input was processed or skipped for a stated reason.",
    1: "Some inputs failed, each named once with the cause; or the run as a whole stopped (disk full, out of memory).",
    2: "Wrong usage: an unknown option or value, a checkpoint that cannot be read, a model that cannot do the task.",
    130: "Interrupted by Ctrl-C. No file is left incomplete.",
    141: "The reader of standard output closed it, as in `sightloop ... | head`.",
}
# Room -> contents, in the order of tests/rules.py, which the tests compare with this.
ROOM_CONTENTS = {
    "errors": "the exceptions that a caller may catch",
    "types": "records that cross rooms: `Encoded`, `Loss`, `Region`, `Message`, image specs",
    "protocols": "what a network can do, as protocols",
    "data": "atomic writes, journals, random number generators, shuffling",
    "data.images": "decoding within limits, preprocessing, resampling, augmentation, tiles",
    "data.text": "tokenizers: BPE, WordPiece, SentencePiece; training a tokenizer",
    "data.video": "frames by time within limits, sampling, scene cuts, writing of clips",
    "data.copies": "hashes of images, copies by multi-index search, look-alikes, clusters of duplicates",
    "data.datasets": "every source as one `Dataset`, every target as one writer, conversion, leakage, rendered scenes",
    "nn": "the primitives: `Linear`, `Attention`, `Block`, LoRA, quantization",
    "towers": "one modality to `Encoded`: ViT, DaViT, ResNet, text",
    "models": "the families: CLIP, SigLIP, BLIP, BLIP-2, Florence-2, PaliGemma, LLaVA",
    "objectives": "tensors to `Loss`, without parameters: contrastive, matching, language, masked",
    "tasks": "single acts over protocols: generate, embed, match, parse regions, filter captions",
    "ranking": "candidates and their scores, statements of answers, the policy of what may be said",
    "reports": "the page of every report: frame, tiles, tables, plots",
    "workers": "processes and Ray actors that answer requests, and may die",
    "checkpoints": "where files are, how tensors are read, key maps of every family, the catalog",
    "inference": "`load`, `Model` and its verbs, prompting, chat, re-ranking, saving",
    "annotation": "one verb over a folder: runner, sidecars, tables, embeddings, regions, drawing",
    "metrics": "pure functions of predictions and references",
    "evaluation": "a task over a dataset: predictions, metrics with protocols, report",
    "training": "recipes, data loader, loss terms, step, trainer, checkpoint, monitor, report",
    "capfilt": "caption, filter, write the new dataset: shards, manifest, report",
    "search": "an index over images: build, filters, keywords, queries, hits; stores of LanceDB and Qdrant",
    "dialogue": "conversations over an index: plans of questions, typed tools, answers that cite images",
    "": "`sightloop/__init__.py`: the public names",
    "apps.web": "the page: static modules, styles and vendored libraries, sent as they are",
    "apps.server": "`sightloop serve`: routes, their gate, the scheduler, the models in memory",
    "apps.cli": "the command `sightloop`",
    "apps.demo": "`make demo`",
    "__main__": "`python -m sightloop`",
}


def command_line() -> str:
    """Every command with its arguments, options and examples, from the command line application itself."""
    from sightloop.apps.cli.main import app

    text = app.generate_docs(output_format="markdown", usage_name="sightloop")
    text = text[text.index("\n## sightloop ") + 1 :]
    # Docstrings are wrapped; in the page an option is one line.
    text = re.sub(r"(?<=\S)\n {4,}(?=\S)", " ", text)
    sections = re.split(r"(?=^## )", text, flags=re.MULTILINE)
    overview = "\n".join(
        f"- [`{name}`](#sightloop-{name}): {joined(app[name].help).partition('. ')[0].rstrip('.')}."
        for name in commands()
    )
    parts = [overview]
    for section in filter(str.strip, sections):
        name = re.match(r"## sightloop ([\w-]+)", section)
        epilogue = app[name[1]].help_epilogue if name else None
        parts.append(section.rstrip() + _epilogue(epilogue or ""))
    return "\n\n".join(parts) + "\n"


def commands() -> list[str]:
    """Names of the commands, in the order of the help."""
    from sightloop.apps.cli.main import app

    return [name for name in app if not name.startswith("-")]


def joined(text: str | None) -> str:
    """The first paragraph of a docstring on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _epilogue(text: str) -> str:
    """`Recipes:` and `Examples:` of a command's help as code blocks. Examples are for reading: `M` is any model."""
    parts = re.split(r"^(\w[\w ]*):\n", text, flags=re.MULTILINE)
    found = ""
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines = "\n".join(line.removeprefix("  ") for line in body.rstrip().splitlines())
        found += f"\n\n**{title}**:\n\n```text\n{lines}\n```"
    return found


def exit_statuses() -> str:
    """The table of exit statuses."""
    rows = [f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items()]
    return "\n".join(["| status | meaning |", "|---|---|", *rows]) + "\n"


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of nested settings; `terms` and `optimizer.multipliers` are one value each."""
    for name, value in values.items():
        where = f"{path}{name}"
        if isinstance(value, Mapping) and where not in ("terms", "optimizer.multipliers"):
            yield from leaves(value, f"{where}.")
        else:
            yield where, value


def default_settings() -> dict[str, Any]:
    """Every setting of a recipe -> its default; the recipe's name and `terms` have none."""
    from sightloop.training.config import Recipe, to_json

    values = to_json(Recipe(name="", terms={}))
    return {path: value for path, value in leaves(values) if path not in ("name", "terms")}


def show(value: Any) -> str:
    """A value as `--set` takes it; long lists are cut."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]} ...]"


def recipes() -> str:
    """Every recipe: its purpose, the settings in which it differs from the defaults, and all settings as JSON."""
    from sightloop.training.config import to_json
    from sightloop.training.recipe_names import RECIPE_DESCRIPTIONS
    from sightloop.training.recipes import RECIPES

    defaults = {path: f"`{show(value)}`" for path, value in default_settings().items()} | {
        "terms": "",
        "data.augment": "see above",
    }
    parts: list[str] = []
    for name, recipe in RECIPES.items():
        values = to_json(recipe)
        rows = [
            f"| `{path}` | `{show(value)}` | {defaults[path]} |"
            for path, value in leaves(values)
            if path != "name" and defaults[path] != f"`{show(value)}`"
        ]
        table = "\n".join(["| setting | value | default |", "|---|---|---|", *rows])
        body = "\n".join(f"    {line}" for line in compact_json(values).splitlines())
        parts.append(
            f"### {name}\n\n{RECIPE_DESCRIPTIONS[name]}.\n\n{table}\n\n"
            f'??? note "All settings of `{name}`"\n\n    ```json\n{body}\n    ```'
        )
    return "\n\n".join(parts) + "\n"


def compact_json(values: Mapping[str, Any]) -> str:
    """Indented JSON with each list on one line."""
    text = json.dumps(values, indent=2)
    return re.sub(r"\[([^\[\]{}]*)\]", lambda match: f"[{' '.join(match[1].split())}]", text)


def rooms() -> str:
    """The table of rooms of tests/rules.py, with the rooms that each may import from."""
    contracts = {"errors", "types", "protocols"}
    rows: list[str] = []
    for room, others in rooms_of_rules().items():
        names = sorted(others - contracts)
        shown = ", ".join(f"`{other or 'sightloop'}`" for other in names)
        rows.append(f"| `{room or 'sightloop'}` | {ROOM_CONTENTS[room]} | {shown} |")
    return "\n".join(["| room | contents | may import from |", "|---|---|---|", *rows]) + "\n"


def rooms_of_rules() -> dict[str, set[str]]:
    """`ROOMS` of tests/rules.py, which is a script of literals and unions of sets."""
    tree = ast.parse((ROOT / "tests" / "rules.py").read_text("utf-8"))
    names = {"CONTRACTS", "DATA", "NETWORKS", "ROOMS"}
    wanted = [
        node
        for node in tree.body
        if (isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in names)
        or (isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") in names)
    ]
    space: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), "tests/rules.py", "exec"), space)
    return space["ROOMS"]


PARTS: dict[str, Callable[[], str]] = {
    part.__name__: part for part in (command_line, exit_statuses, recipes, rooms)
}


def with_defaults(markdown: str) -> str:
    """A list of settings with the default of each behind its name."""
    defaults = default_settings()
    return SETTING.sub(lambda match: f"- `{match[1]}` (default `{show(defaults[match[1]])}`): ", markdown)


def expand(markdown: str) -> str:
    """A page with its generated parts in place of the markers."""
    if "<!-- generate: recipes -->" in markdown:
        markdown = with_defaults(markdown)
    return MARKER.sub(lambda match: PARTS[match[1]](), markdown)


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs calls this for every page."""
    return expand(markdown)


if __name__ == "__main__":
    print(expand(Path(sys.argv[1]).read_text("utf-8")))
