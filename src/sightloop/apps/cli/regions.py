"""The commands that find regions in images: `sightloop detect`, `locate`, `segment` and `read`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias, TypeVar

from cyclopts import Group, Parameter

from sightloop.apps.cli.common import Paths, check_model
from sightloop.apps.cli.options import (
    DecodingOptions,
    NamedModelOptions,
    RegionOption,
    RuntimeOptions,
    parse_entries,
    parse_region,
)
from sightloop.apps.cli.output import Column, OutputTable, print_message
from sightloop.apps.cli.tables import RowMaker, TableRun, Verb
from sightloop.checkpoints.hub import weights_identity
from sightloop.errors import UsageError
from sightloop.types import JsonDict, JsonMapping, Pixels, Region

if TYPE_CHECKING:
    from sightloop.annotation.region_files import RegionFile
    from sightloop.inference.model import Model

_EPILOGUES = {
    "detect": (
        "Examples:\n"
        "  sightloop detect photos -m florence-community/Florence-2-base-ft --draw drawn\n"
        "  sightloop detect photos -m M --phrases 'cat,dog,red car' --out regions.jsonl\n"
        "  sightloop detect photos -m M --describe --json\n"
        "  sightloop detect photo.jpg -m M --region 10,20,200,180"
    ),
    "locate": (
        "Examples:\n"
        "  sightloop locate photos -m florence-community/Florence-2-base-ft --phrases 'the man with the hat'\n"
        "  sightloop locate photos -m M -p 'a dog and two cats' -p 'the lamp' --out regions.json"
    ),
    "segment": (
        "Examples:\n"
        "  sightloop segment photos -m florence-community/Florence-2-base-ft -p 'the red car' --draw drawn\n"
        "  sightloop segment photo.jpg -m M --region 10,20,200,180 --json"
    ),
    "read": (
        "Examples:\n"
        "  sightloop read receipts -m florence-community/Florence-2-base-ft\n"
        "  sightloop read receipts -m M --out texts.jsonl --draw drawn"
    ),
}

Regions: TypeAlias = list[Region]  # of one image
QueryT = TypeVar("QueryT")


@Parameter(name="*", group=Group("Output", sort_key=10))
@dataclass(frozen=True, slots=True, kw_only=True)
class RegionOutput:
    """Files written besides the rows on standard output. The same command resumes an interrupted run; existing files
    are not replaced, but FILE.jsonl takes new images."""

    draw: Annotated[Path | None, Parameter(metavar="FOLDER")] = None
    """Draw the regions on a copy of each image, in this new folder. Default: no drawings."""

    out: Annotated[Path | None, Parameter(metavar="FILE|FOLDER")] = None
    """Write all regions to FILE.json (COCO), FILE.jsonl, or a new folder without an extension (YOLO labels). Default:
    no file."""

    @property
    def kind(self) -> RegionFile:
        """Format of --out by its extension. Raises `UsageError` for an unknown one."""
        kinds: dict[str, RegionFile] = {".json": "coco", ".jsonl": "jsonl", "": "yolo"}
        extension = "" if self.out is None else self.out.suffix.lower()
        if extension not in kinds:
            raise UsageError(f"--out {self.out}: name x.json (COCO), x.jsonl, or a folder for YOLO labels.")
        return kinds[extension]

    def check(self) -> None:
        """Raises `UsageError`, before any model is loaded, if an output has a wrong name or exists already."""
        is_begun = self.out is not None and self.out.with_name(f"{self.out.name}.partial").exists()
        if self.out is not None and self.kind != "jsonl" and self.out.exists():
            raise UsageError(f"--out {self.out}: exists already; give another name.")
        if self.draw is not None and (
            self.draw.is_file() or (self.draw.is_dir() and any(self.draw.iterdir()) and not is_begun)
        ):
            raise UsageError(f"--draw {self.draw}: exists already; name a new folder.")


_OUTPUT, _DECODING, _RUNTIME = RegionOutput(), DecodingOptions(), NamedModelOptions()
_Phrases = Annotated[
    list[str] | None, Parameter(name=["--phrases", "-p"], negative=(), consume_multiple=False)
]


def detect(
    *paths: Paths,
    phrases: Annotated[str | None, Parameter(alias="-p", metavar="A,B,...|FILE")] = None,
    describe: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    region: RegionOption = None,
    output: RegionOutput = _OUTPUT,
    decoding: DecodingOptions = _DECODING,
    runtime: NamedModelOptions = _RUNTIME,
) -> int:
    """Detect objects in every image: label, box and score of each.

    Boxes are left, top, right and bottom in pixels of the upright image; scores are 0 to 1, higher is surer.

    Args:
        phrases: Names of objects to detect: a,b,c or a file with one per line. Default: every object that the model
            finds.
        describe: Label each object with a description instead of a name.
        region: Name what is in this box, in pixels of the upright image; excludes --phrases and --describe.
    """
    names = None if phrases is None else parse_entries("--phrases", phrases)
    if (names is not None) + describe + (region is not None) > 1:
        raise UsageError("--phrases, --describe and --region: give only one of them.")
    options = decoding.as_kwargs() | ({} if region is None else {"region": parse_region(region)})

    def verb(model: Model, images: list[Pixels]) -> list[Regions]:
        return model.detect(images, names, describe=describe, **options)

    settings = {"phrases": names, "describe": describe, "options": options}
    return _run("detect", "detecting", paths, verb, output, runtime, settings)


def locate(
    *paths: Paths,
    phrases: _Phrases = None,
    output: RegionOutput = _OUTPUT,
    decoding: DecodingOptions = _DECODING,
    runtime: NamedModelOptions = _RUNTIME,
) -> int:
    """Locate what a phrase refers to, or every phrase of a sentence, in every image.

    Boxes are left, top, right and bottom in pixels of the upright image; scores are 0 to 1, higher is surer.

    Args:
        phrases: A phrase or a sentence; repeat the option for several.
    """
    queries, options = _check_phrases(phrases), decoding.as_kwargs()

    def verb(model: Model, images: list[Pixels]) -> list[Regions]:
        return _each_query(lambda pairs, texts: model.locate(pairs, texts, **options), images, queries)

    settings = {"phrases": queries, "options": options}
    return _run("locate", "locating", paths, verb, output, runtime, settings)


def segment(
    *paths: Paths,
    phrases: _Phrases = None,
    region: RegionOption = None,
    output: RegionOutput = _OUTPUT,
    decoding: DecodingOptions = _DECODING,
    runtime: NamedModelOptions = _RUNTIME,
) -> int:
    """Segment what a phrase refers to in every image: its outline and box.

    Coordinates are in pixels of the upright image; scores are 0 to 1, higher is surer.

    Args:
        phrases: A phrase; repeat the option for several.
        region: Instead of a phrase, segment what is in this box, in pixels of the upright image.
    """
    if (phrases is None) == (region is None):
        raise UsageError("--phrases or --region: give one of them.")
    options = decoding.as_kwargs()
    queries = _check_phrases(phrases) if region is None else [parse_region(region)]

    def verb(model: Model, images: list[Pixels]) -> list[Regions]:
        return _each_query(lambda pairs, texts: model.segment(pairs, texts, **options), images, queries)

    settings = {"phrases": queries, "options": options}
    return _run("segment", "segmenting", paths, verb, output, runtime, settings)


def read(
    *paths: Paths,
    region: RegionOption = None,
    output: RegionOutput = _OUTPUT,
    decoding: DecodingOptions = _DECODING,
    runtime: NamedModelOptions = _RUNTIME,
) -> int:
    """Read the text in every image (OCR), each piece of text with its box.

    Boxes are left, top, right and bottom in pixels of the upright image.

    Args:
        region: Read only the text in this box, in pixels of the upright image.
    """
    options = decoding.as_kwargs() | ({} if region is None else {"region": parse_region(region)})

    def verb(model: Model, images: list[Pixels]) -> list[Regions]:
        return model.read_text(images, **options)

    return _run("read", "reading", paths, verb, output, runtime, {"options": options})


def _run(
    capability: Literal["detect", "locate", "segment", "read"],
    activity: str,
    paths: Sequence[str],
    verb: Callable[[Model, list[Pixels]], list[Regions]],
    output: RegionOutput,
    runtime: RuntimeOptions,
    settings: JsonMapping,
) -> int:
    """Runs a verb over the images, prints a row per region and writes the files of `output`.

    Args:
        capability: of the model.
        activity: for the progress bar.
        paths: files, folders and globs.
        verb: the regions of each image.
        output: files.
        runtime: model and loading.
        settings: what decides the regions beside the model.
    """
    output.check()
    check_model(capability, runtime)
    from sightloop.annotation.region_files import Drawings, RegionTable
    from sightloop.data.datasets.schema import fields_from_region

    drawings = None if output.draw is None else Drawings(output.draw)

    def opened() -> RegionTable:
        assert output.out is not None
        about = {"verb": capability, **settings, "model": weights_identity(runtime.source, runtime.lora)}
        return RegionTable(output.out, output.kind, about, drawings)

    def shown(name: str, regions: Regions) -> tuple[list[JsonDict], list[JsonDict]]:
        if drawings is not None:
            drawings.add(name, regions)
        fields = [fields_from_region(region) for region in regions]
        return fields, [{"regions": fields}] if runtime.json else [_cells(region) for region in regions]

    def process(model: Model) -> tuple[Verb[Regions], RowMaker[Regions]]:
        return lambda images: verb(model, images), shown

    columns = [Column("name"), Column("label"), Column("box", 22), Column("score", 5, True)]
    run = TableRun(capability, activity, (), settings, lambda rows: True)
    opener = None if output.out is None else opened
    status = run.run_into(opener, paths, runtime, OutputTable(columns, as_json=runtime.json), process)
    if drawings is not None and drawings.count:
        print_message(f"{output.draw}: {drawings.count:,} images with their regions drawn.")
    return status


def _cells(region: Region) -> JsonDict:
    """A region as a row for people."""
    box = " ".join(f"{edge:.0f}" for edge in region.box)
    return {"label": region.label, "box": box, "score": "" if region.score is None else region.score}


def _each_query(
    verb: Callable[[list[Pixels], list[QueryT]], list[Regions]],
    images: list[Pixels],
    queries: Sequence[QueryT],
) -> list[Regions]:
    """The regions of all queries in each image, in the order of the queries.

    The verb takes pairs. For images a, b and queries x, y they are (a, x), (a, y), (b, x), (b, y); the model encodes
    each distinct image of a batch once.
    """
    pairs = [image for image in images for _ in queries]
    regions = verb(pairs, [*queries] * len(images))
    count = len(queries)
    return [
        [region for of_query in regions[i : i + count] for region in of_query]
        for i in range(0, len(regions), count)
    ]


def _check_phrases(phrases: list[str] | None) -> list[str]:
    """The phrases. Raises `UsageError` if there is none, or one is blank."""
    if not phrases or any(not text.strip() for text in phrases):
        raise UsageError("--phrases: give at least one, and none that is empty.")
    return phrases


COMMANDS = {verb: _EPILOGUES[verb.__name__] for verb in (detect, locate, segment, read)}
