"""The demonstration behind `make demo`: caption, judge, classify, ask and search a few images, shown on the terminal
and in one HTML page.

python -m sightloop.apps.demo.__main__ --photos FOLDER --model FOLDER-OR-HUB-ID
"""

from __future__ import annotations

import os
import sys
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from sightloop.apps.cli import common
from sightloop.apps.cli.options import at_least, whole
from sightloop.apps.cli.output import Column, OutputTable, complain, say
from sightloop.apps.demo.pictures import Album, Shot, own, packaged, rendered
from sightloop.checkpoints import catalog
from sightloop.errors import ImageError, SightloopError, UsageError

if TYPE_CHECKING:
    from sightloop.apps.demo.page import DemoResult, DemoSearch
    from sightloop.inference.load import Model

_NAME = Column("name", 12)
_SHOWN = 4  # of what a search finds

app = App(
    name="python -m sightloop.apps.demo.__main__", help_format="plaintext", suppress_keyboard_interrupt=False
)


@app.default
def demo(
    *,
    model: str = catalog.BUNDLED,
    photos: Path | None = None,
    count: Annotated[int, Parameter(converter=whole)] = 8,
    out: Path = Path("demo-out"),
) -> int:
    """Do with some images what the model can do, and write a page that shows it.

    Parameters
    ----------
    model
        A folder or a hub id.
    photos
        A folder of images. Without it: photographs that come inside scikit-image and scikit-learn where those are
        installed, else rendered scenes.
    count
        So many images at most.
    out
        The folder for the page.
    """
    at_least("--count", count, 1)
    album = _album(photos, count)
    began = time.monotonic()
    try:
        loaded = common.load(model, device="auto", dtype="float32")
    except SightloopError as error:
        raise UsageError(f"{error}\nName a model that you have: make demo MODEL=folder-or-hub-id") from error
    title = f"{len(album.shots)} images {album.where}, read by {_describe(loaded)}"
    print(title, flush=True)
    shots, pictures = _read(loaded, album)
    if not pictures:
        raise UsageError("none of the images can be read")
    tour = Tour(loaded, replace(album, shots=tuple(shots)), pictures)
    tour.caption()
    tour.judge()
    tour.classify()
    tour.ask()
    tour.search()
    _finish(tour, title, time.monotonic() - began, out)
    return 0


@dataclass(eq=False)
class Tour:
    """A model's verbs over an album, one after the other; each prints what it found and adds it to the page."""

    model: Model
    album: Album
    pictures: list[Any]

    def __post_init__(self) -> None:
        from sightloop.apps.demo.page import DemoResult

        self.readings: list[DemoResult] = [DemoResult(s.name, s.picture, s.credit) for s in self.album.shots]
        self.searches: list[DemoSearch] = []
        self.notes: list[str] = []

    def caption(self) -> None:
        """What is in each image."""
        if self._says("caption", "a sentence for each image", "sightloop caption photos"):
            rows = OutputTable([_NAME, Column("caption")])
            texts = self.model.caption(self.pictures)
            for i, text in enumerate(texts):
                self._add(i, caption=text)
                rows.row({"name": self._name(i), "caption": text})

    def judge(self) -> None:
        """Its own text, or caption, against those of the next two images."""
        own = [s.text or r.caption for s, r in zip(self.album.shots, self.readings, strict=True)]
        texts = [text for text in own if text]
        command = "sightloop match photo.jpg 'a text' 'another'"
        if len(texts) < len(own) or not self._says(
            "match", "does a text fit an image? (others: the texts of the next two)", command
        ):
            return
        rows = OutputTable([_NAME, Column("match", 6, True), Column("others", 14), Column("text")])
        first = 0
        for i, (shot, picture) in enumerate(zip(self.album.shots, self.pictures, strict=True)):
            tried = list(dict.fromkeys([texts[i], *(texts[(i + k) % len(texts)] for k in (1, 2))]))
            scores: list[float] = self.model.match(picture, tried).tolist()
            truth = [text == texts[i] if shot.text else None for text in tried]
            first += scores[0] == max(scores)
            self._add(i, texts=tuple(zip(tried, scores, truth, strict=True)))
            others = ", ".join(f"{score:.2f}" for score in scores[1:])
            rows.row({"name": self._name(i), "match": scores[0], "others": others, "text": texts[i]})
        if all(shot.text for shot in self.album.shots) and len(texts) > 2:
            self._note(
                f"The true text has the highest match in {first} of {len(texts)} images (guessing: 1 in 3)."
            )

    def classify(self) -> None:
        """The best of the album's labels."""
        labels = self.album.labels
        command = (
            f"sightloop classify photos --labels {','.join(labels[:3])!r},... --template 'a photo of {{}}.'"
        )
        if self._says("classify", "which of these labels fits best?", command):
            rows = OutputTable([_NAME, Column("label", 24), Column("probability", 11, True)])
            for i, found in enumerate(
                self.model.classify(self.pictures, labels, ("a photo of {}.",)).tolist()
            ):
                best = sorted(zip(labels, found, strict=True), key=lambda pair: -pair[1])[:3]
                self._add(i, classes=tuple(best))
                rows.row({"name": self._name(i), "label": best[0][0], "probability": best[0][1]})

    def ask(self) -> None:
        """A question about each image."""
        questions = [shot.question for shot in self.album.shots]
        if self._says("answer", "questions about the images", "sightloop ask photos -q 'what is it?'"):
            rows = OutputTable([_NAME, Column("question", 36), Column("answer")])
            for i, text in enumerate(self.model.answer(self.pictures, questions)):
                self._add(i, answers=((questions[i], text),))
                rows.row({"name": self._name(i), "question": questions[i], "answer": text})

    def search(self) -> None:
        """Images for a text, and images like an image, by the cosine of their embeddings."""
        from sightloop.apps.demo.page import DemoSearch

        if not self._says(
            "embed", "images for a text; images like an image", "sightloop embed photos --out x.npy"
        ):
            return
        texts = list(self.album.searches)
        if not texts:
            own = {r.caption: i for i, r in reversed(list(enumerate(self.readings))) if r.caption}
            texts = sorted(own.items(), key=lambda pair: pair[1])[:_SHOWN]
        vectors = self.model.embed_images(self.pictures)
        rows = OutputTable([Column("query", 40), Column("found, best first (cosine)")])
        for text, right in texts:
            cosines = (vectors @ self.model.embed_texts(text)[0]).tolist()
            self.searches.append(DemoSearch(text, _best(cosines), right if self.album.searches else None))
        for i in range(min(2, len(self.pictures) - 1)):
            cosines = (vectors @ vectors[i]).tolist()
            self.searches.append(DemoSearch(i, tuple(pair for pair in _best(cosines) if pair[0] != i)))
        for found in self.searches:
            query = found.query if isinstance(found.query, str) else f"[{self._name(found.query)}]"
            names = ", ".join(f"{self._name(i)} {cosine:.2f}" for i, cosine in found.found[:_SHOWN])
            rows.row({"query": query, "found, best first (cosine)": names})
        if self.album.searches:
            first = sum(found.found[0][0] == found.right for found in self.searches)
            self._note(
                f"The image that is meant comes first for {first} of {len(texts)} texts "
                f"(guessing: 1 in {len(self.pictures)})."
            )

    def _says(self, verb: str, what: str, command: str) -> bool:
        """Whether the model can do it; prints a heading, or that it cannot."""
        if verb not in self.model.capabilities:
            print(f"\n{verb}: {self.model.name} cannot do this", flush=True)
            return False
        print(f"\n{verb}: {what}   $ {command}", flush=True)
        return True

    def _name(self, index: int) -> str:
        return self.album.shots[index].name

    def _add(self, index: int, **what: Any) -> None:
        self.readings[index] = replace(self.readings[index], **what)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)


def _album(photos: Path | None, count: int) -> Album:
    if photos is not None:
        album = own(photos, count)
        if not album.shots:
            raise UsageError(
                f"there are no images in {photos}. Name a folder that has some: make demo PHOTOS=folder"
            )
        return album
    if (album := packaged(count)).shots:
        return album
    say(
        "There are no photographs at hand (scikit-image and scikit-learn bring some): these are rendered scenes."
    )
    say("Your own: make demo PHOTOS=folder")
    return rendered(count)


def _read(model: Model, album: Album) -> tuple[list[Shot], list[Any]]:
    """The images that can be read, prepared; the others are named."""
    shots: list[Shot] = []
    pictures: list[Any] = []
    read = model.read([shot.picture for shot in album.shots])
    for shot, picture in zip(album.shots, read, strict=True):
        if isinstance(picture, ImageError):
            say(f"failed: {shot.name}: {picture.reason}")
            continue
        shots.append(shot)
        pictures.append(picture)
    return shots, pictures


def _best(cosines: Sequence[float]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(enumerate(cosines), key=lambda pair: -pair[1]))


def _describe(model: Model) -> str:
    entry = catalog.find_entry(model.name)
    if entry is None or entry.name != catalog.BUNDLED:
        return model.name
    return f"{model.name} ({entry.parameters:.0f} M weights, {entry.where}: small and often wrong)"


def _finish(tour: Tour, title: str, seconds: float, out: Path) -> None:
    from sightloop.apps.demo.page import write_page

    notes = [*tour.notes, f"All of it took {seconds:.1f} seconds, loading the model included."]
    warning = ""
    if tour.model.name == catalog.BUNDLED:
        jobs = ("caption", "match", "answer", "classify")
        better = ", ".join(dict.fromkeys(catalog.RECOMMENDED[job] for job in jobs))
        warning = (
            f"{catalog.BUNDLED} learned from some 7,000 photographs and is often wrong. It is here so that everything "
            f"works at once and without a network. Models for work: {better}."
        )
    page = write_page(out / "index.html", title, tour.readings, tour.searches, notes, warning)
    print(f"\n{notes[-1]}\nThe page: {page.resolve()}", flush=True)
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(page.resolve().as_uri())


def main(arguments: list[str] | None = None) -> int:
    """Runs the demonstration and returns its exit status, as the command does."""
    try:
        return app(arguments, exit_on_error=False, print_error=False, result_action="return_value") or 0
    except (CycloptsError, SightloopError, OSError) as error:
        complain("demo", error)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
