"""The commands that find things in images: detect, locate, segment, read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from sightloop.apps.cli.common import Paths, model_for, run
from sightloop.apps.cli.options import BoxOption, DecodingOptions, MachineOptions, box_of, words_or_file
from sightloop.apps.cli.output import Column, OutputTable, Screen
from sightloop.errors import UsageError
from sightloop.types import JsonDict

if TYPE_CHECKING:
    from sightloop.annotation.region_files import RegionFile
    from sightloop.types import Region

_EPILOGUES = {
    "detect": (
        "Examples:\n"
        "  sightloop detect photos -m florence-community/Florence-2-base-ft --draw found\n"
        "  sightloop detect photos -m M --phrases 'cat,dog,red car' --out found.jsonl\n"
        "  sightloop detect photos -m M --describe --json\n"
        "  sightloop detect photo.jpg -m M --box 10,20,200,180"
    ),
    "locate": (
        "Examples:\n"
        "  sightloop locate photos -m florence-community/Florence-2-base-ft -p 'the man with the hat'\n"
        "  sightloop locate photos -m M -p 'a dog and two cats' --out found.json"
    ),
    "segment": (
        "Examples:\n"
        "  sightloop segment photos -m florence-community/Florence-2-base-ft -p 'the red car' --draw found\n"
        "  sightloop segment photo.jpg -m M --box 10,20,200,180 --json"
    ),
    "read": (
        "Examples:\n"
        "  sightloop read receipts -m florence-community/Florence-2-base-ft\n"
        "  sightloop read receipts -m M --out texts.jsonl --draw found"
    ),
}


@Parameter(name="*", group=Group("Where regions go", sort_key=10))
@dataclass(frozen=True, slots=True, kw_only=True)
class OutputOptions:
    """Beside the rows on standard output. Nothing that is there is replaced."""

    draw: Annotated[Path | None, Parameter(metavar="FOLDER")] = None
    """Paint what is found on a copy of each image, in this new folder."""

    out: Annotated[Path | None, Parameter(metavar="FILE|FOLDER")] = None
    """Write all regions to x.json (COCO's), x.jsonl or, without an ending, a folder of YOLO's labels."""

    @property
    def kind(self) -> RegionFile:
        """What --out is, by its ending. Raises UsageError for one that stands for nothing."""
        kinds: dict[str, RegionFile] = {".json": "coco", ".jsonl": "jsonl", "": "yolo"}
        ending = "" if self.out is None else self.out.suffix.lower()
        if ending not in kinds:
            raise UsageError(f"--out {self.out}: name x.json (COCO), x.jsonl, or a folder for YOLO's labels.")
        return kinds[ending]

    def check(self) -> None:
        """Raises UsageError where something is in the way, before any work is done."""
        if self.out is not None and self.kind and self.out.exists():
            raise UsageError(f"--out {self.out}: is there already; name another place.")
        if self.draw is not None and (
            self.draw.is_file() or (self.draw.is_dir() and any(self.draw.iterdir()))
        ):
            raise UsageError(f"--draw {self.draw}: is there already; name a new folder.")


_KEEPING, _DECODING, _MACHINE = OutputOptions(), DecodingOptions(), MachineOptions()
_Phrases = Annotated[
    list[str] | None, Parameter(name=["--phrase", "-p"], negative=(), consume_multiple=False)
]


def detect(
    *paths: Paths,
    phrases: Annotated[str | None, Parameter(metavar="A,B,...|FILE")] = None,
    describe: Annotated[bool, Parameter(negative=(), show_default=False)] = False,
    box: BoxOption = None,
    keeping: OutputOptions = _KEEPING,
    decoding: DecodingOptions = _DECODING,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Find the things in every image, each with its name, its box and how sure the model is.

    Boxes are left, top, right and bottom, in pixels of the image as it is seen.

    Parameters
    ----------
    phrases
        What to look for: a,b,c or a file with one a line. Without it: all that the model finds.
    describe
        Describe each thing instead of naming it.
    box
        Name what lies in this box alone, in pixels of the image as it is seen.
    """
    names = None if phrases is None else words_or_file("--phrases", phrases)
    if (names is not None) + describe + (box is not None) > 1:
        raise UsageError("--phrases, --describe and --box: give one of them.")
    options = decoding.given() | ({} if box is None else {"region": box_of(box)})

    def verb(model: Any, pictures: list[Any]) -> list[list[Region]]:
        return model.detect(pictures, names, describe=describe, **options)

    return _find("detect", "finding things", paths, verb, keeping, machine)


def locate(
    *paths: Paths,
    phrase: _Phrases = None,
    keeping: OutputOptions = _KEEPING,
    decoding: DecodingOptions = _DECODING,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Find what a phrase refers to, or each phrase of a sentence, in every image.

    Parameters
    ----------
    phrase
        A phrase or a sentence; give -p again for more.
    """
    asked, options = _asked(phrase), decoding.given()

    def verb(model: Any, pictures: list[Any]) -> list[list[Region]]:
        return _each(model.locate, pictures, asked, options)

    return _find("locate", "locating", paths, verb, keeping, machine)


def segment(
    *paths: Paths,
    phrase: _Phrases = None,
    box: BoxOption = None,
    keeping: OutputOptions = _KEEPING,
    decoding: DecodingOptions = _DECODING,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Outline what a phrase refers to, in every image.

    Parameters
    ----------
    phrase
        A phrase; give -p again for more.
    box
        In place of a phrase: outline what lies in this box, in pixels of the image as it is seen.
    """
    if (phrase is None) == (box is None):
        raise UsageError("-p or --box: give one of them.")
    asked: Sequence[Any] = _asked(phrase) if box is None else [box_of(box)]
    options = decoding.given()

    def verb(model: Any, pictures: list[Any]) -> list[list[Region]]:
        return _each(model.segment, pictures, asked, options)

    return _find("segment", "outlining", paths, verb, keeping, machine)


def read(
    *paths: Paths,
    box: BoxOption = None,
    keeping: OutputOptions = _KEEPING,
    decoding: DecodingOptions = _DECODING,
    machine: MachineOptions = _MACHINE,
) -> int:
    """Read the texts in every image, each with the box in which it stands.

    Parameters
    ----------
    box
        Read the text in this box alone, in pixels of the image as it is seen.
    """
    options = decoding.given() | ({} if box is None else {"region": box_of(box)})

    def verb(model: Any, pictures: list[Any]) -> list[list[Region]]:
        return model.read_text(pictures, **options)

    return _find("read", "reading", paths, verb, keeping, machine)


def _find(
    capability: Literal["detect", "locate", "segment", "read"],
    doing: str,
    paths: Sequence[str],
    verb: Callable[[Any, list[Any]], list[list[Region]]],
    keeping: OutputOptions,
    machine: MachineOptions,
) -> int:
    machine.check()
    keeping.check()
    model = model_for(capability, machine)
    from sightloop.annotation.region_files import Drawings, write_regions
    from sightloop.data.datasets.schema import fields_from_region

    drawings = None if keeping.draw is None else Drawings(keeping.draw)
    columns = [Column("name"), Column("label"), Column("box", 22), Column("score", 5, True)]
    kept: list[tuple[str, Sequence[Region]]] = []
    with Screen(doing, OutputTable(columns, as_json=machine.json)) as screen:
        for event in run(screen, machine, model, paths, partial(verb, model)):
            found: list[Region] = event.value
            kept += [(event.name, found)] if keeping.out is not None else []
            if drawings is not None:
                drawings.add(event.name, found)
            if machine.json:
                screen.row({"name": event.name, "regions": [fields_from_region(region) for region in found]})
                continue
            for region in found:
                box = " ".join(f"{edge:.0f}" for edge in region.box)
                score = "" if region.score is None else region.score
                screen.row({"name": event.name, "label": region.label, "box": box, "score": score})
        if keeping.out is not None and kept:
            write_regions(keeping.out, keeping.kind, kept)
            screen.say(f"{keeping.out}: the regions of {len(kept):,} images.")
        if drawings is not None and drawings.count:
            screen.say(f"{keeping.draw}: {drawings.count:,} images with their regions on them.")
    return screen.status


def _each(
    verb: Callable[..., list[list[Region]]],
    pictures: list[Any],
    asked: Sequence[Any],
    options: JsonDict,
) -> list[list[Region]]:
    """All that is asked of each image."""
    pairs = [picture for picture in pictures for _ in asked]  # the model encodes each image of a batch once
    found = verb(pairs, [*asked] * len(pictures), **options)
    each = len(asked)
    return [[region for one in found[i : i + each] for region in one] for i in range(0, len(found), each)]


def _asked(phrases: list[str] | None) -> list[str]:
    if not phrases or any(not text.strip() for text in phrases):
        raise UsageError("-p: say what to look for.")
    return phrases


COMMANDS = {verb: _EPILOGUES[verb.__name__] for verb in (detect, locate, segment, read)}
