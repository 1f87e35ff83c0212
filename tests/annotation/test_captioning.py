from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.annotation import runner
from sightloop.annotation.captioning import Caption, caption_images
from sightloop.tasks.caption_filter import CaptionFilter, drop_reason, find_loop
from sightloop.types import Done, Failed, Pixels, Skipped


@pytest.mark.parametrize(
    ("text", "loop"),
    [
        ("a dog on a beach", ""),
        ("ha ha ha", ""),
        ("ha ha ha ha", "ha"),
        ("Very, very very VERY large", "very"),
        ("new york new york", ""),
        ("a dog, a dog, a dog.", "a dog"),
        ("a cat and a cat and a cat", ""),
        ("a cat and a cat and a cat and", "a cat and"),
        ("one two three one two three one two three", "one two three"),
        ("a b c d e f g h " * 3, "a b c d e f g h"),
        ("a b c d e f g h i " * 3, ""),
        ("", ""),
        (". . . . .", ""),
        ("a man and a woman and a child", ""),
        ("1 1 1 1", "1"),
    ],
)
def test_loops(text: str, loop: str) -> None:
    found = find_loop(text)
    assert bool(found) == bool(loop)
    if loop:
        assert sorted(found.split()) == sorted(loop.split())


WORDS = st.lists(st.sampled_from(["a", "dog", "cat", "red"]), min_size=1, max_size=8)


@given(WORDS, st.integers(4, 6), WORDS, WORDS)
def test_what_is_repeated_is_found(
    phrase: list[str], times: int, before: list[str], after: list[str]
) -> None:
    assert find_loop(" ".join(before + phrase * times + after))


@given(st.lists(st.sampled_from(["a", "dog", "cat"]), max_size=40))
def test_loops_are_those_of_the_definition(words: list[str]) -> None:
    def brute() -> bool:
        return any(
            words[i : i + n] * times == words[i : i + n * times]
            for n in range(1, 9)
            for times in ([4] if n == 1 else [3])
            for i in range(len(words) - n * times + 1)
        )

    assert bool(find_loop(" ".join(words))) == brute()


def test_kinds_of_drops() -> None:
    rules = CaptionFilter(prompt="A photo of", drop_if=re.compile("water(mark|print)"))
    assert drop_reason("a photo of a dog", rules)[0] == ""
    assert drop_reason("", rules)[0] == "empty"
    assert drop_reason(" .,- ", rules)[0] == "empty"
    assert drop_reason("a photo of", rules)[0] == "empty"
    assert drop_reason("a watermark", rules)[0] == "unwanted"
    assert drop_reason("no no no no", rules)[0] == "looping"
    everything = CaptionFilter(keep_all=True, drop_if=re.compile("x"))
    assert drop_reason("", everything)[0] == ""
    assert drop_reason("no no no no", everything)[0] == ""
    assert drop_reason("x", everything)[0] == "unwanted"


class Writer:
    image_spec = 1

    def read(self, sources, *, workers=2, isolate=True, limits=None):
        for source in sources:
            yield Pixels(source, np.zeros((3, 1, 1), np.uint8), (1, 1))

    def caption(self, images, prompt=None, **decoding):
        return [image.name.replace("_", " \n ") for image in images]


class Judge(Writer):
    image_spec = 2

    def __init__(self):
        self.asked = []

    def match(self, images, texts):
        assert all(isinstance(image, Pixels) for image in images)
        self.asked.append(list(texts))
        return np.array([0.9 if "dog" in text else 0.1 for text in texts], np.float32)


class Shelf:
    """A sink that keeps everything in a dict."""

    def __init__(self, done=()):
        self.kept: dict[str, Caption] = {}
        self.done = set(done)
        self.order: list[str] = []
        self.commits = 0

    def check(self, picture):
        return Skipped(picture, "there") if picture in self.done else None

    def keep(self, picture, caption):
        if picture == "full":
            return Failed(picture, "disk full")
        self.kept[picture] = caption
        return None

    def skipped(self, picture):
        self.order.append(picture)

    def commit(self):
        self.commits += 1

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("own", [False, True])
def test_captions_are_judged_dressed_and_kept(own: bool) -> None:
    judge = Judge()
    writer = judge if own else Writer()
    sink = Shelf(done=["old"])
    rules = CaptionFilter(prefix="<", suffix=">", min_match=0.5)
    inputs = ["a_dog", "old", "a_cat", "no_no_no_no", Failed("x", "torn"), "full"]
    events = list(caption_images((writer, judge), inputs, sink, rules, runner.LoaderConfig(2)))
    assert [(type(event), event.name) for event in events] == [
        (Done, "a_dog"),
        (Skipped, "old"),
        (Done, "a_cat"),
        (Done, "no_no_no_no"),
        (Failed, "x"),
        (Failed, "full"),
    ] or own
    assert sink.kept["a_dog"].text == "<a dog>"
    assert sink.kept["a_dog"].score == pytest.approx(0.9)
    assert sink.kept["a_cat"].dropped == "unmatched"
    assert sink.kept["no_no_no_no"].dropped == "looping"
    assert [text for texts in judge.asked for text in texts] == ["a dog", "a cat", "full"]
    assert sink.order == ["old"]
    assert sink.commits >= 1
    assert sink.finished
