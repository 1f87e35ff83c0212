from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sightloop.annotation.captioning import Caption, CaptionTable
from sightloop.data.datasets.schema import portable_name
from sightloop.errors import SightloopError, UsageError
from sightloop.types import Skipped


def rows(path: Path) -> list[dict]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run(
    path: Path, names: list[str], stop: int | None = None, mode="skip", tag="", settings=None
) -> list[str]:
    """One run over `names`; returns those that were captioned. With `stop`, it ends unfinished after so many inputs."""
    table = CaptionTable(path, mode, settings)
    captioned = []
    for name in names[:stop]:
        if table.check(name) is None:
            captioned.append(name)
            table.add(name, Caption(f"{tag}{name}"))
            table.commit()
        else:
            table.note_skipped(name)
    if stop is None:
        table.finish()
    table.close()
    return captioned


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_rows_come_in_the_order_of_the_inputs(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c{ending}"
    names = ["b", 'a, "quoted"', "new\nline", "é"]
    assert run(path, names) == names
    assert rows(path) == [{"name": name, "caption": name} for name in names]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    before = path.stat()
    assert run(path, names) == []
    assert path.stat() == before  # untouched where nothing is new


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
@pytest.mark.parametrize("torn", [b"", b'{"name": "c", "ro', b"\xff"])
def test_a_run_resumes_from_the_journal(tmp_path: Path, ending: str, torn: bytes) -> None:
    path = tmp_path / f"c{ending}"
    names = list("abcdef")
    assert run(path, names, stop=2) == ["a", "b"]
    assert not path.exists()
    with (tmp_path / f"c{ending}.partial").open("ab") as file:
        file.write(torn)
    assert run(path, ["x", *names], stop=5) == ["x", "c", "d"]
    assert run(path, ["x", *names]) == ["e", "f"]
    assert [row["name"] for row in rows(path)] == ["x", *names]


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_rows_of_an_older_file_stay_as_they_are(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c{ending}"
    old = [{"name": n, "caption": f"hand {n}", "note": "x"} for n in ["b", "elsewhere", "b"]]
    old[2]["caption"] = "second of b"
    if ending == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, ["name", "caption", "note"])
            table.writeheader()
            table.writerows(old)
    else:
        path.write_text("".join(json.dumps(row) + "\n\n" for row in old))
    assert run(path, ["a", "b", "c"], stop=1) == ["a"]
    assert run(path, ["a", "b", "c"]) == ["c"]
    assert [row["caption"] for row in rows(path)] == ["hand elsewhere", "a", "hand b", "second of b", "c"]
    assert [row.get("note") for row in rows(path)][2] == "x"


def test_overwrite_resumes_only_a_run_with_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    run(path, ["a", "b"])
    assert run(path, ["b", "a"], mode="overwrite", tag="2", settings={"prompt": "x"}, stop=1) == ["b"]
    assert [row["caption"] for row in rows(path)] == ["a", "b"]
    assert run(path, ["b", "a"], mode="overwrite", tag="3", settings={"prompt": "y"}, stop=1) == ["b"]
    assert run(path, ["b", "a"], mode="overwrite", tag="4", settings={"prompt": "y"}) == ["a"]
    assert [row["caption"] for row in rows(path)] == ["3b", "4a"]


def test_dropped_captions_are_remembered_but_left_out(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    table = CaptionTable(path)
    table.add("a", Caption("a a a a", "looping", "it loops"))
    table.add("b", Caption("b", score=0.25))
    table.close()
    table = CaptionTable(path)
    assert isinstance(table.check("a"), Skipped)
    for name in "ab":
        table.note_skipped(name)
    table.finish()
    assert rows(path) == [{"name": "b", "caption": "b", "match": 0.25}]


def test_a_file_changed_during_the_run_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    run(path, ["a"])
    table = CaptionTable(path)
    table.add("b", Caption("b"))
    path.write_text('{"name": "a", "caption": "edited by hand"}\n')
    with pytest.raises(SightloopError, match="changed during the run"):
        table.finish()
    table.close()
    assert run(path, ["a", "b"]) == []
    assert [row["caption"] for row in rows(path)] == ["edited by hand", "b"]


def test_unwritable_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    for name in ("c.json", "c", "d.jsonl", "gone/c.jsonl"):
        with pytest.raises(UsageError, match="--out"):
            CaptionTable(tmp_path / name)
    (tmp_path / "bad.jsonl").write_text('{"name": "a"}\nnot json\n')
    with pytest.raises(UsageError, match="line 2"):
        CaptionTable(tmp_path / "bad.jsonl")
    (tmp_path / "bad.csv").write_text("title,caption\nx,y\n")
    with pytest.raises(UsageError, match="row 2"):
        CaptionTable(tmp_path / "bad.csv")
    (tmp_path / "e.jsonl.partial").write_text("a person's own file\n")
    with pytest.raises(UsageError, match="not the journal"):
        CaptionTable(tmp_path / "e.jsonl")
    assert (tmp_path / "e.jsonl.partial").read_text() == "a person's own file\n"


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    table = CaptionTable(tmp_path / "c.jsonl")
    with pytest.raises(UsageError, match="another run"):
        CaptionTable(tmp_path / "c.jsonl")
    table.close()


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for ending in (".csv", ".jsonl"):
        path = tmp_path / f"c{ending}"
        run(path, ["a\udcff.jpg"])
        assert rows(path)[0]["name"] == "a\\xff.jpg"
        assert run(path, ["a\udcff.jpg"]) == []
    assert portable_name("plain é") == "plain é"
