"""Token ids and texts against `transformers`, and against the original CLIP rules written out slowly here."""

from __future__ import annotations

import gzip
import html
import json
import pickle
import random
import tarfile
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertTokenizer, CLIPTokenizer

from sightloop.data.text.tokenizer import (
    Tokenizer,
    bert_tokenizer_from_vocab,
    clip_tokenizer_from_bpe,
    load_tokenizer,
)
from sightloop.errors import TokenizerError, UsageError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FILES = SHARED / "tokenizers"
LONG = 4096  # longer than every text below, so that nothing is cut unless a test wants it
START, END = "<|startoftext|>", "<|endoftext|>"

# ---------------------------------------------------------------------------------------------- texts

SPELT = """<|endoftext|> <|startoftext|> <|ENDOFTEXT|> <|endoftext|><|endoftext|> !<| |> [SEP] [CLS] [DEC] [ENC] [MASK]
[PAD] [UNK] [sep] 's 'S n't ' ! !! , . ?! &amp; &lt; &#39; &amp;lt; &eacute; e&#769; &#x85; &#28; </w> ##s <br> a dog
A 1 23 1,000 ﬁ ß İ ΣΑΣ schön â€™ Ã© ’ “quoted” … ½ ² Ⅷ ♥ 狗 犬 собака كلب कुत्ता ไทย 👩‍👩‍👧 👍🏽 🇩🇪"""  # noqa: RUF001
ODD = [
    " ", "  ", "\t", "\r\n", "\n", "\x00", "\x07", "\x0b", "\x0c", "\x1b[31m", "\x1c", "\x7f", "\x85", "\xa0",
    "\xad", "\u017f", "'\u017f", "<|\u017ftartoftext|>", "\u0301", "\u0345", "\u200b", "\u200d", "\u2028",
    "\u202e", "\u2066", "\u3000", "\ufe0f", "\ufeff", "\ufffd", "\U000e0041", "\U0010ffff",
]  # fmt: skip
BITS = [*SPELT.split(), *ODD]
PLAIN = ["the", "a", "dog", "runs", "over", "green", "grass", "two", "children", "beside", "it's", "don't"]
BLOCKS = [
    (0x00, 0x20), (0x20, 0x7F), (0x7F, 0x100), (0x100, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700),
    (0x900, 0xE00), (0xE00, 0x1200), (0x1E00, 0x2070), (0x2070, 0x2C00), (0x3000, 0x3100), (0x4E00, 0xA000),
    (0xAC00, 0xD7A4), (0xE000, 0xE100), (0xF900, 0x10000), (0x10000, 0x10400), (0x1D400, 0x1D800),
    (0x1F000, 0x1FB00), (0x20000, 0x20100), (0xE0000, 0xE0200),
]  # fmt: skip


@cache
def strange_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of many scripts, controls, joiners, marks, entities and spelt-out special tokens."""
    rng = random.Random(seed)

    def part() -> str:
        kind = rng.random()
        if kind < 0.4:
            return rng.choice(BITS)
        if kind < 0.5:
            return rng.choice(PLAIN)
        low, high = rng.choice(BLOCKS) if kind < 0.95 else (0, 0xD800)
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randint(1, 4)))

    return [
        "".join(part() + " " * (rng.random() < 0.3) for _ in range(rng.randint(0, 10))) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Captions of people: the shared ones where they are, else a few with the same habits."""
    tars = sorted((SHARED / "flickr8k").glob("*.tar"))
    found = [
        "A dog runs .",
        "Two kids , one in red , aren't playing !",
        '" Hello " says a man\'s T-shirt .',
        "",
    ] * 5
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    found += json.load(stream)["captions"]
    return found


# ---------------------------------------------------------------------------------------------- vocabularies

TINY_MERGES = "t h|th e</w>|d o|do g</w>|i n|in g</w>|a n|! !</w>|' s</w>|e n|en d|â Ģ|1 0"


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte, in the order of CLIP's first ids: printable bytes stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


def write_tiny_bpe(folder: Path) -> Path:
    path = folder / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(("#version\n" + TINY_MERGES.replace("|", "\n") + "\n").encode()))
    return path


@pytest.fixture(scope="module", params=["tiny", "full"])
def bpe_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "full":
        path = FILES / "bpe_simple_vocab_16e6.txt.gz"
        if not path.is_file():
            pytest.skip(f"needs {path}")
        return path
    return write_tiny_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module", params=["tiny", "full"])
def wordpiece_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "full":
        path = FILES / "bert_base_uncased_vocab.txt"
        if not path.is_file():
            pytest.skip(f"needs {path}")
        return path
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    letters = "abcdefghijklmnopqrstuvwxyz0123456789ßç\u03c3\u03c2"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"!',.?&;<>|[]#-",
        "the",
        "dog",
        "狗",
        "n",
        "##ing",
        "A",
        "É",
    ]
    vocabulary = dict.fromkeys([*words, *letters, *("##" + letter for letter in letters)])
    path.write_text("\n".join(vocabulary) + "\n", "utf-8")
    return path


def flags(content: str, **more: Any) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    return {"content": content, **plain, **more}


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content), "utf-8")


def clip_folder(bpe_file: Path, folder: Path, style: str) -> Path:
    """The vocabulary of `bpe_file` in the files of one generation of hub checkpoints."""
    made = folder / "made"
    clip_tokenizer_from_bpe(bpe_file).save(made)
    (made / "tokenizer_config.json").unlink()
    write(made / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    new = folder / style
    if style in ("transformers 5", "pad !"):
        options = {"pad_token": "!"} if style == "pad !" else {}
        CLIPTokenizer.from_pretrained(made, **options).save_pretrained(new)
        return new
    new.mkdir()
    kept = ["tokenizer.json"] if style == "only tokenizer.json" else ["vocab.json", "merges.txt"]
    for name in kept:
        (new / name).write_bytes((made / name).read_bytes())
    if style == "2021":  # as the first CLIP checkpoints: flags in both files
        roles = {"bos_token": flags(START), "eos_token": flags(END), "unk_token": flags(END)}
        typed = {role: {**token, "__type": "AddedToken"} for role, token in roles.items()}
        config = {
            **typed,
            "pad_token": END,
            "add_prefix_space": False,
            "errors": "replace",
            "do_lower_case": True,
        }
        write(new / "tokenizer_config.json", {**config, "model_max_length": 77})
        write(new / "special_tokens_map.json", {**roles, "pad_token": "!"})
    elif style == "2023":  # as 4.x: added_tokens_decoder in the configuration
        eos = clip_tokenizer_from_bpe(bpe_file).eos_id
        added = {
            str(eos - 1): flags(START, special=True),
            str(eos): flags(END, special=True, normalized=False),
        }
        added[str(eos + 1)] = flags("<photo>", normalized=False, special=True)
        config = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        config |= {
            "added_tokens_decoder": added,
            "additional_special_tokens": ["<photo>"],
            "model_max_length": 77,
        }
        write(new / "tokenizer_config.json", {**config, "tokenizer_class": "CLIPTokenizer"})
    elif style == "added_tokens.json":
        eos = clip_tokenizer_from_bpe(bpe_file).eos_id
        write(new / "added_tokens.json", {"Brand": eos + 1, "<photo>": eos + 2})
        write(new / "special_tokens_map.json", {"additional_special_tokens": ["<photo>"]})
    return new


CLIP_STYLES = [
    "transformers 5", "pad !", "only tokenizer.json", "only vocab.json", "2021", "2023", "added_tokens.json"
]  # fmt: skip

BERT_STYLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "blip": {"do_lower_case": True, "model_max_length": 512, "strip_accents": None, "never_split": None},
    "cased": {"do_lower_case": False, "clean_up_tokenization_spaces": True},
    "accents": {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    "extra": {
        "bos_token": "[DEC]",
        "additional_special_tokens": ["[ENC]"],
        "clean_up_tokenization_spaces": True,
    },
}


# ---------------------------------------------------------------------------------------------- comparing


def rows_of(tokenizer: Tokenizer, texts: list[str], max_length: int = LONG) -> list[list[int]]:
    tokens = tokenizer.encode(texts, max_length=max_length)
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int64
    assert tokens.ids.shape == (len(texts), tokens.lengths.max(initial=0))
    columns = np.arange(tokens.ids.shape[1])
    assert (tokens.ids[columns >= tokens.lengths[:, None]] == tokenizer.pad_id).all()
    return [row[:length].tolist() for row, length in zip(tokens.ids, tokens.lengths, strict=True)]


def assert_equal(ours: list[Any], theirs: list[Any], texts: list[str]) -> None:
    assert len(ours) == len(theirs) == len(texts)
    wrong = [(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first: {wrong[:3]}"


def assert_same_tokenizer(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    rows = theirs(texts, truncation=True, max_length=LONG)["input_ids"]
    assert_equal(rows_of(ours, texts), rows, texts)
    assert_equal(ours.decode(rows), theirs.batch_decode(rows, skip_special_tokens=True), texts)
    assert ours.pad_id == theirs.pad_token_id
    assert ours.vocab_size == 1 + max(theirs.get_vocab().values())
    # What a network writes need not be a row that `encode` could have made.
    rng = random.Random(1)
    loose = [[rng.randrange(ours.vocab_size) for _ in range(rng.randint(0, 12))] for _ in range(500)]
    assert ours.decode(loose) == theirs.batch_decode(loose, skip_special_tokens=True)


@pytest.mark.parametrize("style", CLIP_STYLES)
def test_clip_folders(bpe_file: Path, tmp_path: Path, style: str, captions: list[str]) -> None:
    folder = clip_folder(bpe_file, tmp_path, style)
    texts = [*captions[::10], *strange_texts(2500, seed=len(style)), "Brand <photo>brand <Photo>"]
    assert_same_tokenizer(
        load_tokenizer(folder, kind="clip", max_length=77), CLIPTokenizer.from_pretrained(folder), texts
    )


@pytest.mark.parametrize("style", BERT_STYLES)
def test_bert_folders(wordpiece_file: Path, tmp_path: Path, style: str, captions: list[str]) -> None:
    (tmp_path / "vocab.txt").write_bytes(wordpiece_file.read_bytes())
    write(tmp_path / "tokenizer_config.json", BERT_STYLES[style])
    theirs = BertTokenizer.from_pretrained(tmp_path)
    texts = [*captions[::10], *strange_texts(2500, seed=len(style))]
    assert_same_tokenizer(load_tokenizer(tmp_path, kind="bert", max_length=512), theirs, texts)
    theirs.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again", kind="bert", max_length=512)
    assert_same_tokenizer(again, BertTokenizer.from_pretrained(tmp_path / "again"), texts[::5])


def test_bert_from_bare_vocabulary_as_blip_does(wordpiece_file: Path, captions: list[str]) -> None:
    ours = bert_tokenizer_from_vocab(wordpiece_file)
    theirs = BertTokenizer(str(wordpiece_file))
    base = len(theirs)
    theirs.add_special_tokens({"bos_token": "[DEC]"})
    theirs.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    assert (ours.token_id("[DEC]"), ours.token_id("[ENC]"), ours.vocab_size) == (base, base + 1, base + 2)
    assert (ours.bos_id, ours.eos_id) == (theirs.cls_token_id, theirs.sep_token_id)
    if wordpiece_file.parent == FILES:
        assert base == 30522
    assert_same_tokenizer(ours, theirs, [*captions[::8], *strange_texts(4000, seed=3)])
    assert bert_tokenizer_from_vocab(wordpiece_file, extra_special_tokens=()).vocab_size == base


# The original CLIP rules, step by step as published, with its word pattern.
WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def clean_slowly(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


# open_clip's: other special tokens, and white space as Python has it.
OPEN_CLIP_ENDS = ("<start_of_text>", "<end_of_text>")
OPEN_CLIP_WORDS = regex.compile(
    "<start_of_text>|<end_of_text>" + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


def open_clip_clean(text: str) -> str:
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).strip().lower()


def original_clip(bpe_file: Path, *, is_open_clip: bool = False) -> Callable[[str], list[int]]:
    ends, pattern, clean = (START, END), WORDS, clean_slowly
    if is_open_clip:
        ends, pattern, clean = OPEN_CLIP_ENDS, OPEN_CLIP_WORDS, open_clip_clean
    lines = gzip.decompress(bpe_file.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines if line]
    table = byte_letters()
    letters = list(table.values())
    vocabulary = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges), *ends]
    ids = {word: n for n, word in enumerate(vocabulary)}
    rank = {merge: n for n, merge in enumerate(merges)}

    @cache
    def word_ids(word: str) -> list[int]:
        if word in ends:
            return [ids[word]]
        spelt = [table[byte] for byte in word.encode()]
        spelt[-1] += "</w>"
        while True:
            pairs = {pair for pair in pairwise(spelt) if pair in rank}
            if not pairs:
                return [ids[piece] for piece in spelt]
            best, place, merged = min(pairs, key=lambda pair: rank[pair]), 0, []
            while place < len(spelt):
                size = 2 if tuple(spelt[place : place + 2]) == best else 1
                merged.append("".join(spelt[place : place + size]))
                place += size
            spelt = merged

    return lambda text: [
        ids[ends[0]],
        *(i for w in pattern.findall(clean(text)) for i in word_ids(w)),
        ids[ends[1]],
    ]


def known_to_all(text: str) -> bool:
    """Whether all letters were in Unicode long enough that every library puts them in the same class."""
    return all(unicodedata.category(letter) not in ("Cn", "Cs") for letter in text + clean_slowly(text))


def test_original_clip_file(bpe_file: Path, captions: list[str]) -> None:
    ours, theirs = clip_tokenizer_from_bpe(bpe_file), original_clip(bpe_file)
    texts = [*captions[::8], *filter(known_to_all, strange_texts(6000, seed=5))]
    assert len(texts) > 2000
    assert_equal(rows_of(ours, texts), [theirs(text) for text in texts], texts)
    if bpe_file.parent == FILES:
        assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (49408, 49406, 49407)
        assert rows_of(ours, ["a diagram"]) == [[49406, 320, 22697, 49407]]


@settings(max_examples=300, deadline=None)
@given(text=st.lists(st.sampled_from(BITS) | st.text(max_size=4), max_size=8).map("".join))
@example(text="!<|endoftext|><|endoftext|>")
@example(text="dog<|endoftext|><|endoftext|>dog <|startoftext|>!<|startoftext|>")
@example(text="<|\u017ftartoftext|><|endoftext|>'\u017fs\u0345<|endoftext|>")
@example(text="\x85 a&amp;#28;b")
def test_any_text(text: str, tiny: tuple[Tokenizer, Callable[[str], list[int]], Tokenizer, Any]) -> None:
    original, slow, hub, reference = tiny
    assert rows_of(hub, [text])[0] == reference(text)["input_ids"]
    if known_to_all(text):
        assert rows_of(original, [text])[0] == slow(text)


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from([*BITS, *OPEN_CLIP_ENDS]) | st.text(max_size=4), max_size=8).map("".join)
)
@example(text="!<end_of_text><end_of_text>")
@example(text="dog<end_of_text><|endoftext|>dog <start_of_text>!<start_of_text>")
@example(text="<\u017ftart_of_text><end_of_text>'\u017fs\u0345<end_of_text>")
@example(text="a\x1cb<START_OF_TEXT>")
def test_any_text_as_open_clip_has_it(
    text: str, open_clip: tuple[Callable[[str], list[int]], list[Tokenizer]]
) -> None:
    slow, tokenizers = open_clip
    if known_to_all(text):
        for tokenizer in tokenizers:
            assert rows_of(tokenizer, [text])[0] == slow(text)


@pytest.fixture(scope="module")
def open_clip(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Callable[[str], list[int]], list[Tokenizer]]:
    """From the original file, from the hub's files of it, and saved and read again."""
    folder = tmp_path_factory.mktemp("open_clip")
    path = write_tiny_bpe(folder)
    hub = clip_folder(path, folder, "transformers 5")
    original = clip_tokenizer_from_bpe(path, rules="open_clip")
    original.save(folder / "saved")
    made = [
        original,
        load_tokenizer(hub, kind="clip", max_length=77, rules="open_clip"),
        load_tokenizer(folder / "saved", kind="clip", max_length=77),
    ]
    return original_clip(path, is_open_clip=True), made


def test_a_vocabulary_in_the_spelling_of_open_clip(tmp_path: Path) -> None:
    path = write_tiny_bpe(tmp_path)
    clip_tokenizer_from_bpe(path, rules="open_clip").save(tmp_path / "files")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "files" / name).unlink()
    hub = load_tokenizer(tmp_path / "files", kind="clip", max_length=77)
    plain = clip_tokenizer_from_bpe(path)
    assert rows_of(hub, ["a dog <end_of_text>"]) == rows_of(plain, ["a dog <|endoftext|>"])
    assert hub.eos_id == plain.eos_id


@pytest.fixture(scope="module")
def tiny(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Tokenizer, Callable[[str], list[int]], Tokenizer, Any]:
    folder = tmp_path_factory.mktemp("tiny")
    path = write_tiny_bpe(folder)
    made = clip_folder(path, folder, "transformers 5")
    hub = load_tokenizer(made, kind="clip", max_length=77)
    return clip_tokenizer_from_bpe(path), original_clip(path), hub, CLIPTokenizer.from_pretrained(made)


def test_both_sets_of_clip_rules_agree_on_plain_captions(
    bpe_file: Path, tmp_path: Path, captions: list[str]
) -> None:
    hub = load_tokenizer(clip_folder(bpe_file, tmp_path, "transformers 5"), kind="clip", max_length=77)
    plain = [text for text in captions[::2] if text.isascii() and "&" not in text]
    assert rows_of(hub, plain) == rows_of(clip_tokenizer_from_bpe(bpe_file), plain)


# ---------------------------------------------------------------------------------------------- saving


def test_saved_clip_is_read_back_by_both(bpe_file: Path, tmp_path: Path, captions: list[str]) -> None:
    texts = [*captions[::40], *strange_texts(500, seed=6)]
    for style in ("original", "pad !", "2023"):
        if style == "original":
            ours = clip_tokenizer_from_bpe(bpe_file)
        else:
            folder = clip_folder(bpe_file, tmp_path / style, style)
            ours = load_tokenizer(folder, kind="clip", max_length=77)
        saved = tmp_path / style / "saved"
        ours.save(saved)
        again = load_tokenizer(saved, kind="clip", max_length=LONG)
        assert rows_of(again, texts) == rows_of(ours, texts)
        assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
        assert (again.vocab_size, again.max_length, again.settings) == (ours.vocab_size, 77, ours.settings)
        shared = [text for text in captions[::10] if text.isascii()] if style == "original" else texts
        assert_same_tokenizer(again, CLIPTokenizer.from_pretrained(saved), shared)
        if style == "original":
            assert_same_tokenizer(again, AutoTokenizer.from_pretrained(saved), shared[:100])
        (saved / "tokenizer.json").unlink()
        assert rows_of(load_tokenizer(saved, kind="clip", max_length=77), texts) == rows_of(ours, texts)


def test_saved_bert_is_read_back_by_both(wordpiece_file: Path, tmp_path: Path, captions: list[str]) -> None:
    texts = [*captions[::40], *strange_texts(500, seed=7)]
    made = [bert_tokenizer_from_vocab(wordpiece_file)]
    for style, config in BERT_STYLES.items():
        (tmp_path / style).mkdir()
        (tmp_path / style / "vocab.txt").write_bytes(wordpiece_file.read_bytes())
        write(tmp_path / style / "tokenizer_config.json", config)
        made.append(load_tokenizer(tmp_path / style, kind="bert", max_length=512))
    for place, ours in enumerate(made):
        saved = tmp_path / f"saved{place}"
        ours.save(saved)
        again = load_tokenizer(saved, kind="bert", max_length=LONG)
        assert rows_of(again, texts) == rows_of(ours, texts)
        assert (again.vocab_size, again.max_length, again.settings) == (ours.vocab_size, 512, ours.settings)
        assert_same_tokenizer(again, BertTokenizer.from_pretrained(saved), texts)
        assert_same_tokenizer(again, AutoTokenizer.from_pretrained(saved), texts[:100])
        (saved / "tokenizer.json").unlink()
        assert rows_of(load_tokenizer(saved, kind="bert", max_length=512), texts) == rows_of(ours, texts)


def test_travels_to_other_processes_and_threads(bpe_file: Path) -> None:
    ours, texts = clip_tokenizer_from_bpe(bpe_file), [*strange_texts(200), "!<|endoftext|> <|endoftext|>"]
    rows = rows_of(ours, texts)
    assert rows_of(pickle.loads(pickle.dumps(ours)), texts) == rows
    with ThreadPoolExecutor(4) as pool:
        assert all(found == rows for found in pool.map(lambda _: rows_of(ours, texts), range(8)))


# ---------------------------------------------------------------------------------------------- cutting


def assert_same_cuts(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for limit in (2, 3, 8, 14):
        with pytest.warns(UserWarning, match="were cut"):
            rows = rows_of(ours, texts, limit)
        assert_equal(rows, theirs(texts, truncation=True, max_length=limit)["input_ids"], texts)


def test_cut_as_the_reference_cuts(bpe_file: Path, tmp_path: Path, captions: list[str]) -> None:
    folder = clip_folder(bpe_file, tmp_path, "transformers 5")
    ours, theirs = load_tokenizer(folder, kind="clip", max_length=77), CLIPTokenizer.from_pretrained(folder)
    texts = [*captions[:200], *strange_texts(300, seed=8)]
    assert_same_cuts(ours, theirs, texts)


def test_cut_bert_as_the_reference_cuts(wordpiece_file: Path, captions: list[str]) -> None:
    ours, theirs = (
        bert_tokenizer_from_vocab(wordpiece_file, extra_special_tokens=()),
        BertTokenizer(str(wordpiece_file)),
    )
    texts = [*captions[:200], *strange_texts(300, seed=9)]
    assert_same_cuts(ours, theirs, texts)


def test_one_warning_a_call_says_how_much_was_lost(bpe_file: Path) -> None:
    ours = clip_tokenizer_from_bpe(bpe_file, max_length=10)
    with pytest.warns(UserWarning, match="were cut") as caught:
        tokens = ours.encode(["a " * 8, "b " * 9, "c " * 20, "d"])
    assert [str(warning.message) for warning in caught] == [
        "2 of 4 texts have more than 10 tokens and were cut; 13 tokens are lost. The longest is text 2 (22 tokens): "
        + repr("c " * 20)
        + "..., which loses "
        + repr(" ".join("c" * 12))
    ]
    assert caught[0].filename == __file__
    assert tokens.lengths.tolist() == [10, 10, 10, 3]
    assert tokens.ids[:, 9].tolist() == [ours.eos_id] * 3 + [ours.pad_id]
    assert ours.encode(["a " * 8, "d"]).lengths.tolist() == [10, 3]  # filterwarnings = error: no warning


def test_shape_follows_the_longest_text(bpe_file: Path) -> None:
    ours = clip_tokenizer_from_bpe(bpe_file)
    assert ours.encode([]).ids.shape == (0, 0)
    assert ours.encode([""]).ids.tolist() == [[ours.bos_id, ours.eos_id]]
    assert ours.encode(("a", "a a a")).ids.shape == (2, 5)
    assert ours.decode(np.array([[ours.bos_id, ours.eos_id]])) == [""]
    assert ours.decode(ours.encode(["A dog , dogs !"]).ids) == ["a dog , dogs !"]


# ---------------------------------------------------------------------------------------------- refusing


def test_wrong_arguments(bpe_file: Path, tmp_path: Path) -> None:
    ours = clip_tokenizer_from_bpe(bpe_file)
    hub = load_tokenizer(clip_folder(bpe_file, tmp_path, "transformers 5"), kind="clip", max_length=77)
    wrong: list[Any] = ["a dog", ["a", 3], ["a", None], [b"a"], [("a", "b")]]
    for texts in wrong:
        with pytest.raises(UsageError, match="list of strings"):
            ours.encode(texts)
    with pytest.raises(UsageError, match=r"texts\[1\] is not valid Unicode"):
        hub.encode(["a", "b\udc80", "c"])
    with pytest.raises(UsageError, match="at least 2"):
        ours.encode(["a"], max_length=1)
    for ids in ([[1, -100]], [[1.5]], [[2**40]]):
        with pytest.raises(UsageError, match="mask out"):
            ours.decode(ids)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TokenizerError, match=r"'\[DEC\]' is not among"):
        ours.token_id("[DEC]")
    with pytest.raises(UsageError, match="'gpt'"):
        load_tokenizer(tmp_path, kind="gpt", max_length=77)  # pyright: ignore[reportArgumentType]


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerError, match=r"vocab\.json does not exist.*tokenizer\.json, or vocab\.json and merges"
    ):
        load_tokenizer(tmp_path, kind="clip", max_length=77)
    with pytest.raises(TokenizerError, match=r"vocab\.txt does not exist.*tokenizer\.json, or vocab\.txt"):
        load_tokenizer(tmp_path, kind="bert", max_length=77)
    write(tmp_path / "vocab.json", {"a": 0})
    with pytest.raises(TokenizerError, match=r"merges\.txt does not exist"):
        load_tokenizer(tmp_path, kind="clip", max_length=77)
    with pytest.raises(TokenizerError, match=r"Copy bpe_simple_vocab_16e6\.txt\.gz from"):
        clip_tokenizer_from_bpe(tmp_path / "bpe_simple_vocab_16e6.txt.gz")
    with pytest.raises(TokenizerError, match=r"Copy vocab\.txt of bert-base-uncased"):
        bert_tokenizer_from_vocab(tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", b'{"model": 3}', b'{"model": {"vocab": {}}}', b"\xff\xfe"]
)
def test_damaged_files_are_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(damage)
    for kind in ("clip", "bert"):
        with pytest.raises(TokenizerError, match=str(tmp_path)):
            load_tokenizer(tmp_path, kind=kind, max_length=77)
    (tmp_path / "bpe.txt.gz").write_bytes(damage)
    (tmp_path / "vocab.txt").write_bytes(damage)
    with pytest.raises(TokenizerError, match=r"bpe\.txt\.gz"):
        clip_tokenizer_from_bpe(tmp_path / "bpe.txt.gz")
    with pytest.raises(TokenizerError, match=r"vocab\.txt"):
        bert_tokenizer_from_vocab(tmp_path / "vocab.txt")


def test_files_of_another_family_or_checkpoint(bpe_file: Path, wordpiece_file: Path, tmp_path: Path) -> None:
    clip_tokenizer_from_bpe(bpe_file).save(tmp_path / "clip")
    bert_tokenizer_from_vocab(wordpiece_file).save(tmp_path / "bert")
    with pytest.raises(TokenizerError, match="of a bert tokenizer"):
        load_tokenizer(tmp_path / "clip", kind="bert", max_length=77)
    with pytest.raises(TokenizerError, match="of a clip tokenizer"):
        load_tokenizer(tmp_path / "bert", kind="clip", max_length=77)
    config = json.loads((tmp_path / "clip" / "tokenizer_config.json").read_text("utf-8"))
    write(tmp_path / "clip" / "tokenizer_config.json", {**config, "truncation_side": "left"})
    with pytest.raises(TokenizerError, match="truncation_side='left' is not supported"):
        load_tokenizer(tmp_path / "clip", kind="clip", max_length=77)
    config["added_tokens_decoder"]["999999"] = flags("<photo>", special=True)
    write(tmp_path / "clip" / "tokenizer_config.json", config)
    with pytest.raises(TokenizerError, match="'<photo>' should be token 999999"):
        load_tokenizer(tmp_path / "clip", kind="clip", max_length=77)


def test_original_file_in_a_folder_and_stated_length(bpe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "bpe_simple_vocab_16e6.txt.gz").write_bytes(bpe_file.read_bytes())
    ours = load_tokenizer(tmp_path, kind="clip", max_length=77)
    assert rows_of(ours, ["caf&eacute;"]) == rows_of(clip_tokenizer_from_bpe(bpe_file), ["café"])
    ours.save(tmp_path / "saved")
    # The hub's files with the original's rules, as open_clip reads them.
    config = tmp_path / "saved" / "tokenizer_config.json"
    settings = json.loads(config.read_text("utf-8"))
    write(config, {key: value for key, value in settings.items() if not key.startswith("sightloop")})
    texts = ["caf&eacute; &amp;lt;3", "caf\u00c3\u00a9", "\u201cA\u201d\u00a0b <|endoftext|>!<|endoftext|>"]
    by_hub, original = (
        load_tokenizer(config.parent, kind="clip", max_length=77, rules=rules) for rules in (None, "openai")
    )
    assert rows_of(original, texts) == rows_of(ours, texts) != rows_of(by_hub, texts)
    original.save(tmp_path / "again")
    assert rows_of(load_tokenizer(tmp_path / "again", kind="clip", max_length=77), texts) == rows_of(
        ours, texts
    )
    for limit, stated, wanted in [(77, 32, 32), (77, 1e30, 77), (16, 77, 16), (77, None, 77)]:
        path = tmp_path / "saved" / "tokenizer_config.json"
        write(path, {**json.loads(path.read_text("utf-8")), "model_max_length": stated})
        assert load_tokenizer(tmp_path / "saved", kind="clip", max_length=limit).max_length == wanted
