"""Filters: what they mean, against a reference in Python over every row; whatever is typed is a filter or one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sightloop.errors import UsageError
from sightloop.search.filters import FIELDS, parse_filters
from sightloop.search.index import Index
from sightloop.search.qdrant import QdrantStore
from sightloop.search.store import IndexInfo, VectorSpace

ATOMS = [
    *FIELDS,
    "=",
    "!=",
    "<",
    "<=",
    ">",
    ">=",
    "~",
    "!~",
    "not ",
    "!",
    " and ",
    " or ",
    "'",
    '"',
    "\\",
    "\n",
    "\0",
]
ATOMS += [
    "\ud800",
    "2024-05",
    "2024-02-30",
    "1e308",
    "9" * 30,
    "-",
    "; DROP TABLE images",
    "%",
    "cat",
    "nan",
    "٣",
    "5M",
]


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(ATOMS), max_size=8).map("".join)))
@example("width>1" + " or width>1" * 2_000)
@example("'" * 9)
def test_any_text_is_a_filter_or_one_line(text: str) -> None:
    message = ""
    try:
        parse_filters([text])
    except UsageError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lable=cat", "did you mean label"),
        ("width>wide", "width needs a number"),
        ("time>2024-13", "there is no date"),
        ("caption<3", "caption is a text"),
        ("width~3", "width is no text"),
        ("width>", "no value"),
        ("width", "no operator"),
        ("", "is empty"),
        ("width>3 or ", "is empty|no value|no operator|nothing beside"),
        ("caption~'red", "is not closed"),
    ],
)
def test_a_wrong_filter_says_why(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_filters(text)


def seconds(*date: int) -> int:
    return int((datetime(*date) - datetime(1970, 1, 1)).total_seconds())  # type: ignore[arg-type]


CAPTIONS = [["A red car, and a dog"], ["Café au lait"], [], ["two dogs", "E16-A connector"]]
LABELS = [["cat"], ["Big Dog", "cat"], []]
ROWS: list[dict[str, Any]] = [
    {
        "id": f"i{i}",
        "root": "/a" if i % 2 else "/b's",
        "path": f"P/{i}.jpg",
        "size": 1_000 * i,
        "width": 100 + 10 * i,
        "time": None if i % 3 == 0 else seconds(2024, 1 + i % 12, 1, i % 24),
        "latitude": None if i % 5 else i - 30.5,
        "captions": CAPTIONS[i % 4],
        "labels": LABELS[i % 3],
        "extra": json.dumps({"Color": ["Dark red", "blue"][i % 2], "rating": i % 3, "tags": ["a", i]}),
    }
    for i in range(60)
]
CASES: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
    ("width>400", lambda r: r["width"] > 400),
    ("width=255.5", lambda r: False),
    ("width<255.5", lambda r: r["width"] < 255.5),
    ("not width>=400", lambda r: r["width"] < 400),
    ("size<=10k", lambda r: r["size"] <= 10_000),
    ("time>=2024-05", lambda r: r["time"] is not None and r["time"] >= seconds(2024, 5, 1)),
    (
        "time=2024-05",
        lambda r: r["time"] is not None and seconds(2024, 5, 1) <= r["time"] < seconds(2024, 6, 1),
    ),
    ("time<=2024-05-01", lambda r: r["time"] is not None and r["time"] < seconds(2024, 5, 2)),
    ("latitude!=-30.5", lambda r: r["latitude"] not in (None, -30.5)),
    ("label=cat", lambda r: "cat" in r["labels"]),
    ("label='BIG dog'", lambda r: "Big Dog" in r["labels"]),
    ("not label=dog", lambda r: True),
    ("label!=cat and width>300", lambda r: "cat" not in r["labels"] and r["width"] > 300),
    ("caption~cafe", lambda r: r["captions"] == CAPTIONS[1]),
    ("caption~'car and a'", lambda r: r["captions"] == CAPTIONS[0]),
    ("caption=''", lambda r: not r["captions"]),
    ("caption='two DOGS'", lambda r: "two dogs" in r["captions"]),
    ("extra.color='dark RED'", lambda r: r["extra"]["Color"] == "Dark red"),
    ("extra.Color=red or extra.rating=2.0", lambda r: r["extra"]["rating"] == 2),
    ("extra.rating!=1", lambda r: r["extra"]["rating"] != 1),
    ("not extra.tags=7 and width<=180", lambda r: r["width"] <= 180 and 7 not in r["extra"]["tags"]),
    ("extra.none=1", lambda r: False),
    ('root="/b\'s"', lambda r: r["root"] == "/b's"),
    ("id=i7 or id=i9", lambda r: r["id"] in ("i7", "i9")),
]


@pytest.fixture(scope="module", params=["lance", "qdrant, in-process"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder: Path = tmp_path_factory.mktemp("filters") / "index"
    if request.param == "lance":
        made = Index.create(folder, dim=8)
    else:
        from qdrant_client import QdrantClient

        info = IndexInfo((VectorSpace("vector", "", "", 8),))
        made = Index(QdrantStore.create(QdrantClient(":memory:"), "filters", info))
    made.add_vectors(np.random.default_rng(0).standard_normal((len(ROWS), 8)), ROWS)
    return made


@pytest.mark.filterwarnings("ignore")  # the in-process Qdrant warns that payload indexes do nothing there
@pytest.mark.parametrize(("text", "takes"), CASES, ids=[text for text, _ in CASES])
def test_a_filter_takes_the_rows_that_it_describes(
    index: Index, text: str, takes: Callable[[dict[str, Any]], bool]
) -> None:
    expected = {row["id"] for row in ROWS if takes(row | {"extra": json.loads(row["extra"])})}
    assert {row["id"] for row in index.rows(["id"], text)} == expected
    hits = index.search(vector=np.ones(8), k=len(ROWS), where=text)
    assert set(hits.ids) == expected


def test_what_is_typed_is_data_to_the_store(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", dim=4)
    names = ["x' OR 'a'='a", 'x" OR "a"="a', "\\", "`id`", "%", "a\0b", "日本", "a;DROP TABLE images"]
    index.add_vectors(np.eye(4)[[0, 1] * 4], [{"id": str(i), "path": name} for i, name in enumerate(names)])
    for i, name in enumerate(names):
        quote = '"' if "'" in name else "'"
        where = f"path={quote}{name}{quote}" if not ("'" in name and '"' in name) else f"path={name}"
        assert [row["id"] for row in index.rows(["id"], where)] == [str(i)], name
