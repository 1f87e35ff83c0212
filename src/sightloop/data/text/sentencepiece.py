"""SentencePiece tokenizers (Kudo and Richardson 2018): SigLIP's, Gemma's, Llama's, and every tokenizer.json.

    load_sentencepiece(folder, max_length=64, pad_to_max_length=True)   # SigLIP, SigLIP 2: padding counts as text
    load_sentencepiece(folder, max_length=2048)                         # Gemma, Llama

A bare `spiece.model` or `tokenizer.model` gets the pipeline of its class in `_PIPELINES`.
"""

from __future__ import annotations

import html
import json
import re
import string
from collections.abc import Callable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from sightloop.data.text.padding import Padding
from sightloop.data.text.piece_model import CONTROL, USER_DEFINED, PieceModel, character_map, read_piece_model
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import TokenizerError
from sightloop.types import JsonDict

NO_LIMIT = 1 << 20  # tokens a text, for towers without a limit
_MARK = "▁"  # represents a space
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NAMES: dict[str, dict[str, str]] = {
    "SiglipTokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"},
    "GemmaTokenizer": {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad", "mask")},
}
_NAMES["LlamaTokenizer"] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NAMES["Siglip2Tokenizer"] = _NAMES["GemmaTokenizer"]
_LEFT = {"GemmaTokenizer", "Siglip2Tokenizer"}  # padded on the left where tokenizer_config.json does not say
_PLACES = [*(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128))]
_CLEANING = "sightloop_cleaning"  # a key of CLEANINGS in tokenizer_config.json; other readers ignore it


def load_sentencepiece(
    folder: Path,
    *,
    max_length: int,
    pad_to_max_length: bool = False,
    lowercase: bool = False,
    cleaning: str | None = None,
    extra_special_token: str = "",
    default_class: str = "",
    location_tokens: bool = False,
) -> Tokenizer:
    """Loader of SentencePiece and other `tokenizers` pipelines; ids equal those of the class in tokenizer_config.json.

    Reads tokenizer.json, else spiece.model, tokenizer.model, or vocab.json with merges.txt; for SigLIP's class
    spiece.model comes first, as at the hub.

    Args:
        folder: of the checkpoint.
        max_length: tokens a text; the files' `model_max_length` if that is less.
        pad_to_max_length: every row has `max_length` tokens, and padding counts as text (SigLIP).
        lowercase: lower-case the texts, whatever the files say (SigLIP 2).
        cleaning: name of open_clip's text cleaning, a key of CLEANINGS.
        extra_special_token: a special token that is added if the files lack it.
        default_class: tokenizer class if the files name none.
        location_tokens: add location and segmentation tokens, and neither BOS nor EOS, as PaliGemma's processor does.

    Raises:
        TokenizerError: a missing or damaged file, by name.
    """
    config = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    older = _json(folder / "special_tokens_map.json") if _has_older(folder, config) else {}
    for key, only in {"truncation_side": "right", "split_special_tokens": False}.items():
        if config.get(key, only) != only:
            raise TokenizerError(f"{folder}: {key}={config[key]!r} is not supported, only {only!r} is.")
    kind = str(config.get("tokenizer_class") or default_class).removesuffix("Fast")
    backend, kind, files = _read_backend(folder, config, kind)
    names = _add_tokens(folder, backend, {**_NAMES.get(kind, {}), **config, **older})
    _add_missing(backend, extra_special_token, location_tokens)
    _frame(
        backend,
        kind,
        names,
        {} if location_tokens else config,
        bare=location_tokens or backend.post_processor is None,
    )
    if (lowercase or config.get("do_lower_case")) and kind in _LEFT:
        kind = "Siglip2Tokenizer"
    if kind == "Siglip2Tokenizer":
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *_parts(backend.normalizer)])
    settings = {key: value for key, value in config.items() if key != "added_tokens_decoder"}
    settings |= {"tokenizer_class": kind or "PreTrainedTokenizerFast", **names}
    settings |= {} if cleaning is None else {_CLEANING: cleaning}
    return _assemble(folder, backend, settings, files, (max_length, pad_to_max_length))


def _read_backend(
    folder: Path, config: JsonDict, kind: str
) -> tuple[tokenizers.Tokenizer, str, dict[str, bytes]]:
    """The pipeline of a folder's files, its class, and files that are saved with it. Raises TokenizerError."""
    whole, bare = folder / "tokenizer.json", _bare(folder)
    if bare and (kind == "SiglipTokenizer" or not whole.is_file()):
        data = bare.read_bytes()
        backend, kind = _from_bare(bare, data, kind, legacy=bool(config.get("legacy")))
        return backend, kind, {bare.name: data}
    if whole.is_file():
        return _backend(whole, config), kind, {}
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_pairs(folder, bool(config.get("add_prefix_space"))), kind, {}
    raise TokenizerError(
        f"{folder}: holds no tokenizer. Copy tokenizer.json, spiece.model or tokenizer.model, or vocab.json and "
        "merges.txt, of the checkpoint into that folder."
    )


def _assemble(
    folder: Path,
    backend: tokenizers.Tokenizer,
    settings: JsonDict,
    files: dict[str, bytes],
    shape: tuple[int, bool],
) -> Tokenizer:
    max_length, fill = shape
    if isinstance(limit := settings.get("model_max_length"), (int, float)) and limit > 0:
        max_length = int(min(max_length, limit))
    kind, ids = settings["tokenizer_class"], backend.get_vocab(with_added_tokens=True)
    cleaning = settings.get(_CLEANING)
    if cleaning is not None and cleaning not in CLEANINGS:
        raise TokenizerError(f"{folder}: cleaning {cleaning!r} is not known; known: {', '.join(CLEANINGS)}.")
    if kind == "SiglipTokenizer" and not files:
        settings["tokenizer_class"] = (
            "PreTrainedTokenizerFast"  # that class cannot do without its spiece.model
        )
    own = None
    if files and kind == "SiglipTokenizer":
        names = [token.content for token in backend.get_added_tokens_decoder().values()]
        lower, end = bool(settings.get("do_lower_case", True)), str(settings["eos_token"])
        own = _siglip_cleaning(read_piece_model(*files.values()), names, lower, end)
    pad_name = settings.get("pad_token") or settings.get("eos_token")
    if pad_name not in ids:
        raise TokenizerError(
            f"{folder}: {pad_name!r} (pad_token) is not in the vocabulary. Fetch its files again."
        )
    framed = backend.encode("").ids  # what every row has: nothing, the first, the last token or both
    bos, eos = (ids.get(str(settings.get(role))) for role in ("bos_token", "eos_token"))
    side = settings.get("padding_side") or ("left" if kind in _LEFT else "right")
    return Tokenizer(
        kind="pieces",
        bos_id=bos if bos in framed[:1] else None,
        eos_id=eos if eos in framed[-1:] else None,
        padding=Padding(ids[pad_name], fill, side if fill else "right", keep_eos=eos in framed[-1:]),
        vocab_size=1 + max(ids.values()),
        max_length=max_length,
        backend=backend,
        settings=settings,
        clean=own if cleaning is None else _after(CLEANINGS[cleaning], own),
        files=files,
    )


# ------------------------------------------------------------------------------------------------ files


def _has_older(folder: Path, config: JsonDict) -> bool:
    """Files from before `added_tokens_decoder` name the special tokens in a separate file, which then wins."""
    return "added_tokens_decoder" not in config and (folder / "special_tokens_map.json").is_file()


def _bare(folder: Path) -> Path | None:
    return next((folder / n for n in ("spiece.model", "tokenizer.model") if (folder / n).is_file()), None)


def _json(path: Path) -> JsonDict:
    try:
        return {**json.loads(path.read_text("utf-8"))}
    except (OSError, ValueError, TypeError) as error:
        raise TokenizerError(f"{path} is damaged or of another kind ({error}); fetch it again.") from error


def _backend(path: Path, config: JsonDict) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{path} is damaged or of another kind ({error}); fetch it again.") from error
    backend.no_padding()
    backend.no_truncation()
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and "add_prefix_space" in config:
        backend.pre_tokenizer.add_prefix_space = bool(config["add_prefix_space"])
    return backend


def _from_bare(path: Path, data: bytes, kind: str, *, legacy: bool) -> tuple[tokenizers.Tokenizer, str]:
    """The pipeline of a SentencePiece file, and the class that it is, where none is named."""
    piece_model = read_piece_model(data, source=str(path))
    kind = kind or ("GemmaTokenizer" if piece_model.is_bpe else "SiglipTokenizer")
    if kind not in _PIPELINES:
        raise TokenizerError(f"{path}: {kind} is read from tokenizer.json alone; copy it into that folder.")
    backend = _PIPELINES[kind](piece_model)
    if kind == "LlamaTokenizer" and legacy:
        # Each part between special tokens starts a word.
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_MARK, prepend_scheme="always", split=False)
    return backend, kind


def _byte_pairs(folder: Path, prefix_space: bool) -> tokenizers.Tokenizer:
    """GPT-2's kind, as OPT's first files have it."""
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"{folder}: its vocab.json or merges.txt is damaged ({error}).") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_tokens(folder: Path, backend: tokenizers.Tokenizer, config: JsonDict) -> dict[str, str]:
    """Adds what tokenizer_config.json lists beyond the vocabulary; returns the names of the special tokens by role."""
    listed: JsonDict = config.get("added_tokens_decoder") or {}
    stated = {int(index): _token(token) for index, token in listed.items()}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for _, token in sorted(stated.items()) if token.content not in known])
    for index, token in stated.items():
        if (known_id := backend.token_to_id(token.content)) != index:
            raise TokenizerError(
                f"{folder}: {token.content!r} should be token {index}, but the vocabulary makes it {known_id}: these "
                "are files of different checkpoints. Fetch them again."
            )
    roles = {role: config[role] for role in _ROLES if config.get(role) is not None}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    every = [*roles.values(), *(extra.values() if isinstance(extra, dict) else extra)]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [token for token in map(_token, every) if token.content not in known]
    backend.add_tokens(list({token.content: token for token in missing}.values()))
    return {role: _token(value).content for role, value in roles.items()}


def _add_missing(backend: tokenizers.Tokenizer, extra: str, places: bool) -> None:
    if extra and backend.token_to_id(extra) is None:
        backend.add_tokens([AddedToken(extra, special=True, normalized=False)])
    backend.add_tokens(_PLACES if places else [])


def _token(token: str | JsonDict) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    return AddedToken(**{key: value for key, value in token.items() if key not in ("id", "__type")})


def _frame(
    backend: tokenizers.Tokenizer, kind: str, names: dict[str, str], config: JsonDict, *, bare: bool
) -> None:
    """First and last token: as tokenizer.json says; where it is silent (bare) as tokenizer_config.json, else as the
    class has it."""
    if not bare:
        return
    config = {} if kind == "SiglipTokenizer" else config
    first = "bos_token" in names and bool(config.get("add_bos_token", kind == "LlamaTokenizer"))
    last = "eos_token" in names and bool(config.get("add_eos_token", kind == "SiglipTokenizer"))
    bos, eos = [names.get("bos_token", "")] * first, [names.get("eos_token", "")] * last
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{name}:1" for name in bos), "$B:1", *(f"{name}:1" for name in eos)],
        special_tokens=[(name, backend.token_to_id(name)) for name in dict.fromkeys(bos + eos)],
    )


def _parts(normalizer: normalizers.Normalizer | None) -> list[normalizers.Normalizer]:
    return [] if normalizer is None else [normalizer]


# ------------------------------------------------------------------------------------------------ pipelines


def _siglip_pipeline(model: PieceModel) -> tokenizers.Tokenizer:
    """The most likely pieces of words, each with the space before it; `_siglip_cleaning` comes first.

    With `byte_fallback`, characters without a piece are written in bytes: "ñ" is <0xC3> <0xB1>, else <unk>.
    """
    vocabulary = [(piece, score) for piece, score, _ in model.pieces]
    unigram = models.Unigram(vocabulary, unk_id=model.unk_id, byte_fallback=model.byte_fallback)
    backend = tokenizers.Tokenizer(unigram)
    backend.normalizer = normalizers.Replace(" ", _MARK)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_MARK, prepend_scheme="never")
    parts = [decoders.ByteFallback(), decoders.Metaspace(_MARK, prepend_scheme="always")]
    backend.decoder = decoders.Sequence(parts) if model.byte_fallback else parts[1]
    return backend


def _gemma_pipeline(model: PieceModel) -> tokenizers.Tokenizer:
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    backend = gemma_backend(vocabulary, _merges(vocabulary), model.pieces[model.unk_id][0])
    added = [(piece, kind) for piece, _, kind in model.pieces if kind in (CONTROL, USER_DEFINED)]
    backend.add_tokens([AddedToken(t, normalized=False, special=kind == CONTROL) for t, kind in added])
    return backend


def gemma_backend(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str = "<unk>"
) -> tokenizers.Tokenizer:
    """Byte-pair encoding over the whole text, spaces as they are; what has no piece is written in bytes."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Replace(" ", _MARK)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _llama_pipeline(model: PieceModel) -> tokenizers.Tokenizer:
    """Byte-pair encoding over the whole text, a space in front of it; what has no piece is written in bytes."""
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, _merges(vocabulary), fuse_unk=True, byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_MARK, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, earlier pieces first, then by the length of the first."""
    ranked: list[tuple[int, int, int, int, str, str]] = []
    for piece, index in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((index, cut, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


_PIPELINES: dict[str, Callable[[PieceModel], tokenizers.Tokenizer]] = {
    "SiglipTokenizer": _siglip_pipeline,
    "GemmaTokenizer": _gemma_pipeline,
    "LlamaTokenizer": _llama_pipeline,
    "Siglip2Tokenizer": _gemma_pipeline,
}


# ------------------------------------------------------------------------------------------------ texts

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _siglip_cleaning(model: PieceModel, names: list[str], lower: bool, end: str) -> Callable[[str], str]:
    """big_vision's canonical text, between special tokens: lower case, no punctuation, single spaces; then what
    SentencePiece makes of its characters.

    A space is prepended, and an end token that the text already has is not added twice.
    """
    special = re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")
    mapped = character_map(model.charsmap)

    def clean(text: str) -> str:
        parts = special.split(_MARK + text.replace(_MARK, " "))  # every second one is a special token
        for i in range(0, len(parts), 2):
            plain = (parts[i].lower() if lower else parts[i]).translate(_NO_PUNCTUATION)
            plain = mapped(re.sub(r"\s+", " ", plain).strip())
            parts[i] = re.sub(" {2,}", " ", plain).rstrip(f" {_MARK}")
        if parts[-1] == "" and parts[-2:-1] == [end]:
            del parts[-2:]
        return "".join(parts)

    return clean


def _mended(text: str) -> str:
    import ftfy  # few models need it

    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def _canonical(text: str) -> str:
    plain = _mended(text).replace("_", " ").translate(_NO_PUNCTUATION).lower()
    return " ".join(plain.split())


# open_clip's, by the names of its configs ("tokenizer_kwargs": {"clean": ...}).
CLEANINGS: dict[str, Callable[[str], str]] = {
    "canonicalize": _canonical,
    "lower": lambda text: " ".join(_mended(text).split()).lower(),
    "whitespace": lambda text: " ".join(_mended(text).split()),
}


def _after(first: Callable[[str], str], second: Callable[[str], str] | None) -> Callable[[str], str]:
    return first if second is None else lambda text: second(first(text))
