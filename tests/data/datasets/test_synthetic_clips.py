"""Moving scenes of the synthetic world: times, captions, and questions that a bag of frames cannot answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.data.datasets.synthetic_clips import (
    MovingScene,
    random_clip,
    render_clip,
    synthetic_videos,
    write_synthetic_videos,
)
from sightloop.data.video.reader import find_scenes, stop_workers, video_info
from sightloop.errors import UsageError


@given(st.integers(0, 2**32 - 1))
def test_a_clip_backwards_has_the_same_frames_and_the_other_answer(seed: int) -> None:
    clip = random_clip(np.random.default_rng(seed))
    back = clip.backwards()
    assert back.backwards() == clip
    there, reverse = (render_clip(one, _Still(seed), 6, 32).astype(int) for one in (clip, back))
    if clip.motion != "behind":  # which is the same forwards and backwards, of another thing in front
        assert np.abs(there - reverse[::-1]).max() <= 1
    answers = [[q["answer"] for q in one.questions() if q["needs_order"]] for one in (clip, back)]
    assert answers[0] != answers[1] or not answers[0]
    assert [q["question"] for q in clip.questions()] == [q["question"] for q in back.questions()] or (
        clip.motion == "turns"
    )


class _Still(np.random.Generator):
    """A generator without noise, so that frames can be compared."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(seed))

    def normal(self, *_: object, size: object = None, **__: object) -> np.ndarray:
        return np.zeros((32, 32, 3))


def test_a_bag_of_frames_answers_questions_of_order_at_chance() -> None:
    """Of every order question, the answer and that of the clip backwards are equally frequent."""
    random = np.random.default_rng(0)
    counts: dict[str, dict[str, int]] = {}
    for _ in range(4000):
        for question in random_clip(random).questions():
            if question["needs_order"] and "color" not in question["question"]:
                kind = question["question"].split(" the ")[0] + question["question"].split()[-1]
                own = counts.setdefault(kind, {})
                own[question["answer"]] = own.get(question["answer"], 0) + 1
    assert len(counts) == 2
    for own in counts.values():
        first, second = own.values()
        assert abs(first - second) < 5 * (first + second) ** 0.5


def test_videos_have_the_scenes_that_their_table_says(tmp_path: Path) -> None:
    videos = synthetic_videos(3, seed=5, scenes=4, size=64)
    table = write_synthetic_videos(tmp_path / "clips", videos)
    again = write_synthetic_videos(tmp_path / "again", synthetic_videos(3, seed=5, scenes=4, size=64))
    assert table.read_bytes() == again.read_bytes()
    for line in table.read_text().splitlines():
        record = json.loads(line)
        path = table.parent / record["file_name"]
        assert path.read_bytes() == (again.parent / path.name).read_bytes()
        assert video_info(path).duration == pytest.approx(record["scenes"][-1]["end"])
        scenes = find_scenes(path)
        assert [s.start for s in scenes] == pytest.approx([s["start"] for s in record["scenes"]], abs=0.021)
        assert record["captions"] == [", then ".join(s["caption"] for s in record["scenes"])]
        assert record["qa"] == []
    stop_workers()
    assert synthetic_videos(2, seed=5, scenes=4, size=64) == videos[:2]
    assert all(video.record()["qa"] for video in synthetic_videos(5))


def test_captions_are_sentences() -> None:
    assert str(MovingScene("ring", "orange", "left")) == "an orange ring moves left"
    assert str(MovingScene("star", "red", "turns", "blue")) == "a red star turns blue"
    assert str(MovingScene("star", "red", "behind", "blue")) == "a red star passes behind a blue square"


@pytest.mark.parametrize("options", [{"count": -1}, {"count": 1, "scenes": 0}, {"count": 1, "size": 33}])
def test_what_is_out_of_range_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        synthetic_videos(**options)
