"""Demonstration of `make demo`: caption, match, classify, question and search a few images.

    python -m sightloop.apps.demo.__main__ --photos FOLDER --model FOLDER-OR-HUB-ID

The results are printed and written to one HTML page.
"""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from sightloop.apps.cli import common
from sightloop.apps.cli.help_format import WrappingFormatter
from sightloop.apps.cli.options import check_at_least, integer
from sightloop.apps.cli.output import Column, OutputTable, print_error, print_message
from sightloop.apps.demo.album import Album, DemoImage, folder_album, package_album, synthetic_album
from sightloop.checkpoints import catalog
from sightloop.errors import ImageError, SightloopError, UsageError
from sightloop.types import Pixels

if TYPE_CHECKING:
    from sightloop.apps.demo.page import DemoResult, DemoSearch
    from sightloop.inference.model import Model

_NAME = Column("name", 12)
_SHOWN = 4  # matches of a search in the table

app = App(
    name="python -m sightloop.apps.demo.__main__",
    help_format="plaintext",
    help_formatter=WrappingFormatter(),
    suppress_keyboard_interrupt=False,
)


@app.default
def demo(
    *,
    model: str = catalog.BUNDLED,
    photos: Annotated[Path | None, Parameter(metavar="FOLDER")] = None,
    count: Annotated[int, Parameter(converter=integer)] = 8,
    out: Annotated[Path, Parameter(metavar="FOLDER")] = Path("demo-out"),
) -> int:
    """Run every capability of a model on a few images, and write an HTML page with the results.

    Args:
        model: Hub id, folder or weights file.
        photos: A folder of images. Default: photographs inside scikit-image and scikit-learn if those are installed,
            else rendered scenes.
        count: Maximum number of images.
        out: Folder for the page.
    """
    check_at_least("--count", count, 1)
    album = _choose_album(photos, count)
    start = time.monotonic()
    try:
        loaded_model = common.load(model, device="auto", dtype="float32")
    except SightloopError as error:
        raise UsageError(f"{error}\nName a model that you have: make demo MODEL=folder-or-hub-id") from error
    title = f"{len(album.images)} images {album.source}, read by {_describe_model(loaded_model)}"
    print(title, flush=True)
    images, pixels = _read_images(loaded_model, album)
    if not pixels:
        raise UsageError("none of the images can be read")
    run = DemoRun(loaded_model, replace(album, images=tuple(images)), pixels)
    run.caption()
    run.match()
    run.classify()
    run.ask()
    run.search()
    _finish(run, title, time.monotonic() - start, out)
    return 0


@dataclass(eq=False)
class DemoRun:
    """The capabilities of a model on an album; each method prints its results and adds them to the page.

    Args:
        model: The model.
        album: The images that can be read.
        pixels: These images, preprocessed for the model.
    """

    model: Model
    album: Album
    pixels: list[Pixels]

    def __post_init__(self) -> None:
        from sightloop.apps.demo.page import DemoResult

        self.results: list[DemoResult] = [
            DemoResult(each.name, each.image, each.credit) for each in self.album.images
        ]
        self.searches: list[DemoSearch] = []
        self.notes: list[str] = []

    def caption(self) -> None:
        """A caption of each image."""
        if self._print_heading("caption", "a sentence for each image", "sightloop caption photos"):
            rows = OutputTable([_NAME, Column("caption")])
            for i, text in enumerate(self.model.caption(self.pixels)):
                self.results[i] = replace(self.results[i], caption=text)
                rows.row({"name": self._name(i), "caption": text})

    def match(self) -> None:
        """The ITM probability of each image with its own text, or caption, and with those of the next two images."""
        own_texts = [
            image.text or result.caption
            for image, result in zip(self.album.images, self.results, strict=True)
        ]
        texts = [text for text in own_texts if text]
        command = "sightloop match photo.jpg 'a text' 'another'"
        if len(texts) < len(own_texts) or not self._print_heading(
            "match", "does a text match an image? (others: the texts of the next two)", command
        ):
            return
        rows = OutputTable([_NAME, Column("match", 6, True), Column("others", 14), Column("text")])
        best_count = 0
        for i, (image, pixels) in enumerate(zip(self.album.images, self.pixels, strict=True)):
            candidates = list(dict.fromkeys([texts[i], *(texts[(i + k) % len(texts)] for k in (1, 2))]))
            scores: list[float] = self.model.match(pixels, candidates).tolist()
            truth = [text == texts[i] if image.text else None for text in candidates]
            best_count += scores[0] == max(scores)
            scored = tuple(zip(candidates, scores, truth, strict=True))
            self.results[i] = replace(self.results[i], texts=scored)
            others = ", ".join(f"{score:.2f}" for score in scores[1:])
            rows.row({"name": self._name(i), "match": scores[0], "others": others, "text": texts[i]})
        if all(image.text for image in self.album.images) and len(texts) > 2:
            self._note(
                f"The true text has the highest match in {best_count} of {len(texts)} images (chance: 1 in 3)."
            )

    def classify(self) -> None:
        """The most probable of the album's labels."""
        labels = self.album.labels
        command = (
            f"sightloop classify photos --labels {','.join(labels[:3])!r},... --templates 'a photo of {{}}.'"
        )
        if self._print_heading("classify", "which of these labels is most probable?", command):
            rows = OutputTable([_NAME, Column("label", 24), Column("probability", 11, True)])
            probabilities = self.model.classify(self.pixels, labels, ("a photo of {}.",))  # [n, labels]
            for i, row in enumerate(probabilities.tolist()):
                best = sorted(zip(labels, row, strict=True), key=lambda pair: -pair[1])[:3]
                self.results[i] = replace(self.results[i], classes=tuple(best))
                rows.row({"name": self._name(i), "label": best[0][0], "probability": best[0][1]})

    def ask(self) -> None:
        """The answer to a question about each image."""
        questions = [image.question for image in self.album.images]
        command = "sightloop ask photos -q 'what is it?'"
        if self._print_heading("answer", "questions about the images", command):
            rows = OutputTable([_NAME, Column("question", 36), Column("answer")])
            for i, text in enumerate(self.model.answer(self.pixels, questions)):
                self.results[i] = replace(self.results[i], answers=((questions[i], text),))
                rows.row({"name": self._name(i), "question": questions[i], "answer": text})

    def search(self) -> None:
        """Images by text and images by image, ranked by the cosine of their embeddings."""
        from sightloop.apps.demo.page import DemoSearch

        if not self._print_heading(
            "embed", "images by text; images by image", "sightloop embed photos --out x.npy"
        ):
            return
        queries = list(self.album.searches)
        if not queries:
            # Without known texts: the first captions, of equal ones the first image.
            first_image = {r.caption: i for i, r in reversed(list(enumerate(self.results))) if r.caption}
            queries = sorted(first_image.items(), key=lambda pair: pair[1])[:_SHOWN]
        vectors = self.model.embed_images(self.pixels)  # [n, d]
        rows = OutputTable([Column("query", 40), Column("best first (cosine)")])
        for text, target in queries:
            cosines = (vectors @ self.model.embed_texts(text)[0]).tolist()
            self.searches.append(
                DemoSearch(text, _best_first(cosines), target if self.album.searches else None)
            )
        for i in range(min(2, len(self.pixels) - 1)):
            cosines = (vectors @ vectors[i]).tolist()
            self.searches.append(DemoSearch(i, tuple(pair for pair in _best_first(cosines) if pair[0] != i)))
        for search in self.searches:
            query = search.query if isinstance(search.query, str) else f"[{self._name(search.query)}]"
            names = ", ".join(f"{self._name(i)} {cosine:.2f}" for i, cosine in search.matches[:_SHOWN])
            rows.row({"query": query, "best first (cosine)": names})
        if self.album.searches:
            hits = sum(search.matches[0][0] == search.target for search in self.searches)
            self._note(
                f"The described image comes first for {hits} of {len(queries)} texts "
                f"(chance: 1 in {len(self.pixels)})."
            )

    def _print_heading(self, capability: str, what: str, command: str) -> bool:
        """Prints a heading with the equivalent command; returns whether the model has the capability."""
        if capability not in self.model.capabilities:
            print(f"\n{capability}: {self.model.name} cannot do this", flush=True)
            return False
        print(f"\n{capability}: {what}   $ {command}", flush=True)
        return True

    def _name(self, index: int) -> str:
        return self.album.images[index].name

    def _note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)


def _choose_album(photos: Path | None, count: int) -> Album:
    if photos is not None:
        album = folder_album(photos, count)
        if not album.images:
            raise UsageError(f"{photos}: has no images. Name a folder that has some: make demo PHOTOS=folder")
        return album
    if (album := package_album(count)).images:
        return album
    print_message(
        "No photographs are installed (scikit-image and scikit-learn have some): using rendered scenes."
    )
    print_message("For your own: make demo PHOTOS=folder")
    return synthetic_album(count)


def _read_images(model: Model, album: Album) -> tuple[list[DemoImage], list[Pixels]]:
    """The images that can be read, and their pixels; the others are reported."""
    images: list[DemoImage] = []
    pixels: list[Pixels] = []
    for image, result in zip(album.images, model.read([each.image for each in album.images]), strict=True):
        if isinstance(result, ImageError):
            print_message(f"failed: {image.name}: {result.reason}")
            continue
        images.append(image)
        pixels.append(result)
    return images, pixels


def _best_first(cosines: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """(index, cosine), the highest cosine first."""
    return tuple(sorted(enumerate(cosines), key=lambda pair: -pair[1]))


def _describe_model(model: Model) -> str:
    entry = catalog.find_entry(model.name)
    if entry is None or entry.name != catalog.BUNDLED:
        return model.name
    return f"{model.name} ({entry.parameters:.0f} M weights, {entry.where}: small and often wrong)"


def _finish(run: DemoRun, title: str, seconds: float, out: Path) -> None:
    """Writes the page, prints its path, and opens it if there is a display."""
    from sightloop.apps.demo.page import write_page

    notes = [*run.notes, f"Total time: {seconds:.1f} seconds, including loading the model."]
    warning = ""
    if run.model.name == catalog.BUNDLED:
        capabilities = ("caption", "match", "answer", "classify")
        better = ", ".join(dict.fromkeys(catalog.RECOMMENDED[each] for each in capabilities))
        warning = (
            f"{catalog.BUNDLED} is trained on some 13,000 photographs and is often wrong. It is bundled so that "
            f"everything works at once, without a network. Better models: {better}."
        )
    page = write_page(out / "index.html", title, run.results, run.searches, notes, warning)
    print(f"\n{notes[-1]}\nThe page: {page.resolve()}", flush=True)
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(page.resolve().as_uri())


def main(arguments: list[str] | None = None) -> int:
    """Runs the demonstration.

    Args:
        arguments: The words after the program's name. Default: those of the process.

    Returns:
        The exit status: 0 success, 2 an error, 130 interrupted by Ctrl-C.
    """
    try:
        return app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except (CycloptsError, SightloopError, OSError) as error:
        print_error("demo", error)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
