"""A recipe, data and a folder that do not fit are refused before a model is loaded, with the setting and the counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sightloop.apps.cli import main
from sightloop.data.datasets.dataset import open_dataset
from sightloop.errors import SightloopError, UsageError
from sightloop.training import build, checkpoint, trainer
from sightloop.training.config import apply_settings, from_json, to_json
from sightloop.training.events import WarningRaised
from sightloop.training.recipes import RECIPES, find_recipe
from sightloop.training.requirements import check_data, check_folder, check_training
from sightloop.training.trainer import train

SMALL = ("model.size=world", "model.vocab_size=300", "model.init_from=", "schedule.warmup_steps=0", "steps=3")


def write_images(folder: Path, *annotations: dict[str, Any]) -> Path:
    """A folder of small images, each with these annotations as its sidecar; a string "class" is its subfolder."""
    for index, fields in enumerate(annotations):
        path = folder / str(fields.pop("class", "")) / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), index * 9, np.uint8)).save(path)
        if fields:
            path.with_suffix(".json").write_text(json.dumps(fields))
    return folder


CAPTIONED = [{"captions": [f"number {i}"]} for i in range(6)]
ASKED = [{"qa": [{"question": f"which {i}?", "answer": "it"}]} for i in range(6)]


@pytest.mark.parametrize(
    ("recipe", "annotations", "field", "count"),
    [
        ("captioner", [{}] * 5, "terms.lm", "5 samples: 0 with a caption"),
        ("captioner", ASKED, "terms.lm", "6 with a question"),
        ("vqa", CAPTIONED, "terms.vqa", "0 with a question"),
        ("retrieval", [{"class": "a"}, {"class": "b"}], "terms.itc", "2 with a label"),
        ("clip_pretrain", [{"captions": ["one"]}] * 3, "terms.clip", "3 with a caption"),
        ("classify", CAPTIONED, "terms.classes", "0 with a label"),
        ("classify", [{"class": "a"}] * 3, "terms.classes", "samples"),
        ("florence_detect", CAPTIONED, "terms.prompted", "0 with a labeled region"),
        ("masked_pretrain", [], "", ""),
    ],
)
def test_data_without_what_a_recipe_learns_from(
    recipe: str,
    annotations: list[Any],
    field: str,
    count: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    data = write_images(tmp_path / "data", *map(dict, annotations))
    if not annotations:
        pytest.skip("MIM learns from images alone")
    with pytest.raises(UsageError) as error:
        list(train(recipe, str(data), tmp_path / "run", settings=["schedule.warmup_steps=0"]))
    assert field in str(error.value)
    assert count in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_within_its_warm_up(tmp_path: Path) -> None:
    data = open_dataset(write_images(tmp_path, *CAPTIONED))
    with pytest.raises(UsageError, match=r"schedule\.warmup_steps=10: the run has 1 step .*data\.batch"):
        check_data(RECIPES["captioner"], data, "data")
    (warning,) = check_data(apply_settings(RECIPES["captioner"], ["steps=10"]), data, "data")
    assert "schedule.warmup_steps=10" in warning
    assert check_data(apply_settings(RECIPES["captioner"], ["steps=11"]), data, "data") == []


def test_samples_without_what_a_term_needs_are_counted(tmp_path: Path) -> None:
    data = open_dataset(write_images(tmp_path, *CAPTIONED[:4], *ASKED[:2]))
    warnings = check_data(apply_settings(RECIPES["world"], ["schedule.warmup_steps=0"]), data, "data")
    assert [text.split(":")[0] for text in warnings] == [
        "2 of 6 samples have no caption",
        "4 of 6 samples have no question",
    ]
    absent = check_data(apply_settings(RECIPES["world"], ["steps=500"]), data.select(range(4)), "data")
    assert "terms.vqa" in absent[0]


def test_the_command_refuses_without_importing_torch(tmp_path: Path) -> None:
    write_images(tmp_path / "data", *CAPTIONED)
    code = (
        "import sys; from sightloop.apps.cli.main import main; status = main(sys.argv[1:]);"
        "print(status, 'torch' in sys.modules)"
    )
    for recipe, settings in (("vqa", []), ("captionr", []), ("captioner", ["--set", "data.bach=2"])):
        command = [
            "train",
            recipe,
            "--data",
            str(tmp_path / "data"),
            "--out",
            str(tmp_path / "run"),
            *settings,
        ]
        result = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
        )
        assert result.stdout.split() == ["2", "False"]
        assert len(result.stderr.splitlines()) == 1


def test_a_changed_recipe_names_the_settings(tmp_path: Path) -> None:
    data = open_dataset(write_images(tmp_path / "data", *CAPTIONED))
    run = tmp_path / "run"
    run.mkdir()
    recipe = RECIPES["captioner"]
    (run / "recipe.json").write_text(json.dumps({"recipe": to_json(recipe), "data": data.fingerprint}))
    check_folder(
        run, apply_settings(recipe, ["evaluation.data=x", "data.micro_batch=4", "keep_last=5"]), data
    )
    with pytest.raises(UsageError, match=r"data\.batch: 32, now 8; .*epochs: 5\.0, now 1\.0"):
        check_folder(run, apply_settings(recipe, ["data.batch=8", "epochs=1"]), data)
    with pytest.raises(UsageError, match="other data"):
        check_folder(run, recipe, data.select(range(3)))
    assert find_recipe(str(run / "recipe.json")) == recipe


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(st.sampled_from(sorted(to_json(RECIPES["nano"]))), json_values)
def test_settings_of_wrong_types_are_usage_errors(name: str, value: Any) -> None:
    try:
        recipe = from_json(to_json(RECIPES["nano"]) | {name: value})
    except UsageError:
        return
    assert from_json(to_json(recipe)) == recipe


@given(json_values)
def test_any_recipe_file_is_a_run_or_an_error(value: Any) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.json"
        for record in (
            value,
            {"recipe": value, "data": "x"},
            {"recipe": to_json(RECIPES["nano"]), "data": value},
        ):
            path.write_text(json.dumps(record))
            with pytest.raises(UsageError, match=r"recipe\.json|other data"):
                check_folder(Path(folder), RECIPES["captioner"], open_dataset(_one(Path(folder))))


def _one(folder: Path) -> Path:
    return write_images(folder / "data", {})


def test_missing_settings_are_named() -> None:
    with pytest.raises(UsageError, match="terms: this setting is missing"):
        from_json({"name": "x"})


@pytest.mark.parametrize("term", ["itc", "itm", "lm", "vqa", "clip", "siglip", "mlm", "mim"])
def test_a_term_that_is_missing_in_a_batch_ends_nothing(
    term: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of twelve samples have annotations, so many batches of four have none."""
    fields = {"captions": ["number one"], "qa": [{"question": "which?", "answer": "it"}]}
    other = {"captions": ["number two"], "qa": [{"question": "which?", "answer": "no"}]}
    data = write_images(tmp_path / "data", fields, *[{} for _ in range(10)], other)
    size = {"clip": "world-clip", "siglip": "world-siglip"}.get(term, "world")
    terms = json.dumps({term: 1.0})
    command = ["train", "world", "--data", str(data), "--out", str(tmp_path / "run"), "--set"]
    settings = [f"terms={terms}", f"model.size={size}", "data.batch=4", "steps=12", "model.vocab_size=300"]
    assert main.main([*command, *settings, "schedule.warmup_steps=0", "data.augment=null"]) == 0
    assert (tmp_path / "run" / "model").is_dir()
    assert "Finished 12 steps" in capsys.readouterr().out


def test_a_run_on_damaged_images_alone_is_an_error(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", *map(dict, CAPTIONED))
    for path in data.glob("*.png"):
        path.write_bytes(b"no image")
    events: list[Any] = []
    with pytest.raises(SightloopError, match="6 of 6 samples cannot be used"):
        events += train(
            "captioner", str(data), tmp_path / "run", settings=[*SMALL, "data.batch=2"], device="cpu"
        )
    assert not (tmp_path / "run" / "model").exists()


def test_cut_texts_are_counted(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", {"captions": ["one two three " * 9]}, *map(dict, CAPTIONED[:3]))
    events = train(
        "captioner", str(data), tmp_path / "run", settings=[*SMALL, "data.max_tokens=12"], device="cpu"
    )
    warnings = [event.text for event in events if isinstance(event, WarningRaised)]
    assert len(warnings) == 1
    assert warnings[0].startswith("data.max_tokens=12: 1 of 4 captions (25.0%)")


@pytest.mark.parametrize("target", ["save", "checkpoint"])
def test_a_full_disk_is_one_line(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((trainer, "save") if target == "save" else (checkpoint, "save_checkpoint")), full)
    data = write_images(tmp_path / "data", *map(dict, CAPTIONED))
    with pytest.raises(
        SightloopError, match=r"run: cannot be written in step \d \(no space left on device\); free"
    ):
        list(train("captioner", str(data), tmp_path / "run", settings=SMALL, device="cpu"))
    monkeypatch.undo()
    list(train("captioner", str(data), tmp_path / "run", settings=SMALL, device="cpu"))
    assert (tmp_path / "run" / "model").is_dir()


def test_a_lack_of_memory_names_a_smaller_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*arguments: object) -> None:
        torch.empty(1 << 60)

    monkeypatch.setattr(trainer, "take_step", allocate)
    data = write_images(tmp_path / "data", *map(dict, CAPTIONED))
    with pytest.raises(SightloopError, match=r"out of memory in step 1: .*data\.micro_batch=16") as error:
        list(train("captioner", str(data), tmp_path / "run", settings=SMALL, device="cpu"))
    assert "\n" not in str(error.value)


def test_check_training_passes_what_fits(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", *map(dict, CAPTIONED))
    check_training("captioner", [str(data)], tmp_path / "run", ["steps=20"])
    assert not (tmp_path / "run").exists()
