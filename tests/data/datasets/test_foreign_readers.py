"""What `convert` writes, read by other libraries: `datasets`, `webdataset`, pandas, pycocotools, Ultralytics.

Each test needs its library and is skipped without it. For Ultralytics without its CUDA build of torchvision:
`pip install --no-deps ultralytics ultralytics-thop opencv-python-headless`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightloop.data.datasets.convert import DatasetFormat, convert

Convert = Callable[[str, "DatasetFormat | None"], Path]
RNG = np.random.default_rng(0)
SIDE = 24
pytestmark = [  # of the libraries, some of which leave files to the garbage collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Writes a set with captions, boxes, an outline, a mask, a class label and questions."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a", "sub/b.c", "sub/é n", "z"):
        pixels = RNG.integers(0, 255, (SIDE, 2 * SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
    (folder / "a.txt").write_text('a red cat\nsecond, "caption"\n')
    (folder / "sub/b.c.txt").write_text("one\n")
    fields = {
        "label": "indoor",
        "qa": [{"question": "What?", "answer": "cat"}, {"question": "How many?", "answers": ["2", "two"]}],
        "regions": [
            {"label": "cat", "box": [1, 2, 11, 12]},
            {"label": "dog, big", "box": [4, 4, 20, 16], "polygons": [[4, 4, 20, 4, 20, 16]]},
        ],
        "license": "by",
    }
    (folder / "a.json").write_text(json.dumps(fields))
    mask = {"size": [SIDE, 2 * SIDE], "counts": [25, 10, SIDE * SIDE * 2 - 35]}
    fields = {
        "license": "cc",
        "regions": [{"label": "cat", "box": [1, 1, 2, 11], "mask": mask, "score": 0.5}],
    }
    (folder / "sub/é n.json").write_text(json.dumps(fields))

    def run(name: str, to: DatasetFormat | None = None) -> Path:
        assert convert(folder, tmp_path / name, to=to).samples == 4
        return tmp_path / name

    return run


@pytest.mark.parametrize("name", ["x.parquet", "x.tar", "imagefolder"])
def test_datasets_decodes_images_and_fields(write: Convert, name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = write(name, "imagefolder" if name == "imagefolder" else None)
    kind = {"x.parquet": "parquet", "x.tar": "webdataset"}.get(name, name)
    files = {"data_dir": str(path)} if path.is_dir() else {"data_files": str(path)}
    read = datasets.load_dataset(kind, split="train", cache_dir=str(tmp_path / "cache"), **files)
    assert len(read) == 4
    first = read[0]
    image = first["jpg" if name == "x.tar" else "image"]
    assert image.size == (2 * SIDE, SIDE)
    fields = first["json"] if name == "x.tar" else first
    assert fields["captions"] == ["a red cat", 'second, "caption"']
    assert fields["label"] == "indoor"
    assert [region["label"] for region in fields["regions"]] == ["cat", "dog, big"]
    assert fields["regions"][0]["box"] == [1, 2, 11, 12]
    assert [question["question"] for question in fields["qa"]] == ["What?", "How many?"]
    if name == "x.tar":
        assert [row["txt"] for row in read] == ["a red cat", "", "one", ""]


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_datasets_reads_tables(write: Convert, name: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = write(name, None)
    kind = "json" if name == "x.jsonl" else "csv"
    read = datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert (path.parent / read[0]["image"]).is_file()
    assert read[0]["label"] == "indoor"


def test_webdataset(write: Convert) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = write("x.tar", None)
    read = list(
        webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("jpg", "txt", "json")
    )
    assert [(image.size, text) for image, text, _ in read] == [
        ((2 * SIDE, SIDE), text) for text in ("a red cat", "", "one", "")
    ]
    assert read[0][2]["captions"] == ["a red cat", 'second, "caption"']


def test_pandas(write: Convert) -> None:
    pandas = pytest.importorskip("pandas")
    for path, reader, options in (
        (write("x.csv", None), pandas.read_csv, {}),
        (write("x.tsv", None), pandas.read_csv, {"sep": "\t"}),
        (write("x.jsonl", None), pandas.read_json, {"lines": True}),
        (write("x.parquet", None), pandas.read_parquet, {}),
    ):
        table = reader(path, **options)
        assert list(table["key"].unique()) == ["a", "z", "sub/b.c", "sub/é n"]
        assert table["label"][0] == "indoor"
        if "caption" in table:
            assert list(table["caption"][:2]) == ["a red cat", 'second, "caption"']
        else:
            assert list(table["captions"][0]) == ["a red cat", 'second, "caption"']


def test_pycocotools(write: Convert) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    path = write("x.json", None)
    regions = coco.COCO(str(path))
    names = {category["id"]: category["name"] for category in regions.loadCats(regions.getCatIds())}
    found = [(names[a["category_id"]], a["bbox"]) for a in regions.loadAnns(regions.getAnnIds())]
    assert found == [("cat", [1, 2, 10, 10]), ("dog, big", [4, 4, 16, 12]), ("cat", [1, 1, 1, 10])]
    masks = [int(regions.annToMask(a).sum()) for a in regions.anns.values() if a["segmentation"]]
    assert masks[0] == pytest.approx(16 * 12 / 2, abs=12)
    assert masks[1] == 10
    assert all((path.parent / image["file_name"]).is_file() for image in regions.imgs.values())
    captions = coco.COCO(str(path.with_name("x.captions.json")))
    assert [a["caption"] for a in captions.anns.values()] == ["a red cat", 'second, "caption"', "one"]


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_ultralytics(write: Convert, task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    loader = pytest.importorskip("ultralytics.data.dataset")
    utils = pytest.importorskip("ultralytics.data.utils")
    monkeypatch.setattr(utils, "check_font", lambda *_: None)  # it is fetched from the network
    path = write("yolo", "yolo")
    data = utils.check_det_dataset(str(path / "data.yaml"))
    assert data["names"] == {0: "cat", 1: "dog, big"}
    read = loader.YOLODataset(img_path=data["val"], data=data, task=task, augment=False, imgsz=32)
    assert len(read.labels) == 4
    by_name = {Path(label["im_file"]).stem: label for label in read.labels}
    assert by_name["a"]["cls"].ravel().tolist() == [0, 1]
    x, y, width, height = by_name["a"]["bboxes"][0].tolist()
    assert (x * 2 * SIDE, y * SIDE, width * 2 * SIDE, height * SIDE) == pytest.approx(
        (6, 7, 10, 10), abs=1e-4
    )
    assert [len(label["segments"]) for label in by_name.values()] == [
        len(label["cls"]) for label in by_name.values()
    ]
