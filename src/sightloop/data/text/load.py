"""Loader of a checkpoint's tokenizer: which files of a folder are read, for each kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

from sightloop.data.text.bart import load_bart
from sightloop.data.text.sentencepiece import NO_LIMIT, load_sentencepiece
from sightloop.data.text.tokenizer import (
    Tokenizer,
    bert_tokenizer_from_vocab,
    clip_tokenizer_from_bpe,
    load_tokenizer,
)
from sightloop.errors import SightloopError, TokenizerError
from sightloop.types import IMAGE_PLACEHOLDER, TokenizerKind

_CLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"


def load_tokenizer_of_kind(
    source: Path,
    kind: TokenizerKind,
    *,
    max_length: int,
    lowercase: bool = False,
    cleaning: str | None = None,
) -> Tokenizer:
    """A checkpoint's tokenizer.

    BERT's `vocab.txt` and CLIP's `bpe_simple_vocab_16e6.txt.gz`, the authors' own files, are read only if the hub's
    files (`tokenizer.json`, `tokenizer_config.json`, `vocab.json`) are missing.

    Args:
        source: the folder with its files, or for "clip" and "bert" the authors' file itself.
        kind: of the tokenizer.
        max_length: tokens a text; 0 for no limit.
        lowercase: lower-case the texts ("pieces" alone).
        cleaning: name of open_clip's text cleaning, a key of `sentencepiece.CLEANINGS` ("pieces"), or "lower" ("clip");
            None for what the files say.

    Raises:
        TokenizerError: what is missing or damaged.
    """
    try:
        return _load(source, kind, max_length, lowercase, cleaning)
    except SightloopError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        cause = str(error).partition("\n")[0][:120]
        raise TokenizerError(
            f"{source}: its tokenizer files cannot be understood ({type(error).__name__}: {cause}); download them again"
        ) from error


def _load(
    source: Path, kind: TokenizerKind, max_length: int, lowercase: bool, cleaning: str | None
) -> Tokenizer:
    if kind == "gemma":
        return load_sentencepiece(
            source, max_length=NO_LIMIT, extra_special_token=IMAGE_PLACEHOLDER, location_tokens=True
        )
    if kind in ("language", "llama"):
        usual = "LlamaTokenizer" if kind == "llama" else ""
        return load_sentencepiece(
            source,
            max_length=max_length or NO_LIMIT,
            extra_special_token=IMAGE_PLACEHOLDER,
            default_class=usual,
        )
    if kind == "pieces":
        return load_sentencepiece(
            source, max_length=max_length, pad_to_max_length=True, lowercase=lowercase, cleaning=cleaning
        )
    if kind == "bart":
        return load_bart(source, max_length=max_length)
    from_hub = (source / "tokenizer.json").is_file() or (source / "tokenizer_config.json").is_file()
    vocab = source if source.is_file() else source / "vocab.txt"
    merges = source if source.is_file() else source / _CLIP_MERGES
    if kind == "bert" and vocab.is_file() and not from_hub:
        return bert_tokenizer_from_vocab(vocab, max_length=max_length)
    if kind == "clip" and merges.is_file() and not from_hub and not (source / "vocab.json").is_file():
        return clip_tokenizer_from_bpe(
            merges, max_length=max_length, rules="openai" if cleaning is None else "open_clip"
        )
    if kind == "clip" and cleaning not in (None, "lower"):
        raise TokenizerError(
            f"{source}: cleaning {cleaning!r} is not supported for CLIP's tokenizer, only 'lower' is"
        )
    rules = None if cleaning is None else "open_clip"
    return load_tokenizer(source, kind=kind, max_length=max_length, rules=rules)
