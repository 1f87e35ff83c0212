from __future__ import annotations

from pathlib import Path

import pytest

from sightread.apps import cli, demo
from sightread.errors import CheckpointError
from tests.apps.fake_model import FakeModel, make_picture


def test_the_demo_works_on_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    fake = FakeModel()
    monkeypatch.setattr(cli, "load", lambda source, *, device, dtype: fake)
    make_picture(tmp_path / "a.jpg")
    make_picture(tmp_path / "sub/b.png")
    assert demo.main(["--model", "M", "--photos", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "photos/a.jpg\ta picture of a" in out
    assert "$ sightread caption photos -m M" in out
    assert "2 pictures: 0 done, 2 skipped" in err
    assert not list(tmp_path.rglob("*.txt"))


def test_what_is_missing_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert demo.main(["--photos", str(tmp_path)]) == 2
    assert "make demo PHOTOS=folder" in capsys.readouterr().err

    def load(source, *, device, dtype):
        raise CheckpointError(f"{source}: the hub cannot be reached.")

    monkeypatch.setattr(cli, "load", load)
    make_picture(tmp_path / "a.jpg")
    assert demo.main(["--photos", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "the hub cannot be reached" in err
    assert "make demo MODEL=" in err
    assert demo.main(["--count", "0"]) == 2
