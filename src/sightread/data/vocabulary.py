"""A vocabulary learned from texts, for models that start from random weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from sightread.data.atomic import atomic_write
from sightread.errors import UsageError

# BERT's special tokens, and BLIP's two: the decoder's start, and the start of a text that is read beside a picture.
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]")
_CLIP_ENDS = ("<|startoftext|>", "<|endoftext|>")


def learn_word_pieces(texts: Iterable[str], size: int, path: Path) -> None:
    """Write a `vocab.txt` of at most `size` lower-case word pieces (Schuster and Nakajima 2012; BERT's form).

    Every character of the texts is in it, so that no word of theirs is unknown. UsageError: no texts.
    """
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(SPECIALS), show_progress=False, min_frequency=2
    )
    learner.train_from_iterator(sorted(_some(texts)), trainer)
    found = learner.get_vocab()
    atomic_write(path, "".join(f"{word}\n" for word in sorted(found, key=found.__getitem__)))


def learn_byte_pairs(texts: Iterable[str], size: int, folder: Path) -> None:
    """Write `vocab.json` and `merges.txt` of CLIP's kind, at most `size` byte pairs (Sennrich et al. 2016)."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner.decoder = decoders.ByteLevel()
    ends = [AddedToken(end, special=True) for end in _CLIP_ENDS]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=ends,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
    )
    learner.train_from_iterator(sorted(_some(texts)), trainer)
    state = json.loads(learner.to_str())["model"]
    merges = [" ".join(pair) for pair in state["merges"]]
    atomic_write(folder / "vocab.json", json.dumps(state["vocab"], ensure_ascii=False))
    atomic_write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]))


def _some(texts: Iterable[str]) -> list[str]:
    found = [text for text in texts if text.strip()]
    if not found:
        raise UsageError("the training data has no texts to learn a vocabulary from; set model.vocabulary to one")
    return found
