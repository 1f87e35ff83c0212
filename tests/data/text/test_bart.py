"""BART's tokenizer with words of places: ids equal to those of the reference's processor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor

from sightloop.data.text.bart import load_bart
from sightloop.errors import TokenizerError
from tests.tiny_checkpoints.florence import TAGS, bart_tokenizer, write_florence, write_original

TEXTS = [
    "a dog",
    "  two  cats ",
    "Straße\n\tü",
    "<loc_5>a<loc_999> <image>",
    "</s><s>a",
    "<mask> b <pad>",
    "",
    "👍🏽 e\u0301",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("florence")
    write_florence(place / "hub")
    write_original(place / "hub", place / "original")
    return place


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return AutoProcessor.from_pretrained(folder / "hub").tokenizer


def ids(tokenizer: Any, text: str) -> list[int]:
    row = tokenizer.encode([text])
    return row.ids[0, : row.lengths[0]].tolist()


@pytest.mark.parametrize("name", ["hub", "original"])
def test_ids_are_those_of_the_reference(folder: Path, reference: Any, name: str) -> None:
    ours = load_bart(folder / name, max_length=200)
    parts = st.one_of(st.text(max_size=8), st.sampled_from([*TEXTS, *TAGS, "<and>", " <loc_12>"]))

    @settings(max_examples=200, deadline=None)
    @given(st.lists(parts, max_size=5).map("".join))
    def same(text: str) -> None:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert ids(ours, text) == expected
        assert ours.decode([expected]) == [reference.decode(expected, skip_special_tokens=True)]

    same()
    assert ours.vocab_size == len(reference)
    assert ours.token_id("<image>") == reference.image_token_id


def test_what_is_saved_is_read_back_by_both(folder: Path, reference: Any, tmp_path: Path) -> None:
    ours = load_bart(folder / "original", max_length=200)
    ours.save(tmp_path / "again")
    again = load_bart(tmp_path / "again", max_length=200)
    theirs = type(reference).from_pretrained(tmp_path / "again")
    assert theirs.image_token == "<image>"
    for text in TEXTS:
        expected = reference(text, add_special_tokens=False)["input_ids"]
        assert ids(again, text) == expected
        assert theirs(text, add_special_tokens=False)["input_ids"] == expected


def test_plain_files(folder: Path, reference: Any, tmp_path: Path) -> None:
    """vocab.json and merges.txt, as the first generation of checkpoints has them."""
    model = json.loads(bart_tokenizer()._tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    ours = load_bart(tmp_path, max_length=200)
    for text in TEXTS:
        assert ids(ours, text) == reference(text, add_special_tokens=False)["input_ids"]


def test_files_that_are_wrong_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"Copy tokenizer\.json"):
        load_bart(tmp_path, max_length=200)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="damaged"):
        load_bart(tmp_path, max_length=200)
    shutil.copy(folder / "hub" / "tokenizer.json", tmp_path)
    about = {"added_tokens_decoder": {"7": {"content": "<new>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(TokenizerError, match="should be token 7"):
        load_bart(tmp_path, max_length=200)
