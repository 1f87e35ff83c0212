"""Delimited text: what is read, and what is named because it cannot be."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sightloop.data.datasets.dataset import open_dataset
from sightloop.errors import ImageError, UsageError
from tests.data.datasets.sources import make_image, put

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda text: text[0] not in "[{" and text.strip() == text
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    delimiter=st.sampled_from(",;|\t"),
    encoding=st.sampled_from(("utf-8", "utf-8-sig", "utf-16")),
)
def test_every_delimiter_and_encoding_is_read(
    texts: list[str], delimiter: str, encoding: str, tmp_path: Path
) -> None:
    put(tmp_path / "a.jpg", make_image())
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter).writerows([["file name", "image", "caption"]])
    csv.writer(file, delimiter=delimiter).writerows([["x", "a.jpg", text] for text in texts])
    put(tmp_path / "t.csv", file.getvalue().encode(encoding))
    (sample,) = open_dataset(tmp_path / "t.csv")
    # The csv module does not tell the line ends inside of quotation marks apart.
    assert [text.split() for text in sample.captions] == [text.split() for text in texts]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.lists(st.sampled_from(["a.jpg", "b c", 'say "x"', '"open', "", "d"]), min_size=1), max_size=6
    )
)
def test_no_cell_vanishes(rows: list[list[str]], tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image())
    put(tmp_path / "t.csv", "image,caption\na.jpg,first\n" + "".join(",".join(row) + "\n" for row in rows))
    failed: list[str] = []
    samples = list(open_dataset(tmp_path / "t.csv").stream(lambda key, reason: failed.append(key)))
    kept = "\n".join(caption for sample in samples for caption in sample.captions)
    for row in rows:
        for cell in row[1:]:
            assert not cell or failed or cell.replace('"', "") in kept.replace('"', "")


def test_surplus_cells_and_open_quotation_marks_are_named(tmp_path: Path) -> None:
    for name in "abc":
        put(tmp_path / f"{name}.jpg", make_image())
    put(tmp_path / "t.csv", 'image,caption\na.jpg,1girl, red hair\nb.jpg,"open\nc.jpg,fine\na.jpg,ok,,\n')
    failed: dict[str, str] = {}
    samples = list(open_dataset(tmp_path / "t.csv").stream(failed.__setitem__))
    assert {sample.key: sample.captions for sample in samples} == {"c": ("fine",), "a": ("ok",)}
    assert "3 cells under 2 columns" in failed["t.csv row 1"]
    assert "quotation mark" in failed["t.csv row 2"]


def test_a_deep_cell_stops_nothing(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image())
    deep = "[" * 50_000
    put(tmp_path / "t.csv", f"image,caption,regions\na.jpg,one,\na.jpg,two,{deep}\n")
    with pytest.raises(ImageError, match="regions"):
        open_dataset(tmp_path / "t.csv")[0]


def test_repeated_columns_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image())
    put(tmp_path / "t.csv", "image,caption,caption\na.jpg,one,two\n")
    table = pa.Table.from_arrays(
        [pa.array(["a.jpg"]), pa.array(["x"]), pa.array(["y"])], ["image", "text", "text"]
    )
    pq.write_table(table, tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        with pytest.raises(UsageError, match=f"{name}: several columns are named"):
            open_dataset(tmp_path / name)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("", r"images\a b.jpg"),
        ("", quote("images/a b.jpg")),
        ("lists", "images/a b.jpg"),
        ("", "file://{}/a b.jpg"),
    ],
)
def test_paths_of_other_programs(folder: str, name: str, tmp_path: Path) -> None:
    put(tmp_path / "images/a b.jpg", make_image())
    name = name.format(tmp_path / "images")
    put(tmp_path / folder / "t.csv", f"image,caption\n{name},one\n")
    if not name.startswith("file:"):
        assert open_dataset(tmp_path / folder / "t.csv")[0].captions == ("one",)
    put(tmp_path / folder / "c.json", {"images": [{"id": 1, "file_name": name}], "annotations": []})
    assert len(list(open_dataset(tmp_path / folder / "c.json"))) == 1


def test_surrogates_become_escapes_in_keys_and_are_named_elsewhere(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg", make_image())
    lines = (
        '"key": "\\ud800"',
        '"key": "b", "label": "\\udfff"',
        '"key": "c", "caption": "\\ud800"',
        '"key": "d", "x": "\\ud800"',
    )
    put(
        tmp_path / "t.jsonl",
        "\n".join(f'{{"image": "./{"/" * i}a.jpg", {line}}}' for i, line in enumerate(lines)),
    )
    failed: dict[str, str] = {}
    kept = [sample.key for sample in open_dataset(tmp_path / "t.jsonl").stream(failed.__setitem__)]
    assert kept == ["\\ud800", "d"]
    assert set(failed) == {"b", "c"}
