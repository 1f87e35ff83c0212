"""How a checkpoint writes where nobody says: every verb, as the reference's `generate` does with the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, GenerationConfig
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import sightloop
from sightloop import Message
from sightloop.errors import CheckpointError, UsageError
from sightloop.inference.generation_config import decoding_defaults, decoding_options, generation_config
from sightloop.tasks.decoding import sampling_probs
from sightloop.tasks.decoding_options import Decoding
from tests.tiny_checkpoints.florence import write_florence
from tests.tiny_checkpoints.llava import LLAVA_15, write_llava
from tests.tiny_checkpoints.paligemma import write_paligemma

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

FILES: list[dict[str, Any]] = [
    {"max_new_tokens": 9},
    {"max_new_tokens": 9, "num_beams": 3, "length_penalty": -1.0},
    {"max_new_tokens": 12, "num_beams": 2, "no_repeat_ngram_size": 2, "early_stopping": True},
    {"max_new_tokens": 8, "repetition_penalty": 1.7, "min_new_tokens": 4},
    {"max_new_tokens": 9, "num_beams": 3, "no_repeat_ngram_size": 1, "repetition_penalty": 1.3},
    {"max_new_tokens": 9, "num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"max_new_tokens": 9, "eos_token_id": [1, 2, *range(270, 300)], "suppress_tokens": [*range(5, 260)]},
    {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 1, "do_sample": False, "temperature": None},
]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("given", FILES)
@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_every_verb_writes_as_the_files_say(family: str, given: dict[str, Any], tmp_path: Path) -> None:
    if family == "llava":
        theirs, processor = write_llava(tmp_path / "m", tiled=False, template=LLAVA_15)
    else:
        theirs, processor = write_paligemma(tmp_path / "m")
    for name, value in given.items():
        setattr(theirs.generation_config, name, value)
    theirs.save_pretrained(tmp_path / "m")
    theirs = type(theirs).from_pretrained(tmp_path / "m").eval()
    model, image = sightloop.load(tmp_path / "m", device="cpu"), picture(3)

    def wanted(text: str, **more: Any) -> str:
        made = processor(images=[image], text=[text], return_tensors="pt")
        with torch.inference_mode():
            rows = theirs.generate(**made, **more)
        (out,) = processor.batch_decode(rows[:, made["input_ids"].shape[1] :], skip_special_tokens=True)
        return out.strip()

    if family == "llava":
        prompt = model.network.render_chat([Message("user", "what?", (image,))])
        assert model.chat([Message("user", "what?", (image,))], max_new_tokens=7) == wanted(
            prompt, max_new_tokens=7
        )
        assert model.answer(image, "what?") == [wanted(prompt)]
        assert model.caption(image, "what?") == [wanted(prompt)]
        assert model.answer(image, "what?", num_beams=1) == [wanted(prompt, num_beams=1)]
    else:
        assert model.answer(image, "what?") == [wanted("<image>answer en what?")]
        assert model.caption(image) == [wanted("<image>caption en")]
    model.save(tmp_path / "back", layout="transformers")
    again = sightloop.load(tmp_path / "back", device="cpu")
    assert again.decoding == model.decoding
    (back,) = [type(theirs).from_pretrained(tmp_path / "back").eval()]
    made = AutoProcessor.from_pretrained(tmp_path / "back")(
        images=[image], text=["<image>a"], return_tensors="pt"
    )
    with torch.inference_mode():
        assert torch.equal(back.generate(**made), theirs.generate(**made))


DRAWN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 0, "temperature": 0.9, "top_p": 0.6},
    {"top_k": 5, "top_p": 0.8},
    {"top_k": 0},
]


@pytest.mark.parametrize("given", DRAWN)
def test_what_is_drawn_at_random(given: dict[str, Any]) -> None:
    """The probabilities are the reference's, its own defaults included."""
    said = GenerationConfig(do_sample=True, **given).to_dict()
    made = decoding_options(decoding_defaults(said, {}), {}, {})
    assert made.samples
    usual = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | given
    logits = torch.randn(4, 90, generator=torch.Generator().manual_seed(0)) * 3
    scores = TemperatureLogitsWarper(usual["temperature"])(None, logits)
    scores = TopKLogitsWarper(usual["top_k"])(None, scores) if usual["top_k"] else scores
    scores = TopPLogitsWarper(usual["top_p"])(None, scores) if usual["top_p"] < 1 else scores
    drawn = sampling_probs(logits, made)
    assert torch.allclose((drawn / drawn.sum(-1, keepdim=True)).float(), scores.softmax(-1), atol=1e-6)
    back = generation_config(decoding_defaults(said, {}), {}, 2)
    assert decoding_defaults(back, {}) == decoding_defaults(said, {})


RULES: list[tuple[dict[str, Any], str]] = [
    ({"bad_words_ids": [[3]]}, "bad_words_ids"),
    ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty"),
    ({"min_length": 9}, "min_length"),
    ({"forced_eos_token_id": 7, "eos_token_id": 2}, "forced_eos_token_id"),
    ({"renormalize_logits": True}, "renormalize_logits"),
]


@pytest.mark.parametrize(("said", "named"), RULES)
def test_rules_that_are_not_known_are_named(said: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        decoding_defaults(said, {}, end_id=2)
    assert decoding_defaults({**GenerationConfig().to_dict(), "max_new_tokens": 9}, {}, end_id=2) == {
        "max_new_tokens": 9
    }


def test_where_texts_start_and_end() -> None:
    about: dict[str, Any] = {"end_id": 2, "start_ids": (2,)}
    assert decoding_defaults({"min_length": 9}, {}, **about) == {"min_new_tokens": 8}
    assert decoding_defaults({"eos_token_id": 2}, {}, **about) == {}
    assert decoding_defaults({"eos_token_id": [2, 5]}, {}, **about) == {"end_ids": [2, 5]}
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        decoding_defaults({"decoder_start_token_id": 3}, {}, **about)


def test_a_file_that_refines_the_rules_of_the_language_model() -> None:
    """microsoft/Florence-2-large: its rules are in config.json, and generation_config.json changes two of them."""
    text = {"num_beams": 5, "no_repeat_ngram_size": 3, "forced_bos_token_id": 0, "early_stopping": True}
    config = {"text_config": {**text, "forced_eos_token_id": 2}, "vocab_size": 9}
    said, about = {"num_beams": 3, "early_stopping": False}, {"end_id": 2, "start_ids": (2,)}
    alone = {"num_beams": 3, "early_stopping": False}
    assert decoding_defaults(said, config, **about) == alone
    refined = {**alone, "no_repeat_ngram": 3, "forced_bos_id": 0, "force_eos": True}
    assert decoding_defaults(said, config, **about, refines=True) == refined


def test_the_rule() -> None:
    """The checkpoint, over it the verb, over it the caller; beams and sampling exclude each other."""
    habits = {"num_beams": 3, "length_penalty": 0.5, "max_new_tokens": 30}
    assert decoding_options(habits, {}, {}) == Decoding(num_beams=3, length_penalty=0.5, max_new_tokens=30)
    assert decoding_options(habits, {"max_new_tokens": 512}, {}).max_new_tokens == 512
    assert decoding_options(habits, {"max_new_tokens": 512}, {"max_new_tokens": 7}).max_new_tokens == 7
    assert decoding_options(habits, {}, {"num_beams": 2}) == Decoding(
        num_beams=2, length_penalty=0.5, max_new_tokens=30
    )
    assert decoding_options(habits, {}, {"top_p": 0.9}).num_beams == 1
    drawn = {"temperature": 0.9, "top_p": 0.6}
    assert decoding_options(drawn, {}, {"num_beams": 2}) == Decoding(num_beams=2)
    assert decoding_options(drawn, {}, {"num_beams": 1}) == Decoding()
    assert decoding_options(drawn, {}, {"temperature": 0.2}) == Decoding(temperature=0.2, top_p=0.6)
    assert decoding_defaults({"do_sample": True, "num_beams": 2}, {}) == {"num_beams": 2}
    assert decoding_defaults({"forced_eos_token_id": None, "num_beams": None, "max_length": 90}, {}) == {}
    assert decoding_options({"min_new_tokens": 9}, {}, {"max_new_tokens": 4}).min_new_tokens == 4
    with pytest.raises(UsageError, match=r"beams: no such decoding option; there are .*num_beams, "):
        decoding_options(habits, {}, {"beams": 3})


def test_older_files_say_it_in_config(tmp_path: Path) -> None:
    config = {"num_beams": 2, "length_penalty": None, "text_config": {"num_beams": 5, "length_penalty": 0.3}}
    assert decoding_defaults({}, config) == {"num_beams": 2, "length_penalty": 0.3}
    write_florence(tmp_path / "m", generation={"num_beams": 3, "forced_eos_token_id": 2})
    model = sightloop.load(tmp_path / "m", device="cpu")
    assert model.decoding["num_beams"] == 3
    assert model.decoding["force_eos"]
    model.save(tmp_path / "back", layout="transformers")
    said = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (said["num_beams"], said["forced_eos_token_id"]) == (3, 2)
    assert sightloop.load(tmp_path / "back", device="cpu").decoding == model.decoding
