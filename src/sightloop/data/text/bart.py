"""BART's byte pairs as Florence-2 reads them: locations, tags and images are single tokens, and nothing is put
around a text (its prompts say where they begin and end)."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from sightloop.data.text.padding import Padding
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import TokenizerError
from sightloop.types import JsonDict

_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
    "image_token": "<image>",
}
# What the original processor adds to BART's vocabulary when it starts, in this order; it decides the ids. One is
# misspelt there.
_WORDS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{place}>" for place in range(1000)),
    *"<cap> </cap> <ncap> </ncap> <dcap> </dcap> <grounding> </grounding> <seg> </seg> <sep> <region_cap>".split(),
    *"</region_cap> <region_to_desciption> </region_to_desciption> <proposal> </proposal> <poly> </poly>".split(),
    "<and>",
)


def load_bart(folder: Path, *, max_length: int) -> Tokenizer:
    """The tokenizer of a Florence-2 checkpoint's folder; ids equal to those of the reference's processor, which
    likewise finds location tokens in what the caller writes.

    Reads tokenizer.json, else vocab.json and merges.txt, and tokenizer_config.json. Location tokens, tags and
    "<image>" are added where they are not in there, as the original does. Raises `TokenizerError` that names the file.
    """
    whole, plain, about = (folder / f"{name}.json" for name in ("tokenizer", "vocab", "tokenizer_config"))
    config = _config(about)
    try:
        if whole.is_file():
            backend = tokenizers.Tokenizer.from_file(str(whole))
        elif plain.is_file() and (folder / "merges.txt").is_file():
            model = models.BPE.from_file(str(plain), str(folder / "merges.txt"))
            backend = tokenizers.Tokenizer(model)
        else:
            raise TokenizerError(
                f"{folder}: holds no tokenizer. Copy tokenizer.json, or vocab.json and merges.txt, of the checkpoint "
                "into that folder."
            )
    except Exception as error:  # the library raises nothing narrower
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{folder}: its tokenizer is damaged or of another kind ({error})") from error
    backend.no_padding()
    backend.no_truncation()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(config.get("add_prefix_space", False))
    )
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    names: dict[str, str] = {role: _name(config.get(role, usual)) for role, usual in _ROLES.items()}
    _add(folder, backend, config, names)
    ids = backend.get_vocab(with_added_tokens=True)
    limit = config.get("model_max_length")
    settings = {key: value for key, value in config.items() if key != "added_tokens_decoder"}
    settings |= {"tokenizer_class": "BartTokenizer", **names}
    return Tokenizer(
        kind="pieces",
        bos_id=None,
        eos_id=None,
        padding=Padding(ids[names["pad_token"]], keep_eos=False),
        vocab_size=1 + max(ids.values()),
        max_length=int(min(max_length, limit)) if isinstance(limit, int | float) else max_length,
        backend=backend,
        settings=settings,
    )


def _add(folder: Path, backend: tokenizers.Tokenizer, config: JsonDict, names: dict[str, str]) -> None:
    """Adds the words that tokenizer_config.json lists, those of places and tags, and the special ones."""
    stated = {int(index): token for index, token in (config.get("added_tokens_decoder") or {}).items()}
    listed = [
        AddedToken(**{key: value for key, value in token.items() if key not in ("id", "__type")})
        for _, token in sorted(stated.items())
    ]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known_or_listed = known.union(token.content for token in listed)
    missing = [name for role, name in names.items() if role != "image_token"]
    missing += [] if _WORDS[0] in known_or_listed else _WORDS
    missing.append(names["image_token"])  # the last: the original has none
    listed += [AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(missing)]
    backend.add_tokens([token for token in listed if token.content not in known])
    for index, token in stated.items():
        if (known_id := backend.token_to_id(token["content"])) != index:
            raise TokenizerError(
                f"{folder}: {token['content']!r} should be token {index}, but the vocabulary says {known_id}: these "
                "are files of different checkpoints. Fetch them again."
            )


def _name(token: str | JsonDict) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _config(path: Path) -> JsonDict:
    if not path.is_file():
        return {}
    try:
        return {**json.loads(path.read_text("utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise TokenizerError(f"{path} is damaged or of another kind ({error}); fetch it again.") from error
