"""The demonstration behind `make demo`: the main job on real pictures, in a folder of its own.

python -m sightread.apps.demo --model FOLDER-OR-HUB-ID --photos FOLDER
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from sightread.apps import cli
from sightread.apps.options import at_least, whole
from sightread.apps.show import complain
from sightread.errors import SightreadError, UsageError
from sightread.models import catalog

_LABELS = "a person,an animal,food,a vehicle,a building,a landscape,a piece of furniture,clothing"
_QUESTION = "what is in the picture?"

app = App(name="python -m sightread.apps.demo", help_format="plaintext", suppress_keyboard_interrupt=False)


@app.default
def demo(
    *,
    model: str | None = None,
    photos: Path | None = None,
    count: Annotated[int, Parameter(converter=whole)] = 8,
) -> int:
    """Copy some of your pictures into a temporary folder and do with them what the model can do.

    Parameters
    ----------
    model
        A folder or a hub id. Without it: the captioner that the catalogue recommends.
    photos
        A folder of pictures. Without it: ~/Pictures.
    count
        So many pictures at most.
    """
    at_least("--count", count, 1)
    name = model or catalog.pick_for("caption").name
    folder = photos or Path.home() / "Pictures"
    with tempfile.TemporaryDirectory(prefix="sightread-demo-") as place:
        copies = Path(place) / "photos"
        copied = _copy(folder, copies, count)
        if not copied:
            raise UsageError(
                f"there are no pictures in {folder}. Name a folder that has some: make demo PHOTOS=folder"
            )
        try:
            capabilities = cli.load(name, device="auto", dtype="float32").capabilities
        except SightreadError as error:
            remedy = "The demo brings no model of its own yet. Name one that you have: make demo MODEL=folder-or-hub-id"
            raise UsageError(f"{error}\n{remedy}") from error
        print(f"{copied} pictures from {folder}, {name}\n", flush=True)
        here = os.getcwd()
        os.chdir(place)  # short names in what is shown
        try:
            source = os.path.join(here, name) if os.path.exists(os.path.join(here, name)) else name
            return _show(source, capabilities)
        finally:
            os.chdir(here)


def _show(source: str, capabilities: frozenset[str]) -> int:
    commands: list[list[str]] = []
    if "caption" in capabilities:
        # Twice: the second run finds every caption in its place.
        commands += [["caption", "photos"], ["caption", "photos"]]
    if "answer" in capabilities:
        commands.append(["ask", "photos", "-q", _QUESTION])
    if "classify" in capabilities:
        commands.append(["classify", "photos", "--labels", _LABELS, "--top", "1"])
    if "embed" in capabilities:
        commands.append(["embed", "photos", "--out", "photos.npy"])
    statuses: list[int] = []
    for command in commands:
        print(f"$ sightread {shlex.join([*command, '-m', source])}", flush=True)
        statuses.append(cli.main([*command, "-m", source]))
        print(flush=True)
    return max(statuses, default=0)


def _copy(folder: Path, place: Path, count: int) -> int:
    """Copies the first pictures of a folder, so that no file is made beside the originals; returns how many."""
    from sightread.pipelines.inputs import find_pictures

    place.mkdir()
    names: set[str] = set()
    for found in find_pictures([folder]):
        name = os.path.basename(found) if isinstance(found, str) else ""
        if not isinstance(found, str) or name in names:
            continue
        shutil.copyfile(found, place / name)
        names.add(name)
        if len(names) == count:
            break
    return len(names)


def main(arguments: list[str] | None = None) -> int:
    """Runs the demonstration and returns its exit status, as the command does."""
    try:
        return app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except (CycloptsError, SightreadError) as error:
        complain("demo", error)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
