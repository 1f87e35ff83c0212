"""SentencePiece tokenizers: ids equal to the reference's, from tokenizer.json and from .model files."""

from __future__ import annotations

import io
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GemmaTokenizer, Siglip2Tokenizer, SiglipTokenizer

from sightloop.data.text.piece_model import read_piece_model
from sightloop.data.text.sentencepiece import CLEANINGS, load_sentencepiece
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.data.text.train_tokenizer import train_sentencepiece
from sightloop.errors import TokenizerError, UsageError
from tests.tiny_checkpoints.blip2 import opt_tokenizer

WORDS = (
    "a an the two red blue small large dog dogs cat cats man woman tree trees car cars house street ball hat standing "
    "sitting running on under beside near of and photo drawing café naïve 2 10 300 Straße don't well-known U.S."
).split()
LENGTH = 16
SPECIALS = ["</s>", "<unk>", "<pad>", "<eos>", "<bos>", "<loc0001>"]
LETTERS = st.sampled_from([" ", "\t", "\n", "\u3000", "\u0301", "\u200b", "ﬁ", "▁", "Σ", "</S>"])


def texts_of(*extra: str) -> st.SearchStrategy[list[str]]:
    """Words, and strings of anything, with `extra` in between."""
    words = st.lists(st.sampled_from([*WORDS, *extra]), max_size=12).map(" ".join)
    some = st.one_of(LETTERS, st.text(max_size=4), st.sampled_from(extra or WORDS))
    return st.lists(st.one_of(words, st.lists(some, max_size=8).map("".join)), min_size=1, max_size=6)


@lru_cache(maxsize=3)
def trained(kind: str, *, byte_fallback: bool = False) -> bytes:
    """A SentencePiece model over WORDS, of SigLIP's kind ("unigram") or Gemma's ("bpe"), which has bytes always."""
    lines = [" ".join(WORDS[i : i + 9]) for i in range(len(WORDS) - 8)] * 3
    gemma = {
        "bos_id": 2,
        "unk_id": 3,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "user_defined_symbols": ["<mask>", "<loc0001>", "\n\n"],
    }
    siglip = {"bos_id": -1, "unk_id": 2, "byte_fallback": byte_fallback}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=400 if kind == "bpe" else 366 if byte_fallback else 110,
        model_type=kind,
        pad_id=0,
        eos_id=1,
        hard_vocab_limit=False,
        minloglevel=2,
        **(gemma if kind == "bpe" else siglip),
    )
    return out.getvalue()


class Pair:
    """A reference tokenizer and ours of the same folder."""

    def __init__(self, folder: Path, reference: Any) -> None:
        self.reference, self.folder = reference, folder
        self.ours = load_sentencepiece(folder, max_length=LENGTH, pad_to_max_length=True)

    def check(self, texts: list[str]) -> None:
        wanted = self.reference(texts, padding="max_length", max_length=LENGTH, truncation=True)
        found = self.ours.encode(texts)
        assert found.ids.tolist() == wanted["input_ids"], texts
        assert found.lengths.tolist() == [LENGTH] * len(texts)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("pieces")
    out: dict[str, Pair] = {}
    (root / "spiece.model").write_bytes(trained("unigram"))
    reference = SiglipTokenizer(str(root / "spiece.model"))
    reference.save_pretrained(root / "siglip")
    out["siglip"] = Pair(root / "siglip", reference)
    (root / "spiece.model").write_bytes(trained("unigram", byte_fallback=True))
    reference = SiglipTokenizer(str(root / "spiece.model"))
    reference.save_pretrained(root / "siglip, bytes")
    out["siglip, bytes"] = Pair(root / "siglip, bytes", reference)
    (root / "bare").mkdir()
    (root / "bare" / "tokenizer.model").write_bytes(trained("bpe"))
    kinds = {
        "gemma": (GemmaTokenizer, {}),
        "gemma, first token": (GemmaTokenizer, {"add_bos_token": True, "padding_side": "right"}),
        "siglip 2": (Siglip2Tokenizer, {"add_eos_token": True, "padding_side": "right"}),
        "both ends": (Siglip2Tokenizer, {"add_eos_token": True, "add_bos_token": True}),
    }
    for name, (kind, flags) in kinds.items():
        reference = kind.from_pretrained(root / "bare", **flags)
        reference.save_pretrained(root / name)
        out[name] = Pair(root / name, reference)
        folder = root / f"{name}, .model"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(trained("bpe"))
        config = json.loads((root / name / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **flags}))
        out[folder.name] = Pair(folder, reference)
    return out


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(texts=texts_of(*SPECIALS))
def test_gemmas_ids_are_the_references(pairs: dict[str, Pair], texts: list[str]) -> None:
    for name in pairs.keys() - {"siglip", "siglip, bytes"}:
        pairs[name].check(texts)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=80, deadline=None)
@given(texts=texts_of())
def test_siglips_ids_are_the_references(pairs: dict[str, Pair], texts: list[str]) -> None:
    plain = [text.replace("</s>", "").replace("<unk>", "") for text in texts]
    pairs["siglip"].check(plain)
    pairs["siglip, bytes"].check(plain)


@pytest.mark.filterwarnings("ignore")
def test_siglip_writes_in_bytes_what_has_no_piece(pairs: dict[str, Pair]) -> None:
    """Where the model says byte_fallback: neither a letter with a tilde nor Japanese becomes <unk>."""
    texts = ["señor", "犬", "a dog 犬 😀"]
    pairs["siglip, bytes"].check(texts)
    ours = pairs["siglip, bytes"].ours
    assert not (ours.encode(texts).ids == ours.token_id("<unk>")).any()
    assert ours.decode(ours.encode(texts).ids) == texts


@pytest.mark.filterwarnings("ignore")
def test_siglips_special_tokens_in_a_text(pairs: dict[str, Pair]) -> None:
    texts = [
        "</s>",
        "a </s> dog",
        "a</s>dog",
        "</s>a dog",
        "a dog </s>",
        "</s></s>",
        "<unk>",
        "a <unk> dog",
        "a dog</S>",
    ]
    pairs["siglip"].check(texts)


@pytest.mark.filterwarnings("ignore")
def test_saved_and_read_back(pairs: dict[str, Pair], tmp_path: Path) -> None:
    texts = [
        "Two small dogs, near the café!",
        "",
        "a photo of a tree </s> and 300 cars beside the Straße, U.S.",
    ]
    for name, pair in pairs.items():
        pair.ours.save(tmp_path / name)
        again = load_sentencepiece(tmp_path / name, max_length=LENGTH, pad_to_max_length=True)
        assert again.encode(texts).ids.tolist() == pair.ours.encode(texts).ids.tolist()
        assert (again.pad_id, again.eos_id, again.bos_id) == (
            pair.ours.pad_id,
            pair.ours.eos_id,
            pair.ours.bos_id,
        )
        theirs = type(pair.reference).from_pretrained(tmp_path / name)
        Pair(tmp_path / name, theirs).check(texts)


def test_rows_as_long_as_their_texts(pairs: dict[str, Pair]) -> None:
    """Without `fill`, as a language model takes them."""
    folder = pairs["gemma, first token"].folder
    ours = load_sentencepiece(folder, max_length=LENGTH)
    found = ours.encode(["a dog", "two cats near the tree"])
    assert found.lengths[0] < found.lengths[1] == found.ids.shape[1]
    assert (found.ids[:, 0] == ours.bos_id).all()
    assert ours.decode(found.ids.tolist()) == ["a dog", "two cats near the tree"]
    with pytest.warns(UserWarning, match="were cut"):
        assert ours.encode(["a dog"], max_length=2).ids.shape == (1, 2)


def test_open_clips_cleanings() -> None:
    text = "  A &amp;amp; B_c,  it\u2019s\tGREEN! "
    assert CLEANINGS["canonicalize"](text) == "a b c its green"
    assert CLEANINGS["lower"](text) == "a & b_c, it's green!"
    assert CLEANINGS["whitespace"](text) == "A & B_c, it's GREEN!"


def test_cleaning_survives_saving(pairs: dict[str, Pair], tmp_path: Path) -> None:
    folder = pairs["gemma"].folder
    ours = load_sentencepiece(folder, max_length=LENGTH, pad_to_max_length=True, cleaning="canonicalize")
    ours.save(tmp_path / "saved")
    again = load_sentencepiece(tmp_path / "saved", max_length=LENGTH, pad_to_max_length=True)
    plain = load_sentencepiece(folder, max_length=LENGTH, pad_to_max_length=True)
    for tokenizer in (ours, again):
        assert tokenizer.encode(["Two_dogs!"]).ids.tolist() == plain.encode(["two dogs"]).ids.tolist()


def test_what_is_wrong_is_said(tmp_path: Path, pairs: dict[str, Pair]) -> None:
    with pytest.raises(TokenizerError, match="holds no tokenizer"):
        load_sentencepiece(tmp_path, max_length=8)
    (tmp_path / "spiece.model").write_bytes(b"\x0a\xff\xff\xff not this")
    with pytest.raises(TokenizerError, match="no SentencePiece model"):
        load_sentencepiece(tmp_path, max_length=8)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLNetTokenizerFast"}')
    (tmp_path / "spiece.model").write_bytes(trained("bpe"))
    with pytest.raises(TokenizerError, match="XLNetTokenizer is read from"):
        load_sentencepiece(tmp_path, max_length=8)
    with pytest.raises(UsageError, match="valid Unicode"):
        pairs["siglip"].ours.encode(["a", "\ud800"])
    whole = trained("bpe")
    for cut in range(0, len(whole), 97):  # nothing but a clear error, or fewer pieces
        try:
            assert len(read_piece_model(whole[:cut]).pieces) > 0
        except TokenizerError:
            continue


def test_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    texts = [" ".join(WORDS[i : i + 7]) for i in range(20)] * 2
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        train_sentencepiece(texts, 450, tmp_path / name)
    one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
    assert one == two
    ours: Tokenizer = load_sentencepiece(tmp_path / "one", max_length=30, pad_to_max_length=True)
    assert ours.vocab_size <= 450
    found = ours.encode(["a red DOG near 日本"])
    assert ours.decode(found.ids.tolist()) == ["a red dog near 日本"]
    assert found.ids.shape == (1, 30)
    assert ours.eos_id in found.ids
    Pair(tmp_path / "one", Siglip2Tokenizer.from_pretrained(tmp_path / "one"))


@pytest.mark.parametrize("flags", [{"add_bos_token": False, "add_eos_token": True}, {"add_eos_token": False}])
def test_first_and_last_are_what_tokenizer_json_says(
    pairs: dict[str, Pair], tmp_path: Path, flags: dict[str, bool]
) -> None:
    for name in ("gemma, first token", "siglip 2", "both ends"):
        folder = Path(shutil.copytree(pairs[name].folder, tmp_path / name))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **flags}))
        theirs = AutoTokenizer.from_pretrained(folder)
        (mine,) = load_sentencepiece(folder, max_length=64).encode(["a dog"]).ids
        assert mine.tolist() == theirs("a dog")["input_ids"]


@pytest.mark.parametrize("space", [True, False])
def test_a_space_in_front_of_bytes(tmp_path: Path, space: bool) -> None:
    opt_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "add_prefix_space": space}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    mine = load_sentencepiece(tmp_path, max_length=64)
    for text in ("the dog", " the dog", "", "Q"):
        assert mine.encode([text]).ids[0].tolist() == theirs(text)["input_ids"]
