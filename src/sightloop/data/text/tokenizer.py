"""Text in: strings become token ids, and ids become strings, over the `tokenizers` library.

One `Tokenizer` serves every family. What differs between families is data: the pipeline in `backend`, the names
of the special tokens and a few settings. The pipelines of CLIP and BERT are here, SentencePiece is in `pieces`.

CLIP has two sets of rules, and the files say which one holds:

* hub files (`tokenizer.json`, or `vocab.json` and `merges.txt`): NFC, white space, lower case, as the hub's own
  tokenizer has it; special tokens are found anywhere in a text;
* the original `bpe_simple_vocab_16e6.txt.gz`, and any files beside weights in open_clip's layout: what CLIP was
  trained with, see `clip_rules`. Plain captions get the same ids under both.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Container, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from sightloop.data.text.clip_rules import CLIP_RULES, CLIP_WORDS, ClipRules
from sightloop.data.text.padding import Padding, check_texts, pad
from sightloop.errors import TokenizerError, UsageError
from sightloop.types import JsonDict, JsonMapping, Tokens

PipelineKind = Literal["clip", "bert", "pieces"]  # the last: data/pieces.py
Merges = list[tuple[str, str]]
Vocabulary = tuple[dict[str, int], Merges | None, list[JsonDict]]  # and the added tokens that a file lists

_START, _END = CLIP_RULES["openai"].ends
_OPEN_CLIP_ENDS = CLIP_RULES["open_clip"].ends
_NAMES: dict[PipelineKind, dict[str, str]] = {
    "clip": dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), _END) | {"bos_token": _START},
    "bert": {f"{role.lower()}_token": f"[{role}]" for role in ("UNK", "SEP", "PAD", "CLS", "MASK")},
}
# Roles in the order in which the hub's loader adds tokens that a vocabulary lacks; it decides their ids.
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FRAME: dict[PipelineKind, tuple[str, str]] = {
    "clip": ("bos_token", "eos_token"),
    "bert": ("cls_token", "sep_token"),
}
_CLASS: dict[PipelineKind, str] = {"clip": "CLIPTokenizer", "bert": "BertTokenizer"}
_BERT_SWITCHES: JsonDict = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
_CLEANING = (
    "sightloop_cleaning"  # a name of CLIP_RULES or absent in tokenizer_config.json; other readers ignore it
)
_JOINED = "sightloop_joined"  # marks such as "_" that decoded texts have without spaces around them

_OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
_OPENAI_MERGES = 49152 - 256 - 2  # the file has more merges than CLIP was trained with


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """Token ids of texts, and back. Made by `load_tokenizer` and its siblings; safe to share between threads.

    bos_id, eos_id: what `encode` puts first and last in every row ([CLS] and [SEP] for "bert"); None for neither.
    padding: what fills the rows of a call, as a rule at the end and up to the longest.
    vocab_size: one more than the greatest id: the rows that an embedding table needs.
    max_length: tokens in a row at most, first and last included.
    settings: what `save` writes to tokenizer_config.json, with the special tokens by role.
    clean: what is done to a text before anything else. files: what else `save` writes, by name.
    """

    kind: PipelineKind
    bos_id: int | None
    eos_id: int | None
    padding: Padding
    vocab_size: int
    max_length: int
    backend: tokenizers.Tokenizer
    settings: JsonMapping
    clean: Callable[[str], str] | None = None
    files: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def pad_id(self) -> int:
        """What fills a row."""
        return self.padding.pad_id

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        """Ids of R texts: int64 `[R, L]`, L the longest row of this call, filled up as `padding` says.

        A text of more than `max_length` tokens (by default, and always where `padding` fills rows to it, the
        tokenizer's own) loses those before its last one; one `UserWarning` a call says how many texts and tokens that
        concerns. Raises `UsageError` if `texts` is one string or holds anything but strings of valid Unicode, or if
        `max_length` < 2.
        """
        limit = self.max_length if max_length is None or self.padding.to_max_length else max_length
        if limit < 2:
            raise UsageError(f"max_length={limit}: at least 2 are needed, for the first and the last token.")
        check_texts(texts)
        rows = self._rows(list(texts))
        return pad(texts, rows, limit, self.padding, lambda ids: self.decode([ids])[0])

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of rows of ids (lists, arrays, tensors), without special tokens and ids that do not exist.

        Text equal to that of the hub's tokenizer. Raises `UsageError` for what cannot be an id, such as -100.
        """
        rows = [cast("Any", row).tolist() if hasattr(row, "tolist") else list(row) for row in ids]
        try:
            texts = self.backend.decode_batch(rows, skip_special_tokens=True)
        except (OverflowError, TypeError) as error:
            raise UsageError(
                f"ids must be rows of integers from 0 to {self.vocab_size - 1}; mask out others, such as -100."
            ) from error
        if self.kind == "clip":
            return [text.replace("</w>", " ").strip() for text in texts]
        tidy = self.settings.get("clean_up_tokenization_spaces")
        return [_tidy(text) for text in texts] if tidy else texts

    def token_id(self, token: str) -> int:
        """The id of one token, spelt as in the vocabulary ("[MASK]", "##ing"). Raises `TokenizerError`."""
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"{token!r} is not among the {self.vocab_size} tokens of this {self.kind} tokenizer; add it to "
                "the tokenizer's files, or take its id from the checkpoint's configuration."
            )
        return token_id

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the vocabulary files.

        `load_tokenizer` reads back what was saved. Tools that know only the hub's rules give the same ids too,
        except, for the original CLIP vocabulary, where a text needs ftfy or HTML unescaping.
        """
        folder.mkdir(parents=True, exist_ok=True)
        added = dict(sorted(self.backend.get_added_tokens_decoder().items()))
        backend = self.backend
        if self._rules:  # in tokenizer.json the hub's rules, the only ones that other tools can run
            backend = _clip_pipeline(backend.model, {})
            backend.add_tokens(list(added.values()))
            backend.post_processor = self.backend.post_processor
        if "spiece.model" not in self.files:  # SigLIP's own class knows nothing else
            backend.save(str(folder / "tokenizer.json"))
        if self.kind != "pieces":
            backend.model.save(str(folder))
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        roles: JsonDict = {role: name for role, name in self.settings.items() if role.endswith("_token")}
        extra = [t.content for t in added.values() if t.special and t.content not in roles.values()]
        roles |= {"additional_special_tokens": extra} if extra else {}
        config: JsonDict = {"tokenizer_class": _CLASS.get(self.kind), **self.settings, **roles}
        config["model_max_length"] = self.max_length
        config["added_tokens_decoder"] = {str(index): token.__getstate__() for index, token in added.items()}
        for name, content in {"tokenizer_config.json": config, "special_tokens_map.json": roles}.items():
            text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
            (folder / name).write_text(text + "\n", "utf-8")

    @property
    def _rules(self) -> ClipRules | None:
        return CLIP_RULES.get(self.settings.get(_CLEANING, ""))

    def _rows(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text with its first and last token, uncut."""
        if self.clean:
            texts = [self.clean(text) for text in texts]
        rows = [encoding.ids for encoding in self.backend.encode_batch_fast(texts)]
        # The library finds special tokens anywhere, the original only where a word begins.
        rules = self._rules
        for row in [row for row, text in enumerate(texts) if rules and rules.special.search(text)]:
            parts = [self._part(part) for part in (rules.parts(texts[row]) if rules else ())]
            rows[row] = [cast(int, self.bos_id), *chain.from_iterable(parts), cast(int, self.eos_id)]
        return rows

    def _part(self, part: str) -> list[int]:
        known = self._rules is not None and part in self._rules.ends
        return [self.token_id(part)] if known else self.backend.encode(part, add_special_tokens=False).ids


def load_tokenizer(
    folder: Path, *, kind: PipelineKind, max_length: int, rules: Literal["openai", "open_clip"] | None = None
) -> Tokenizer:
    """The tokenizer of a checkpoint folder in the hub's layout; ids equal to the hub's own tokenizer of `kind`.

    Reads tokenizer.json, else vocab.json and merges.txt ("clip") or vocab.txt ("bert"), else, for "clip", the
    original bpe_simple_vocab_16e6.txt.gz; and tokenizer_config.json, special_tokens_map.json, added_tokens.json
    where present. As at the hub, `kind` and the switches in tokenizer_config.json (`do_lower_case`, ...) decide
    how text is normalized, not tokenizer.json. Rows get `max_length` tokens at most (what the network takes), or
    `model_max_length` if that is less. `rules`: texts are cleaned and cut into words as CLIP's original code or
    open_clip does (ftfy, HTML, how special tokens are spelled), whatever the files are. Raises `TokenizerError`,
    naming the file and where it belongs.
    """
    if kind not in _NAMES:
        raise UsageError(f"kind={kind!r}: must be one of {', '.join(map(repr, _NAMES))}.")
    whole, plain = folder / "tokenizer.json", folder / ("vocab.json" if kind == "clip" else "vocab.txt")
    if kind == "clip" and not whole.is_file() and not plain.is_file() and (folder / _OPENAI_FILE).is_file():
        return clip_tokenizer_from_bpe(folder / _OPENAI_FILE, max_length=max_length, rules=rules or "openai")
    config = _read_json(folder / "tokenizer_config.json", optional=True)
    for key, usual in {"truncation_side": "right", "split_special_tokens": False}.items():
        if config.get(key, usual) != usual:
            raise TokenizerError(f"{folder}: {key}={config[key]!r} is not supported, only {usual!r} is.")
    if not whole.is_file():
        wanted = "vocab.json and merges.txt" if kind == "clip" else "vocab.txt"
        _require(plain, f"Copy tokenizer.json, or {wanted}, of the checkpoint into that folder.")
    vocabulary, merges, listed = _read_whole(whole, kind) if whole.is_file() else _read_plain(plain, kind)
    usual = _NAMES[kind]
    if kind == "clip" and _START not in vocabulary and _OPEN_CLIP_ENDS[0] in vocabulary:
        usual = {role: _respelled(name) for role, name in usual.items()}
    with _reading(folder):
        stated, names, tokens = _read_special(folder, usual, config, listed)
        if rules == "open_clip" and kind == "clip":
            vocabulary = {_respelled(word): index for word, index in vocabulary.items()}
            names = {role: _respelled(name) for role, name in names.items()}
            stated = {index: _respelled_token(token) for index, token in stated.items()}
            tokens = [_respelled_token(token) for token in tokens]
    _require_frame(folder, kind, names, {*vocabulary, *(token.content for token in stated.values())})
    kept = ("clean_up_tokenization_spaces", "processor_class", _CLEANING, _JOINED, *_BERT_SWITCHES)
    settings = {key: config[key] for key in kept if key in config} | names
    settings |= {_CLEANING: rules} if rules and kind == "clip" else {}
    if isinstance(limit := config.get("model_max_length"), (int, float)) and limit > 0:
        max_length = int(min(max_length, limit))
    model = _model(plain, vocabulary, merges, names["unk_token"])
    tokenizer = _assemble(kind, model, settings, tokens, max_length)
    for index, token in stated.items():
        if (known_id := tokenizer.backend.token_to_id(token.content)) != index:
            raise TokenizerError(
                f"{folder}: {token.content!r} should be token {index}, but the vocabulary makes it {known_id}: these "
                "are files of different checkpoints. Fetch them again."
            )
    return tokenizer


def clip_tokenizer_from_bpe(
    path: Path, *, max_length: int = 77, rules: Literal["openai", "open_clip"] = "openai"
) -> Tokenizer:
    """CLIP's tokenizer from its original file, bpe_simple_vocab_16e6.txt.gz: 49,408 ids, equal to the original's.

    Only the padding differs: "<|endoftext|>" as in hub files, where the original fills with 0. `rules`: see
    `clip_rules`. Raises `TokenizerError` if the file is absent or not what it should be.
    """
    _require(path, f"Copy {_OPENAI_FILE} from the CLIP repository (folder clip/) there.")
    with _reading(path):
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 1 + _OPENAI_MERGES]
        if not lines:
            raise TokenizerError(f"{path} holds no merges; fetch it again.")
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines if line)]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one a byte, in the order of CLIP's first 256 ids
    ends = CLIP_RULES[rules].ends
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), *ends]
    vocabulary = {word: index for index, word in enumerate(words)}
    names = {role: ends[name == _END] for role, name in _NAMES["clip"].items()}
    model = _model(path, vocabulary, merges, ends[1])
    return _assemble("clip", model, {_CLEANING: rules, **names}, list(map(_token, ends)), max_length)


def bert_tokenizer_from_vocab(
    path: Path, *, extra_special_tokens: Sequence[str] = ("[DEC]", "[ENC]"), max_length: int = 512
) -> Tokenizer:
    """BERT's uncased tokenizer from a bare vocab.txt, with `extra` special tokens added after its last id.

    The default is BLIP's: after the 30,522 of bert-base-uncased, its original code adds "[DEC]" (30522, which
    starts a caption) and "[ENC]" (30523, which starts a text to be matched). Raises `TokenizerError`.
    """
    _require(path, "Copy vocab.txt of bert-base-uncased there.")
    vocabulary, merges, _ = _read_plain(path, "bert")
    _require_frame(path, "bert", _NAMES["bert"], vocabulary)
    tokens = [_token(name) for name in (*_NAMES["bert"].values(), *extra_special_tokens)]
    model = _model(path, vocabulary, merges, "[UNK]")
    return _assemble("bert", model, {**_BERT_SWITCHES, **_NAMES["bert"]}, tokens, max_length)


# ------------------------------------------------------------------------------------------------ building


def _assemble(
    kind: PipelineKind, model: models.Model, settings: JsonDict, tokens: Sequence[AddedToken], max_length: int
) -> Tokenizer:
    """The pipeline of `kind` around `model`; `tokens` in the order that gives those it lacks the hub's ids."""
    bos, eos = (str(settings[role]) for role in _FRAME[kind])
    backend = _PIPELINES[kind](model, settings)
    first = {token.content: token for token in reversed(tokens)}  # the first of a name decides its flags
    backend.add_tokens([first[name] for name in dict.fromkeys(token.content for token in tokens)])
    ids = backend.get_vocab(with_added_tokens=True)
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos],
        pair=[bos, "$A", eos, "$B:1", f"{eos}:1"],
        special_tokens=[(bos, ids[bos]), (eos, ids[eos])],
    )
    return Tokenizer(
        kind=kind,
        bos_id=ids[bos],
        eos_id=ids[eos],
        padding=Padding(ids[settings.get("pad_token", eos)]),
        vocab_size=1 + max(ids.values()),
        max_length=max_length,
        backend=backend,
        settings=settings,
        clean=rules.clean if (rules := CLIP_RULES.get(settings.get(_CLEANING, ""))) else None,
    )


def _clip_pipeline(model: models.Model, settings: JsonDict) -> tokenizers.Tokenizer:
    rules = CLIP_RULES.get(settings.get(_CLEANING, ""))
    backend = tokenizers.Tokenizer(model)
    if rules is None:
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
    words = Regex(CLIP_WORDS if rules is None else rules.words)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # The words are what the pattern matches; what is between them is dropped.
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules is None),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _bert_pipeline(model: models.Model, settings: JsonDict) -> tokenizers.Tokenizer:
    switches = {**_BERT_SWITCHES, **settings}
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=switches["tokenize_chinese_chars"],
        strip_accents=switches["strip_accents"],
        lowercase=switches["do_lower_case"],
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    joined = [decoders.Replace(f" {mark} ", mark) for mark in settings.get(_JOINED, "")]
    pieces = decoders.WordPiece(prefix="##")
    backend.decoder = decoders.Sequence([pieces, decoders.Fuse(), *joined]) if joined else pieces
    return backend


_PIPELINES = {"clip": _clip_pipeline, "bert": _bert_pipeline}


def _model(source: Path, vocabulary: dict[str, int], merges: Merges | None, unknown: str) -> models.Model:
    """Byte-pair encoding, or WordPiece where there are no `merges`."""
    with _reading(source):
        if merges is None:
            return models.WordPiece(vocabulary, unk_token=unknown)
        return models.BPE(
            vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=unknown
        )


# ------------------------------------------------------------------------------------------------ files


def _read_whole(path: Path, kind: PipelineKind) -> Vocabulary:
    """Vocabulary, merges and added tokens of a tokenizer.json, whose older writers name no type of model."""
    with _reading(path):
        content = json.loads(path.read_text("utf-8"))
        model = content["model"]
        if ("merges" in model) != (kind == "clip"):
            raise TokenizerError(f"{path} does not hold the vocabulary of a {kind} tokenizer.")
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ()))
        merges = cast("Merges", [tuple(pair) for pair in pairs]) if kind == "clip" else None
        return dict(model["vocab"]), merges, list(content.get("added_tokens") or [])


def _read_plain(path: Path, kind: PipelineKind) -> Vocabulary:
    """Vocabulary and merges of a vocab.json with its merges.txt, or of a vocab.txt."""
    merges = path.with_name("merges.txt")
    if kind == "clip":
        _require(merges, "It belongs to vocab.json: copy it from the checkpoint into that folder.")
    with _reading(path):
        if kind == "clip":
            return cast("Vocabulary", (*models.BPE.read_file(str(path), str(merges)), []))
        return models.WordPiece.read_file(str(path)), None, []


def _read_special(
    folder: Path, usual: Mapping[str, str], config: JsonDict, listed: list[JsonDict]
) -> tuple[dict[int, AddedToken], dict[str, str], list[AddedToken]]:
    """Tokens whose ids are stated; names by role (`usual` without others); all tokens to add, in the hub's order.

    Three generations of files: `added_tokens_decoder` in tokenizer_config.json makes the other lists void; else
    special_tokens_map.json overrules the roles, and added_tokens.json and tokenizer.json list what was added.
    """
    current = "added_tokens_decoder" in config
    older = {} if current else _read_json(folder / "special_tokens_map.json", optional=True)
    every: JsonDict = {**usual, **config, **older}
    roles = {k: v for k, v in every.items() if k.endswith("_token") and isinstance(v, (str, dict))}
    names = {role: _name(roles[role]) for role in dict.fromkeys((*_ROLES, *roles)) if role in roles}
    special = {*names.values(), *map(_name, _extra(config))}  # as at the hub: `older` comes too late for this
    entries: dict[int, JsonDict] = {
        int(k): token for k, token in config.get("added_tokens_decoder", {}).items()
    }
    if not current:
        for name, index in _read_json(folder / "added_tokens.json", optional=True).items():
            flag = name in special
            entries[index] = {"content": name, "normalized": not flag, "special": flag}
        entries |= {token["id"]: token for token in listed}
    own = names.values()
    stated = {index: _token(token, special=_name(token) in own) for index, token in sorted(entries.items())}
    unlisted = [*(roles[role] for role in names), *_extra(every)]
    return stated, names, [*stated.values(), *(_token(token, special=True) for token in unlisted)]


def _extra(config: JsonDict) -> list[str | JsonDict]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values() if isinstance(extra, dict) else extra)


def _name(token: str | JsonDict) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _token(token: str | JsonDict, *, special: bool = False) -> AddedToken:
    """A token from its name (then special, and matched as written) or from its flags in a file."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags: JsonDict = {key: value for key, value in token.items() if key not in ("id", "__type", "special")}
    return AddedToken(**flags, special=special or bool(token.get("special")))


def _respelled(name: str) -> str:
    """A name of a token, CLIP's two special tokens as open_clip spells them."""
    return dict(zip((_START, _END), _OPEN_CLIP_ENDS, strict=True)).get(name, name)


def _respelled_token(token: AddedToken) -> AddedToken:
    flags = token.__getstate__()
    return AddedToken(**{**flags, "content": _respelled(token.content)})


@contextmanager
def _reading(source: Path) -> Generator[None]:
    """Whatever goes wrong inside is the fault of `source`; the library raises nothing narrower than Exception."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TokenizerError):
            raise
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise TokenizerError(f"{source} is damaged or of another kind ({why}); fetch it again.") from error


def _require(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise TokenizerError(f"{path} does not exist. {remedy}")


def _require_frame(source: Path, kind: PipelineKind, names: Mapping[str, str], known: Container[str]) -> None:
    for role in _FRAME[kind]:
        if names.get(role, "") not in known:
            raise TokenizerError(
                f"{source}: {names.get(role)!r} ({role}) is not in the vocabulary, so a file is missing or these "
                f"are not the files of a {kind} tokenizer. Fetch them again."
            )


def _read_json(path: Path, *, optional: bool = False) -> JsonDict:
    if optional and not path.is_file():
        return {}
    with _reading(path):
        return {**json.loads(path.read_text("utf-8"))}


# ------------------------------------------------------------------------------------------------ texts


def _tidy(text: str) -> str:
    """Without the spaces before punctuation and English clitics: the hub's `clean_up_tokenization_spaces`."""
    for mark in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(mark, mark.strip())
    return text
