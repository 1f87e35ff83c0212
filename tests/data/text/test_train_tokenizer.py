"""Vocabularies learned from texts: every word can be said again, and the same texts give the same file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightloop.data.text.tokenizer import bert_tokenizer_from_vocab, load_tokenizer
from sightloop.data.text.train_tokenizer import BERT_SPECIAL_TOKENS, train_bpe, train_wordpiece
from sightloop.errors import UsageError

TEXTS = [
    "a red bird on a wire",
    "two red birds above a wire",
    "Birds, bicycles & bread?",
    "un café à la crème",
] * 3


def test_words_come_back(tmp_path: Path) -> None:
    train_wordpiece(TEXTS, 120, tmp_path / "vocab.txt")
    tokenizer = bert_tokenizer_from_vocab(tmp_path / "vocab.txt", max_length=30)
    ids = tokenizer.encode(TEXTS).ids
    assert tokenizer.token_id("[UNK]") not in ids
    assert tokenizer.decode(ids.tolist())[0] == TEXTS[0]
    lines = (tmp_path / "vocab.txt").read_text("utf-8").splitlines()
    assert lines[: len(BERT_SPECIAL_TOKENS)] == list(BERT_SPECIAL_TOKENS)
    assert len(lines) == len(set(lines)) <= 120


def test_answers_with_underscores_come_back(tmp_path: Path) -> None:
    """As DAQUAR writes them; also from a saved copy. What BERT's own files decode stays as at the hub."""
    texts = ["garbage_bin", "bottle_of_liquid", "a red_bird, two"]
    train_wordpiece([*TEXTS, *texts], 200, tmp_path / "vocab.txt")
    tokenizer = load_tokenizer(tmp_path, kind="bert", max_length=30)
    bare = bert_tokenizer_from_vocab(tmp_path / "vocab.txt", max_length=30)
    ids = tokenizer.encode(texts).ids
    assert (ids == bare.encode(texts).ids).all()
    assert tokenizer.decode(ids.tolist()) == texts
    assert bare.decode(ids.tolist())[0] == "garbage _ bin"
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy", kind="bert", max_length=30).decode(ids.tolist()) == texts


def test_byte_pairs_say_anything(tmp_path: Path) -> None:
    train_bpe(TEXTS, 700, tmp_path)
    tokenizer = load_tokenizer(tmp_path, kind="clip", max_length=30)
    ids = tokenizer.encode(["two red birds", "日本 🙂"])
    assert tokenizer.decode(ids.ids.tolist()) == ["two red birds", "日本 🙂"]
    assert ids.ids.max() < tokenizer.vocab_size
    one_each = tokenizer.encode(["red"]).lengths[0]
    assert one_each == 3  # the word was merged into one piece between the ends


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"]), min_size=1), min_size=1
    )
)
def test_no_word_of_the_texts_is_unknown(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    if not any(text.strip() for text in texts):
        return
    path = tmp_path_factory.mktemp("v") / "vocab.txt"
    train_wordpiece(texts, 60, path)
    tokenizer = bert_tokenizer_from_vocab(path, max_length=5000)
    short = [
        text for text in texts if all(len(word) < 100 for word in text.split())
    ]  # BERT gives up beyond that
    if short:
        assert tokenizer.token_id("[UNK]") not in tokenizer.encode(short).ids


def test_another_process_learns_the_same(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from sightloop.data.text.train_tokenizer import *\n"
        "out = Path(sys.argv[1]); out.mkdir()\n"
        f"texts = {TEXTS!r}\n"
        "train_wordpiece(texts, 100, out / 'vocab.txt'); train_bpe(texts, 700, out)"
    )
    for name in ("one", "other"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True)
    for name in ("vocab.txt", "vocab.json", "merges.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no texts"):
        train_wordpiece(["", "  "], 100, tmp_path / "vocab.txt")
