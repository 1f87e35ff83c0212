"""COCO's tokens: equal to those of the official Java tokenizer, kept in ptb_tokens.json, and run beside it where it is.

The file holds captions written for this test and captions drawn at random from awkward pieces, with the tokens that
`PTBTokenizer` of the official code gave for each.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightloop.metrics.ptb_tokenizer import ptb_tokenize, ptb_tokens
from tests.rules import REPOSITORY

KNOWN = json.loads(Path(__file__).with_name("ptb_tokens.json").read_text("utf-8"))
REAL = REPOSITORY.parent / "shared" / "data" / "flickr8k"
JAR = "stanford-corenlp-3.4.1.jar"
REMOVED = "'' ' `` ` . ? ! , : - -- ... ;".split()


@pytest.mark.parametrize("part", ["written", "generated"])
def test_the_tokens_are_those_of_the_official_tokenizer(part: str) -> None:
    captions = [caption for caption, _ in KNOWN[part]]
    assert len(captions) > 50
    different = [
        (caption, expected, ours)
        for (caption, expected), ours in zip(KNOWN[part], ptb_tokenize(captions), strict=True)
        if ours != expected
    ]
    assert different == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog can't.", ["a", "dog", "ca", "n't", "."]),
        ("Mr. X left.", ["mr.", "x", "left", "."]),
        ("1 1/2 cups", ["1\u00a01/2", "cups"]),
        ("(so) [it] {is}", "-lrb- so -rrb- -lsb- it -rsb- -lcb- is -rcb-".split()),
        ('"a"', ["``", "a", "''"]),
        ("a \U0001f436 b", ["a", "b"]),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_single_tokens(text: str, expected: list[str]) -> None:
    assert ptb_tokens(text) == expected


@given(st.lists(st.text(max_size=20), max_size=4), st.text(max_size=20))
def test_a_caption_is_read_alone(others: list[str], caption: str) -> None:
    assert ptb_tokenize([*others, caption])[-1] == ptb_tokenize([caption])[0]


@given(st.text("aB .,'-$1\"()\u2019\u00e9&;:/", max_size=30))
def test_nothing_but_spaces_is_lost_or_made_up(text: str) -> None:
    # Marks may be written as others (quotes, brackets), so letters and digits are compared.
    kept = "".join(ptb_tokens(text)).replace("-lrb-", "").replace("-rrb-", "")
    assert [c for c in kept if c.isalnum()] == [c for c in text.lower() if c.isalnum()]


@given(
    st.lists(st.sampled_from(["dog", "No", "cannot", "a", "Mr", "it", ",", "x"]), max_size=6), st.booleans()
)
def test_the_short_cut_for_plain_captions_changes_nothing(words: list[str], stop: bool) -> None:
    plain = " ".join(words) + ("." if stop else "")
    # A trailing tab keeps the caption off the short cut.
    assert ptb_tokens(plain) == ptb_tokens(plain + "\t")


def official_folder() -> Path:
    found = importlib.util.find_spec("pycocoevalcap")
    if found is None or not found.submodule_search_locations:
        pytest.skip("pycocoevalcap, which holds the official tokenizer, is not installed")
    folder = Path(found.submodule_search_locations[0]) / "tokenizer"
    if shutil.which("java") is None or not (folder / JAR).is_file():
        pytest.skip("the official tokenizer needs java and its jar")
    return folder


def test_real_captions_have_the_official_tokens(tmp_path: Path) -> None:
    folder = official_folder()
    if not REAL.is_dir():
        pytest.skip(f"the captions are not at {REAL}")
    captions: list[str] = []
    for path in sorted(REAL.glob("dev-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json") and (file := tar.extractfile(member)):
                    captions += json.load(file)["captions"]
    text = tmp_path / "captions.txt"
    text.write_text("\n".join(caption.replace("\n", " ") for caption in captions), "utf-8")
    command = ["java", "-cp", JAR, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    run = subprocess.run([*command, text], cwd=folder, capture_output=True, check=True)
    lines = run.stdout.decode().split("\n")[: len(captions)]
    official = [" ".join(w for w in line.rstrip().split(" ") if w not in REMOVED) for line in lines]
    equal = sum(a == b for a, b in zip(official, ptb_tokenize(captions), strict=True))
    assert equal / len(captions) >= 0.999
