"""What a policy leaves out of drawings: words of prompts, and concepts that a judge sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sightloop
from sightloop.errors import UsageError
from sightloop.inference.judges import Judges
from sightloop.ranking.policy import Concept, Policy, read_policy
from tests.tiny_checkpoints.clip_and_blip import write_clip
from tests.tiny_checkpoints.painter import painter_model

PROMPTS = ["a cat", "the dog"]


def test_drawings_above_a_threshold_are_left_out_and_counted(tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    write_clip(clip)
    model, judge = painter_model(tmp_path), sightloop.load(clip, device="cpu")
    model.judges = Judges(lambda name: sightloop.load(name, device="cpu"))
    drawn = model.draw(PROMPTS, 3, steps=2)
    texts = ["a cat", "the dog"]
    cosines = judge.similarity(drawn, texts)  # [6, 2]
    threshold = float(np.sort(cosines[:, 0])[2:4].mean())  # between the third and the fourth
    policy = Policy(concepts=(Concept(texts[0], threshold), Concept(texts[1], 1.0)), judge=str(clip))
    with pytest.warns(UserWarning, match="3 of 6 drawn images are left out, for: 'a cat' 3"):
        allowed = model.draw(PROMPTS, 3, steps=2, policy=policy)
    kept = [np.asarray(image) for image, row in zip(drawn, cosines, strict=True) if row[0] <= threshold]
    assert all(np.array_equal(a, b) for a, b in zip(kept, allowed, strict=True))
    for image in allowed:
        assert image.info["policy"]["a cat"] <= threshold
    with pytest.warns(UserWarning, match="left out"):
        best = model.draw(PROMPTS, 3, steps=2, policy=policy, judge=judge, keep=2)
    assert {image.tobytes() for image in best} <= {image.tobytes() for image in allowed}
    everything = model.draw(PROMPTS, steps=2, policy=Policy(concepts=(Concept("x", 1.0),), judge=str(clip)))
    assert len(everything) == 2  # and no warning


def test_prompts_with_a_word_are_refused(tmp_path: Path) -> None:
    model = painter_model(tmp_path)
    with pytest.raises(UsageError, match="is not drawn: the policy has the word"):
        model.draw(PROMPTS, policy=Policy(words=("dog",)))


GOOD = 'words = ["gore"]\njudge = "nano"\n[[concepts]]\ntext = "a weapon"\nthreshold = 0.25\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD.replace("0.25", "2"), "threshold=2 must be a cosine"),
        (GOOD.replace('"a weapon"', '""'), "text='' must be a text"),
        (GOOD.replace('judge = "nano"\n', ""), "judge .* and concepts go together"),
        (GOOD + "weight = 1\n", "a text and a threshold, nothing else"),
        ("concepts = 3\n", "must be tables"),
        ("images = true\n", "images is not known; a policy has words, judge and concepts"),
    ],
)
def test_wrong_policies_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        read_policy(path, images=True)


def test_concepts_are_for_images_alone(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(GOOD)
    assert read_policy(path, images=True).concepts == (Concept("a weapon", 0.25),)
    with pytest.raises(UsageError, match="is not known; a policy has words"):
        read_policy(path)
