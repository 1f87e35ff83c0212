"""Numbers that are not finite never become results: each verb raises an error that names the dtype to try."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sightloop
from sightloop.inference.model import Model
from sightloop.tasks.finite import require_finite, require_finite_logits
from tests.checkpoints.test_against_reference import TEXTS, pictures
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    write_clip(folder / "clip")
    for head in ("caption", "answer", "match"):
        write_blip(folder / head, head=head)
    return folder


VERBS = {
    "embed_images": ("clip", lambda m: m.embed_images(pictures(2))),
    "embed_texts": ("clip", lambda m: m.embed_texts(TEXTS)),
    "similarity": ("clip", lambda m: m.similarity(pictures(1), TEXTS)),
    "classify": ("clip", lambda m: m.classify(pictures(2), ["dog", "cat"])),
    "match": ("match", lambda m: m.match(pictures(1), TEXTS)),
    "rank": ("match", lambda m: m.rank(pictures(1), TEXTS, k=2)),
    "caption": ("caption", lambda m: m.caption(pictures(2))),
    "caption by beams": ("caption", lambda m: m.caption(pictures(2), num_beams=3)),
    "caption sampled": ("caption", lambda m: m.caption(pictures(2), top_p=0.9)),
    "answer": ("answer", lambda m: m.answer(pictures(1), TEXTS[2])),
    "answer by choice": ("answer", lambda m: m.answer(pictures(1), TEXTS[2], candidates=["red", "blue"])),
}
# The last matrix of each part: what comes before it is finite.
PARTS = {
    "embed_texts": "text.norm",
    "match": "match_head",
    "rank": "match_head",
    "caption": "decoder.head",
    "caption by beams": "decoder.head",
    "caption sampled": "decoder.head",
    "answer": "decoder.head",
    "answer by choice": "decoder.head",
}


def spoil(model: Model, part: str, value: float) -> Model:
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if name.startswith(part) and not parameter.is_meta:
                parameter.fill_(value)
    return model


@pytest.mark.parametrize("verb", VERBS)
def test_weights_that_are_nan(checkpoints: Path, verb: str) -> None:
    name, run = VERBS[verb]
    run(sightloop.load(checkpoints / name, device="cpu"))
    model = spoil(sightloop.load(checkpoints / name, device="cpu"), PARTS.get(verb, ""), torch.nan)
    with pytest.raises(sightloop.CheckpointError, match="NaN or infinite"):
        run(model)


def test_an_overflow_of_float16_names_the_dtype_to_try(checkpoints: Path) -> None:
    model = spoil(sightloop.load(checkpoints / "clip", device="cpu", dtype="float16"), "vision.norm_out", 6e4)
    spoil(model, "vision.blocks.1.mlp.fc2", 6e4)
    with pytest.raises(sightloop.CheckpointError, match=r"float16 overflows.*bfloat16.*float32"):
        model.embed_images(pictures(2))


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1))
def test_any_number_that_is_not_finite_is_found(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    if values.isfinite().all():
        assert require_finite(values, "numbers", torch.float16) is values
    else:
        with pytest.raises(sightloop.CheckpointError, match="numbers are NaN or infinite: float16 overflows"):
            require_finite(values, "numbers", torch.float16)


def test_a_ban_is_no_fault() -> None:
    banned = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]])
    assert require_finite_logits(banned, torch.float32) is banned
    for wrong in (torch.inf, torch.nan):
        with pytest.raises(sightloop.CheckpointError, match="next-token logits"):
            require_finite_logits(torch.tensor([[0.0, 1.0], [wrong, 0.0]]), torch.float32)
