"""METEOR and SPICE: absent with a reason, or what the official program says; here a small program speaks for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from sightloop import SightloopError
from sightloop.metrics.captions import caption_scores, score_captions
from sightloop.metrics.meteor_spice import FOLDER_VARIABLE, meteor_spice_not_computed

# Speaks METEOR's protocol (a statistic a SCORE line, then every number and the corpus') and SPICE's files.
JAVA = """#!{python}
import json, sys
arguments = sys.argv[1:]
if "spice-1.0.jar" in arguments:
    samples = json.load(open(arguments[arguments.index("spice-1.0.jar") + 1], encoding="utf-8"))
    scores = [
        {{"image_id": s["image_id"], "scores": {{"All": {{"f": 0.25 * len(s["refs"])}}}}}} for s in reversed(samples)
    ]
    json.dump(scores, open(arguments[arguments.index("-out") + 1], "w"))
else:
    for line in sys.stdin.read().splitlines():
        word, *rest = line.split(" ||| ")
        if word == "SCORE":
            print(len(rest[-1].split()))
        else:
            numbers = [int(n) / 10 for n in rest]
            print(*numbers, sum(numbers), sep="\\n")
"""


@pytest.fixture
def jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "java").write_text(JAVA.format(python=sys.executable))
    (bin / "java").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "jars"
    names = ["meteor-1.5.jar", "data/paraphrase-en.gz", "spice-1.0.jar"]
    for name in [*names, "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_without_jars_there_is_a_reason_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert set(meteor_spice_not_computed()) == {"METEOR", "SPICE"}
    assert all(FOLDER_VARIABLE in reason for reason in meteor_spice_not_computed().values())
    assert {"METEOR", "SPICE"}.isdisjoint(caption_scores(["a"], [["a"]]))


def test_the_folders_of_the_coco_package_are_known(jars: Path, tmp_path: Path) -> None:
    package = tmp_path / "pycocoevalcap"
    package.mkdir()
    (package / "meteor").symlink_to(jars)
    assert "METEOR" not in meteor_spice_not_computed(package)
    assert "SPICE" in meteor_spice_not_computed(package)
    assert caption_scores(["a b"], [["a"]], jars=package)["METEOR"] == pytest.approx(0.2)


def test_a_missing_file_is_named(jars: Path) -> None:
    (jars / "data/paraphrase-en.gz").unlink()
    assert list(meteor_spice_not_computed(jars)) == ["METEOR"]
    assert "paraphrase-en.gz" in meteor_spice_not_computed(jars)["METEOR"]


def test_without_java_there_is_a_reason(jars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert all("no java" in reason for reason in meteor_spice_not_computed(jars).values())


def test_numbers_are_the_programs(jars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = score_captions(["A dog.", "two red cars"], [["a"], ["b", "c"]], jars=jars)
    np.testing.assert_allclose(scored.per_sample["METEOR"], [0.2, 0.3])
    assert scored.corpus["METEOR"] == pytest.approx(0.5)
    np.testing.assert_allclose(scored.per_sample["SPICE"], [0.25, 0.5])
    monkeypatch.setenv(FOLDER_VARIABLE, str(jars))
    assert meteor_spice_not_computed() == {}
    assert caption_scores(["a b"], [["a"]])["METEOR"] == pytest.approx(0.2)


def test_a_program_that_fails_is_quoted(jars: Path) -> None:
    java = jars.parent / "bin" / "java"
    java.write_text("#!/bin/sh\necho no memory >&2\nexit 3\n")
    with pytest.raises(SightloopError, match="java ended with 3: no memory"):
        caption_scores(["a"], [["a"]], jars=jars)
