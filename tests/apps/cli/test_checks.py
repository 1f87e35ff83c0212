"""Wrong paths, models, labels and options are reported before torch and a model are loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sightloop.apps.cli import common, main
from sightloop.checkpoints import catalog
from tests.apps.fake_model import FakeModel, make_image
from tests.rules import REPOSITORY

WRONG = {
    "caption gone": (1, "gone: no such file"),
    "caption photo": (1, "did you mean photos?"),
    "evaluate captions -d ./photoss": (2, "did you mean ./photos?"),
    "caption empty": (1, "empty: the folder and its subfolders have no image"),
    "caption https://a.b/c.jpg": (1, "https://a.b/c.jpg: a URL is not read"),
    "classify gone --labels a,b": (1, "gone"),
    "match gone.jpg text": (1, "gone.jpg"),
    "embed gone --out x.npy": (1, "gone"),
    "ask photos -q what? -m nowhere": (2, "nowhere"),
    "caption photos -m https://huggingface.co/Salesforce/blip-vqa-base": (2, "as Salesforce/blip-vqa-base"),
    "caption photos -m Salesforce/blip-image-captioning-bas": (2, "Did you mean"),
    "caption photos -m openai/clip-vit-base-patch32": (2, "cannot caption"),
    "caption photos --lora empty": (2, "--lora empty"),
    "caption photos --min-match 0.5 --judge openai/clip-vit-base-patch32": (2, "cannot match"),
    "classify photos --labels gone.txt": (2, "--labels gone.txt"),
    "detect photos": (2, "florence-community/Florence-2-base-ft"),
    "locate photos -p cat": (2, "florence-community/Florence-2-base-ft"),
    "segment photos -p cat": (2, "florence-community/Florence-2-base-ft"),
    "read photos": (2, "florence-community/Florence-2-base-ft"),
    "chat photos/a.jpg -m openai/clip-vit-base-patch32": (2, "llava-hf/llava-1.5-7b-hf"),
    "evaluate captions -d gone": (2, "--data gone"),
    "evaluate captions -d empty": (2, "--data empty"),
    "evaluate captions -d photos/*.zip": (2, "photos/*.zip"),
    "evaluate captions -d https://a.b/c.tar": (2, "https://a.b/c.tar"),
    "evaluate captions -d photos --predictions gone.jsonl": (2, "gone.jsonl"),
    "evaluate detect -d photos": (2, "cannot detect"),
    "train captioner -d gone -o run": (2, "--data gone"),
    "train captionr -d photos -o run": (2, "did you mean captioner"),
    "convert gone x.tar": (2, "gone"),
    "bootstrap gone -o out": (2, "gone"),
    "bootstrap photos": (2, "--out"),
    "bootstrap photos -o out --threshold 2": (2, "--threshold 2"),
    "bootstrap photos -o out --filter nowhere": (2, "nowhere"),
    "bootstrap photos -o photos/a.jpg": (2, "--out photos/a.jpg"),
    "caption text.jpg": (1, "text.jpg: not an image: it starts like text"),
    "ask text.jpg -q what?": (1, "text.jpg: not an image"),
    "classify photos": (2, "--labels"),
    "evaluate captions -d photos": (2, "no sample has what captions needs"),
    "evaluate captions -d photos -o photos/a.jpg": (2, "--out photos/a.jpg"),
    "evaluate captions -d photos -o photos/a.jpg/x": (2, "--out photos/a.jpg/x"),
    "evaluate classify -d classes --labels a,c": (2, "'b' is a label of the data"),
    "evaluate classify -d classes --templates x": (2, "templates='x'"),
    "evaluate classify -d classes/a": (2, "needs at least two labels"),
    "train captioner -d photos -o run --set wrong=1": (2, "--set wrong"),
    "train captioner -d photos -o run --set data.batch=x": (2, "data.batch"),
    "train captioner -d classes -o run": (2, "learns from captions"),
    "train captioner -d photos -o photos/a.jpg": (2, "--out photos/a.jpg"),
    "synthetic x.zip": (2, "must end in .tar"),
}
PROGRAM = """
import contextlib, io, json, sys
from sightloop.apps.cli.main import main
results = []
for line in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(line.split())
    results.append([status, err.getvalue(), "torch" in sys.modules])
print(json.dumps(results))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_image(tmp_path / "photos" / "a.jpg")
    (tmp_path / "empty" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_wrong_loads_torch(folder: Path) -> None:
    """One process for all, because each imports the command line; it ends before torch in every case."""
    (folder / "text.jpg").write_text("words")
    for name in "aabb":
        make_image(folder / "classes" / name / f"{len(list((folder / 'classes').rglob('*.jpg')))}.jpg")
    names = sorted(path.name for path in folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(WRONG)),
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for (line, (status, message)), (got, err, has_torch) in zip(
        WRONG.items(), json.loads(done.stdout), strict=True
    ):
        assert (got, has_torch) == (status, False), (line, err)
        assert message in err, line
        assert "Traceback" not in err, line
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_run_with_nothing_to_do_loads_no_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "photos" / "a.txt").write_text("by hand")
    monkeypatch.setattr(common, "load", lambda *_, **__: pytest.fail("a model is loaded"))
    assert main.main(["caption", "photos"]) == 0
    assert main.main(["caption", "photos", "gone"]) == 1


def test_what_is_skipped_for_another_reason_is_counted(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos" / "a.txt").write_text("by hand")
    assert main.main(["caption", "photos/a.jpg", "photos/a.txt"]) == 0
    assert "skipped: 1, such as photos/a.txt: it is the caption file of an image" in capsys.readouterr().err


def test_an_empty_folder_among_others_is_skipped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "load", lambda *_, **__: FakeModel())
    assert main.main(["classify", "photos", "empty", "--labels", "a,b", "-m", "M", "--verbose"]) == 0
    err = capsys.readouterr().err
    assert "skipped: empty: " in err
    assert "2 images: 1 done, 1 skipped, 0 failed" in err


def test_a_lora_adapter_reaches_the_loader(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "empty" / name).write_text("{}")
    options: dict[str, object] = {}

    def load(source: str, **given: object) -> FakeModel:
        options.update(given)
        return FakeModel()

    monkeypatch.setattr(common, "load", load)
    assert main.main("classify photos --labels a,b -m M --lora empty".split()) == 0
    assert options["lora"] == Path("empty")
    assert main.main("classify photos --labels a,b -m M --lora empty --quantize int8".split()) == 2
    assert "--lora empty and --quantize int8" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["detect", "locate", "segment", "read"])
def test_help_claims_no_default_that_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    bundled = catalog.find_entry(catalog.BUNDLED)
    assert bundled is not None
    assert command not in bundled.capabilities
    assert main.main([command, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Default: nano" not in text
    assert "required, because nano" in text
    assert catalog.recommended_for(command).name in text


def test_estimate_needs_no_output_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sightloop.capfilt import bootstrap
    from sightloop.capfilt.estimate import Estimate

    (folder / "photos" / "a.txt").write_text("a dog")
    made = Estimate(1, 1, 1, None, 2.0, 0.5, 100.0, {}, 0)
    monkeypatch.setattr(bootstrap, "estimate", lambda *_, **__: made)
    for out in ([], ["--out", "out"]):
        assert main.main(["bootstrap", "photos", "--estimate", *out]) == 0
        assert "1 images measured" in capsys.readouterr().err
    assert not (folder / "out").exists()
