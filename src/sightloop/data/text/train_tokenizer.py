"""A vocabulary learned from texts, for models that start from random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from sightloop.data.atomic import atomic_write
from sightloop.data.text.sentencepiece import gemma_backend
from sightloop.errors import UsageError

# BERT's special tokens, and BLIP's two: the decoder's start, and the start of a text that is read beside an image.
BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
_MARK = "\u2581"
_PRIVATE = 0xE000  # the first of Unicode's private characters
_GEMMA_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")


def train_wordpiece(texts: Iterable[str], size: int, path: Path) -> None:
    """Write a `vocab.txt` of at most `size` lower-case word pieces, in BERT's form; the same for the same texts.

    Byte-pair merges (Sennrich et al. 2016) over words that begin with a mark, which becomes BERT's "##" on the pieces
    that do not. Every character of the texts is in it, so that no word of theirs is unknown, even beyond `size`.
    A `tokenizer_config.json` next to it lets "garbage_bin" be decoded as it was written, not as "garbage _ bin".
    Raises UsageError where there are no texts.
    """
    # The library's own trainer of word pieces numbers characters in a random order, and breaks ties by those numbers.
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(_MARK, prepend_scheme="always")]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, min_frequency=2)
    learner.train_from_iterator(sorted(_some(texts)), trainer)
    vocab = learner.get_vocab()
    letters = sorted({letter for piece in vocab for letter in piece} - {_MARK})
    alphabet = [*letters, *(f"##{letter}" for letter in letters)]
    pieces = (
        piece[1:] if piece.startswith(_MARK) else f"##{piece}"
        for piece in sorted(vocab, key=vocab.__getitem__)
    )
    words = list(dict.fromkeys([*BERT_SPECIAL_TOKENS, *alphabet, *(piece for piece in pieces if piece)]))
    atomic_write(
        path, "".join(f"{word}\n" for word in words[: max(size, len(BERT_SPECIAL_TOKENS) + len(alphabet))])
    )
    config = {"additional_special_tokens": BERT_SPECIAL_TOKENS[5:], "sightloop_joined": "_"}
    atomic_write(path.with_name("tokenizer_config.json"), json.dumps(config) + "\n")


def train_bpe(texts: Iterable[str], size: int, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` of CLIP's kind, about `size` byte pairs; the same for the same texts."""
    clean = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # A letter that ends a word is another letter, one character as well: the library breaks ties by the numbers of
    # characters, which it orders, and would number those with a suffix in a random order.
    ended = {letter: chr(_PRIVATE + number) for number, letter in enumerate(letters)}
    plain = {mark: f"{letter}</w>" for letter, mark in ended.items()}
    words = [
        " ".join(word[:-1] + ended[word[-1]] for word, _ in split.pre_tokenize_str(clean.normalize_str(text)))
        for text in sorted(_some(texts))
    ]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=max(size - len(_CLIP_ENDS), 2 * len(letters)),
        show_progress=False,
        initial_alphabet=[*letters, *plain],
    )
    learner.train_from_iterator(words, trainer)
    pairs: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    merges = [[half[:-1] + plain.get(half[-1], half[-1]) for half in pair] for pair in pairs]
    # Numbered as in CLIP's own file: bytes, bytes that end a word, merges, special tokens.
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), *_CLIP_ENDS]
    numbers = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    atomic_write(folder / "vocab.json", json.dumps(numbers, ensure_ascii=False))
    atomic_write(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))


def train_sentencepiece(texts: Iterable[str], size: int, folder: Path) -> None:
    """Write `tokenizer.json` of SigLIP 2's kind, about `size` lower-case pieces; the same for the same texts.

    Spaces belong to the words after them. Bytes are pieces too, so that any text can be written.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Metaspace(_MARK, prepend_scheme="never")
    first = [*_GEMMA_SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=max(size - len(first), 1), show_progress=False, min_frequency=2, initial_alphabet=[_MARK]
    )
    learner.train_from_iterator(sorted(_some(texts)), trainer)
    pairs: list[list[str]] = json.loads(learner.to_str())["model"]["merges"]
    letters = sorted(piece for piece in learner.get_vocab() if len(piece) == 1)
    pieces = dict.fromkeys([*first, *letters, *map("".join, pairs)])
    merges = [(left, right) for left, right in pairs]
    backend = gemma_backend({piece: number for number, piece in enumerate(pieces)}, merges)
    ends = {"add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
    atomic_write(folder / "tokenizer.json", backend.to_str())
    atomic_write(
        folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "Siglip2Tokenizer", **ends})
    )


def _some(texts: Iterable[str]) -> list[str]:
    nonempty = [text for text in texts if text.strip()]
    if not nonempty:
        raise UsageError(
            "the training data has no texts to learn a vocabulary from; set model.vocabulary to one"
        )
    return nonempty
