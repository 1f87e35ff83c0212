from __future__ import annotations

import numpy as np
import pytest

from sightloop.annotation import runner
from sightloop.annotation.captioning import Caption, caption_images
from sightloop.tasks.caption_filter import CaptionFilter
from sightloop.types import Done, Failed, Pixels, Skipped


class FakeCaptioner:
    image_spec = 1

    def read(self, sources, *, workers=2, isolate=True, limits=None):
        for source in sources:
            yield Pixels(source, np.zeros((3, 1, 1), np.uint8), (1, 1))

    def caption(self, images, prompt=None, **decoding):
        return [image.name.replace("_", " \n ") for image in images]


class FakeMatcher(FakeCaptioner):
    image_spec = 2

    def __init__(self):
        self.asked = []

    def match(self, images, texts):
        assert all(isinstance(image, Pixels) for image in images)
        self.asked.append(list(texts))
        return np.array([0.9 if "dog" in text else 0.1 for text in texts], np.float32)


class MemorySink:
    """A sink that keeps everything in a dict."""

    def __init__(self, done=()):
        self.kept: dict[str, Caption] = {}
        self.done = set(done)
        self.order: list[str] = []
        self.commits = 0

    def check(self, image):
        return Skipped(image, "there") if image in self.done else None

    def add(self, image, caption):
        if image == "full":
            return Failed(image, "disk full")
        self.kept[image] = caption
        return None

    def note_skipped(self, image):
        self.order.append(image)

    def commit(self):
        self.commits += 1

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("same_model", [False, True])
def test_captions_are_scored_and_get_prefix_and_suffix(same_model: bool) -> None:
    matcher = FakeMatcher()
    captioner = matcher if same_model else FakeCaptioner()
    sink = MemorySink(done=["old"])
    rules = CaptionFilter(prefix="<", suffix=">", min_match=0.5)
    inputs = ["a_dog", "old", "a_cat", "no_no_no_no", Failed("x", "torn"), "full"]
    events = list(caption_images((captioner, matcher), inputs, sink, rules, runner.LoaderConfig(2)))
    assert [(type(event), event.name) for event in events] == [
        (Done, "a_dog"),
        (Skipped, "old"),
        (Done, "a_cat"),
        (Done, "no_no_no_no"),
        (Failed, "x"),
        (Failed, "full"),
    ]
    assert sink.kept["a_dog"].text == "<a dog>"
    assert sink.kept["a_dog"].score == pytest.approx(0.9)
    assert sink.kept["a_cat"].dropped == "unmatched"
    assert "0.100, below 0.5" in sink.kept["a_cat"].reason
    assert sink.kept["no_no_no_no"].dropped == "looping"
    assert [text for texts in matcher.asked for text in texts] == ["a dog", "a cat", "full"]
    assert sink.order == ["old"]
    assert sink.commits >= 1
    assert sink.finished
