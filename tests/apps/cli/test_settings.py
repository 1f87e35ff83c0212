"""Defaults from the environment and from sightloop.toml, how much is printed, and completion scripts."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

from sightloop.apps.cli import common, main
from tests.apps.fake_model import FakeModel, make_image


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(common, "load", lambda source, **_: fake)
    make_image(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    return fake


def run(line: str) -> int:
    return main.main(line.split())


def rows(capsys: pytest.CaptureFixture[str]) -> int:
    return len(capsys.readouterr().out.splitlines())


def test_precedence(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sightloop.toml").write_text(
        'model = "M"\nbatch-size = 3\n[classify]\nlabels = "a,b,c,d"\ntop = 1\n[caption]\nnum-beams = 2\n'
    )
    assert run("classify photos") == 0
    assert rows(capsys) == 1
    assert model.batch_size == 3
    (tmp_path / "photos" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "photos" / "below")  # the file is above
    monkeypatch.setenv("SIGHTLOOP_TOP", "3")
    assert run("classify ../a.jpg") == 0
    assert rows(capsys) == 3
    monkeypatch.setenv("SIGHTLOOP_CLASSIFY_TOP", "2")
    assert run("classify ../a.jpg") == 0
    assert rows(capsys) == 2
    assert run("classify ../a.jpg --top 4") == 0
    assert rows(capsys) == 4
    assert run("caption ../a.jpg") == 0
    assert model.calls[-1][-1] == {"num_beams": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[clasify]\ntop = 1", "[clasify]: no such command"),
        ("[classify]\ntopp = 1", "topp"),
        ("top = 1", "top: not an option of all commands"),
        ("[classify", "not a TOML file"),
        ('workers = "many"', "workers"),
        ("\x00", "not a TOML file"),
    ],
)
def test_a_wrong_file_is_named(
    model: FakeModel, tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sightloop.toml").write_text(text)
    assert run("classify photos --labels a,b -m M") == 2
    err = capsys.readouterr().err
    assert message in err
    assert "workers" in text or "sightloop.toml" in err
    assert model.calls == []


def test_a_file_that_the_environment_names(
    model: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sightloop.toml").write_text("[classify]\ntop = 1")
    monkeypatch.setenv("SIGHTLOOP_CONFIG", "other.toml")
    assert run("classify photos --labels a,b -m M") == 2
    assert "SIGHTLOOP_CONFIG=other.toml" in capsys.readouterr().err
    (tmp_path / "other.toml").write_text('[classify]\nlabels = "a,b"')
    assert run("classify photos -m M") == 0
    assert rows(capsys) == 2


def test_quiet_leaves_failures(model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("classify photos --labels a,b --quiet") == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "photos" / "b.jpg").write_bytes(b"nothing")
    assert run("classify photos --labels a,b --quiet") == 1
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["failed", "2 images"]
    assert run("classify photos --labels a,b --quiet --verbose") == 2


def test_verbose_shows_skipped_images_and_tracebacks(
    model: FakeModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "a.txt").write_text("by hand")
    assert run("caption photos -m M --verbose") == 0
    assert "skipped: photos/a.jpg: it has a caption already" in capsys.readouterr().err
    assert run("caption photos -m M --drop-if [ --verbose") == 2
    assert "Traceback" in capsys.readouterr().err
    assert run("caption photos -m M --drop-if [") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_warning_is_printed_once_for_all_batches(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(3):
        make_image(Path(f"photos/{i}.jpg"))
    original, batches = model.answer, iter(range(9))

    def answer(images, questions, candidates=None, **decoding):
        text = f"{next(batches)} of 9 texts have more than 77 tokens: {questions[0] * 9!r}..."
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(text, UserWarning, stacklevel=1)
        return original(images, questions, candidates, **decoding)

    monkeypatch.setattr(model, "answer", answer)
    assert run("ask photos -q what? -m M --batch-size 1 --quiet") == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: 0 of 9 texts")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"completion {shell}") == 0
    script = capsys.readouterr().out
    for name in main.app:
        assert name.lstrip("-") in script
    for option in ("num-beams", "lora", "quiet"):
        assert option in script
    if path := shutil.which(shell):
        assert subprocess.run([path, "-n"], input=script, text=True, check=False).returncode == 0


def test_completion_of_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("completion tcsh") == 2
    assert "tcsh" in capsys.readouterr().err
