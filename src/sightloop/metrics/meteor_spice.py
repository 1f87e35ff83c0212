"""METEOR and SPICE by their official Java programs, where somebody installed them; nothing stands in for them.

The folder holds what the official COCO evaluation ships, as the installed package `pycocoevalcap` does in its folders
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
_NEEDED = {
    "METEOR": ("meteor-1.5.jar", "data/paraphrase-en.gz"),
    "SPICE": ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"),
}


def meteor_spice_not_computed(folder: str | Path | None = None) -> dict[str, str]:
    """Why METEOR or SPICE cannot be computed here, by name; those that can are absent.

    folder: where the jars are; default the environment's SIGHTLOOP_CAPTION_JARS.
    """
    reasons: dict[str, str] = {}
    for name, files in _NEEDED.items():
        if (place := _folder(folder, name)) is None:
            reasons[name] = (
                f"no folder of its official jar is named ({FOLDER_VARIABLE}; pycocoevalcap brings it)"
            )
        elif missing := [file for file in files if not (place / file).is_file()]:
            reasons[name] = f"{place / missing[0]} is not there"
        elif shutil.which("java") is None:
            reasons[name] = "there is no java on this machine"
    return reasons


def meteor_spice_scores(
    hypotheses: list[str], references: list[list[str]], folder: str | Path | None = None
) -> dict[str, tuple[float, Floats]]:
    """(corpus score, scores [N]) of METEOR and SPICE, those that are installed; texts are tokens joined by spaces.

    SPICE of a sample without any proposition on either side is no number (NaN) and leaves the corpus' one so.
    Raises SightloopError with the program's own words where it fails.
    """
    reasons = meteor_spice_not_computed(folder)
    return {
        name: run(hypotheses, references, place)
        for name, run in (("METEOR", _meteor), ("SPICE", _spice))
        if name not in reasons and (place := _folder(folder, name)) is not None
    }


def _folder(folder: str | Path | None, name: str) -> Path | None:
    named = folder or os.environ.get(FOLDER_VARIABLE)
    if not named:
        return None
    place = Path(named).expanduser().resolve()
    own = place / name.lower()
    return own if own.is_dir() else place


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

    asked = [
        " ||| ".join(["SCORE", *texts, clean(text)])
        for text, texts in zip(hypotheses, references, strict=True)
    ]
    statistics = _answers(command, asked, folder)[: len(asked)]
    numbers = _answers(command, [" ||| ".join(["EVAL", *statistics])], folder)
    if len(numbers) != len(asked) + 1:
        raise SightloopError(
            f"METEOR: {len(numbers)} numbers for {len(asked)} samples; are the jar and its data whole?"
        )
    scores = np.array([float(number) for number in numbers])
    return float(scores[-1]), scores[:-1]


def _answers(command: list[str], lines: list[str], folder: Path) -> list[str]:
    text = "".join(f"{line}\n" for line in lines)
    return _run(command, folder, text).splitlines()


def _spice(hypotheses: list[str], references: list[list[str]], folder: Path) -> tuple[float, Floats]:
    samples = [
        {"image_id": index, "test": text, "refs": texts}
        for index, (text, texts) in enumerate(zip(hypotheses, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as own:
        asked, answered = Path(own, "samples.json"), Path(own, "scores.json")
        asked.write_text(json.dumps(samples), "utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-jar", "-Xmx8G", "spice-1.0.jar", str(asked)]
        _run([*command, "-out", str(answered), "-subset", "-silent"], folder)
        answers = json.loads(answered.read_text("utf-8"))
    scores = np.full(len(samples), np.nan)
    for answer in answers:
        value = answer["scores"]["All"]["f"]
        scores[int(answer["image_id"])] = np.nan if value is None else float(value)
    return float(scores.mean()), scores


def _run(command: list[str], folder: Path, text: str = "") -> str:
    done = subprocess.run(command, cwd=folder, input=text, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise SightloopError(f"{command[4]}: java ended with {done.returncode}: {said}")
    return done.stdout
