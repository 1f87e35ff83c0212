"""METEOR and SPICE by their official Java programs, where those are installed; there is no substitute for them.

The folder of jars holds what the official COCO evaluation ships, as the package `pycocoevalcap` does in its folders
`meteor` and `spice`: `meteor-1.5.jar` with `data/paraphrase-en.gz`, and `spice-1.0.jar` with `lib/` and the two CoreNLP
3.6.0 jars that its script fetches into it. Both need `java`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from sightloop.errors import SightloopError
from sightloop.types import Floats

FOLDER_VARIABLE = "SIGHTLOOP_CAPTION_JARS"
_REQUIRED_FILES = {
    "METEOR": ("meteor-1.5.jar", "data/paraphrase-en.gz"),
    "SPICE": ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"),
}


def meteor_spice_not_computed(folder: str | Path | None = None) -> dict[str, str]:
    """The reasons why METEOR or SPICE cannot be computed here, by name; those that can be are absent.

    Args:
        folder: folder of the jars; default the environment variable SIGHTLOOP_CAPTION_JARS.
    """
    reasons: dict[str, str] = {}
    for name, files in _REQUIRED_FILES.items():
        if (jar_folder := _jar_folder(folder, name)) is None:
            reasons[name] = f"set {FOLDER_VARIABLE} to the folder of its official jar (pycocoevalcap has it)"
        elif missing := [file for file in files if not (jar_folder / file).is_file()]:
            reasons[name] = f"{jar_folder / missing[0]} does not exist"
        elif shutil.which("java") is None:
            reasons[name] = "there is no java on this machine"
    return reasons


def meteor_spice_scores(
    hypotheses: list[str], references: list[list[str]], folder: str | Path | None = None
) -> dict[str, tuple[float, Floats]]:
    """METEOR and SPICE, those that are installed.

    Args:
        hypotheses: N texts, tokens joined by spaces.
        references: the reference texts of each.
        folder: folder of the jars; default the environment variable SIGHTLOOP_CAPTION_JARS.

    Returns:
        by name: corpus score and scores `[N]`. SPICE of a sample without any proposition on either side is NaN, and so
        is then the corpus score.

    Raises:
        SightloopError: the program fails; the message ends with its error output.
    """
    reasons = meteor_spice_not_computed(folder)
    return {
        name: run(hypotheses, references, jar_folder)
        for name, run in (("METEOR", _meteor), ("SPICE", _spice))
        if name not in reasons and (jar_folder := _jar_folder(folder, name)) is not None
    }


def _jar_folder(folder: str | Path | None, name: str) -> Path | None:
    """The folder itself, or its subfolder `meteor` or `spice`, as in pycocoevalcap."""
    root = folder or os.environ.get(FOLDER_VARIABLE)
    if not root:
        return None
    path = Path(root).expanduser().resolve()
    subfolder = path / name.lower()
    return subfolder if subfolder.is_dir() else path


def _meteor(hypotheses: list[str], references: list[list[str]], folder: Path) -> tuple[float, Floats]:
    command = [
        "java",
        "-Dfile.encoding=UTF-8",
        "-jar",
        "-Xmx2G",
        "meteor-1.5.jar",
        "-",
        "-",
        "-stdio",
        "-l",
        "en",
        "-norm",
    ]

    def clean(text: str) -> str:
        return text.replace("|||", "").replace("  ", " ")

    # "SCORE ||| reference ||| ... ||| hypothesis" -> one line of statistics per sample;
    # "EVAL ||| statistics ||| ..." -> the score of each sample, then that of the corpus.
    requests = [
        " ||| ".join(["SCORE", *texts, clean(text)])
        for text, texts in zip(hypotheses, references, strict=True)
    ]
    statistics = _exchange_lines(command, requests, folder)[: len(requests)]
    numbers = _exchange_lines(command, [" ||| ".join(["EVAL", *statistics])], folder)
    if len(numbers) != len(requests) + 1:
        raise SightloopError(
            f"METEOR: {len(numbers)} numbers for {len(requests)} samples; are the jar and its data complete?"
        )
    scores = np.array([float(number) for number in numbers])
    return float(scores[-1]), scores[:-1]


def _exchange_lines(command: list[str], lines: list[str], folder: Path) -> list[str]:
    text = "".join(f"{line}\n" for line in lines)
    return _run(command, folder, text).splitlines()


def _spice(hypotheses: list[str], references: list[list[str]], folder: Path) -> tuple[float, Floats]:
    samples = [
        {"image_id": index, "test": text, "refs": texts}
        for index, (text, texts) in enumerate(zip(hypotheses, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        request_file, result_file = Path(temporary, "samples.json"), Path(temporary, "scores.json")
        request_file.write_text(json.dumps(samples), "utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-jar", "-Xmx8G", "spice-1.0.jar", str(request_file)]
        _run([*command, "-out", str(result_file), "-subset", "-silent"], folder)
        results = json.loads(result_file.read_text("utf-8"))
    scores = np.full(len(samples), np.nan)
    for result in results:
        value = result["scores"]["All"]["f"]
        scores[int(result["image_id"])] = np.nan if value is None else float(value)
    return float(scores.mean()), scores


def _run(command: list[str], folder: Path, text: str = "") -> str:
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        last_lines = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise SightloopError(f"{command[4]}: java ended with {done.returncode}: {last_lines}")
    return done.stdout
