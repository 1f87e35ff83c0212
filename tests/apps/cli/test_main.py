"""The command line on a fake model: files, rows, messages, exit statuses, kills and closed pipes."""

from __future__ import annotations

import json
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sightloop.apps.cli import common, main
from sightloop.errors import CheckpointError
from sightloop.types import ImageSpec
from tests.apps.fake_model import FakeModel, make_image
from tests.rules import REPOSITORY


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setattr(common, "load", lambda source, **_: fake)
    return fake


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        make_image(tmp_path / "photos" / name)
    return tmp_path / "photos"


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.txt"))}


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def test_captions_are_written_next_to_their_images(model: FakeModel, photos: Path, capsys) -> None:
    (photos / "b.txt").write_text("by hand")
    (photos / "broken.jpg").write_bytes(b"nothing")
    assert run("caption", photos, "-m", "M", "--prefix", "ohwx, ", "--suffix", "!") == 1
    assert texts(photos) == {
        "a.txt": "ohwx, an image of a!\n",
        "b.txt": "by hand",
        "sub/c.txt": "ohwx, an image of c!\n",
    }
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        f"{photos}/a.jpg\tohwx, an image of a!",
        f"{photos}/sub/c.jpg\tohwx, an image of c!",
    ]
    assert err.count("broken.jpg") == 1
    assert "4 images: 2 done, 1 skipped, 1 failed" in err
    assert str(photos / "b.png") not in model.read_names  # skipped before it is decoded
    assert model.calls[0][1:] == ([str(photos / "a.jpg"), str(photos / "sub/c.jpg")], None, {})


def test_a_second_run_skips_every_image(model: FakeModel, photos: Path, capsys) -> None:
    assert run("caption", photos, "-m", "M") == 0

    def written() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in photos.rglob("*")}

    before = written()
    assert run("caption", photos, "-m", "M") == 0
    assert written() == before
    assert "3 images: 0 done, 3 skipped, 0 failed" in capsys.readouterr().err
    assert len(model.read_names) == 3
    assert run("caption", *photos.iterdir(), "-m", "M") == 0  # what a shell makes of photos/*


@pytest.mark.parametrize("mode", ["append", "prepend", "overwrite"])
def test_write_modes_can_be_repeated(model: FakeModel, photos: Path, mode: str) -> None:
    (photos / "a.txt").write_text("by hand")
    for _ in range(2):
        assert run("caption", photos, "-m", "M", "--write", mode) == 0
    new = "an image of a\n"
    assert (
        texts(photos)["a.txt"]
        == {"append": "by hand\n" + new, "prepend": new + "by hand\n", "overwrite": new}[mode]
    )
    assert texts(photos)["b.txt"] == "an image of b\n"


def test_dropped_captions_are_reported_and_counted(model: FakeModel, photos: Path, capsys) -> None:
    make_image(photos / "d.jpg")
    model.texts = {"a": "", "b": "the the the the", "c": "a stock photo"}
    assert run("caption", photos, "-m", "M", "--drop-if", "stock|getty") == 0
    assert list(texts(photos)) == ["d.txt"]
    err = capsys.readouterr().err
    assert err.count("\ndropped: ") == 2
    assert "4 images: 4 done (3 dropped: 1 empty, 1 looping, 1 unwanted), 0 skipped, 0 failed" in err
    assert run("caption", photos, "-m", "M", "--keep-all") == 0
    assert texts(photos)["b.txt"] == "the the the the\n"


def test_a_judge_with_its_own_preprocessing(model: FakeModel, photos: Path, monkeypatch, capsys) -> None:
    judge = FakeModel("judge", frozenset({"match"}), ImageSpec(resize=(3, 3)), scores={"an image of b": 0.2})
    monkeypatch.setattr(common, "load", lambda source, **_: judge if source == "J" else model)
    assert run("caption", photos, "-m", "M", "--min-match", "0.5", "--judge", "J", "--json") == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["match"] for line in out.splitlines()] == [0.75, 0.75]
    assert "1 unmatched" in err
    assert list(texts(photos)) == ["a.txt", "sub/c.txt"]
    assert judge.read_names == model.read_names
    model.capabilities = frozenset({"caption"})
    assert run("caption", photos, "-m", "M", "--min-match", "0.5") == 2
    assert "cannot match" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_captions_in_one_table(model: FakeModel, photos: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"c.{ending}"
    assert run("caption", photos, "-m", "M", "--out", out) == 0
    assert texts(photos) == {}
    first = out.read_text()
    assert first.count("an image of") == 3
    make_image(photos / "aa.jpg")
    assert run("caption", photos, "-m", "M", "--out", out, "--prefix", "new: ") == 0
    lines = out.read_text().splitlines()
    assert [line for line in lines if "new: " not in line] == first.splitlines()
    assert "aa.jpg" in lines[lines.index(next(x for x in lines if "/a.jpg" in x)) + 1]
    assert run("caption", photos, "-m", "M", "--out", out, "--write", "append") == 2
    assert run("caption", photos, "-m", "M", "--out", out, "--write", "overwrite") == 0
    assert "new: " not in out.read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [out.name]


def test_decoding_options_reach_the_model(model: FakeModel, photos: Path) -> None:
    assert (
        run("caption", photos / "a.jpg", "-m", "M", "--num-beams", 3, "--max-new-tokens", 9, "--prompt", "a")
        == 0
    )
    assert model.calls[-1][2:] == ("a", {"num_beams": 3, "max_new_tokens": 9})
    assert run("caption", photos / "b.png", "-m", "M", "--top-p", 0.9, "--seed", 7, "--batch-size", 2) == 0
    assert model.calls[-1][2:] == (None, {"top_p": 0.9, "seed": 7})
    assert model.batch_size == 2


def test_ask(model: FakeModel, photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "answers.txt").write_text("yes\nno\n\n")
    arguments = ("ask", photos, "-m", "M", "-q", "one?", "-q", "two, three?")
    assert run(*arguments, "--candidates", tmp_path / "answers.txt", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(Path(row["name"]).name, row["question"], row["answer"]) for row in rows[:3]] == [
        ("a.jpg", "one?", "a: one?"),
        ("a.jpg", "two, three?", "a: two, three?"),
        ("b.png", "one?", "b: one?"),
    ]
    assert model.calls == [("answer", 6, ["yes", "no"], {})]
    assert run("ask", photos, "-m", "M") == 2
    assert run("ask", photos, "-m", "M", "-q", " ") == 2


def test_classify(model: FakeModel, photos: Path, tmp_path: Path, capsys) -> None:
    assert run("classify", photos / "a.jpg", "-m", "M", "--labels", "cat, dog,bird", "--json") == 0
    row = json.loads(capsys.readouterr().out)
    assert row["label"] == "bird"
    assert row["probabilities"] == pytest.approx({"bird": 3 / 6, "dog": 2 / 6, "cat": 1 / 6})
    (tmp_path / "l.txt").write_text("\ufeffone\ntwo\n", encoding="utf-8")
    arguments = ("classify", photos / "a.jpg", "-m", "M", "--labels", tmp_path / "l.txt", "--top", 1)
    assert run(*arguments, "--templates", "a {}", "--templates", "the {}") == 0
    assert capsys.readouterr().out == f"{photos}/a.jpg\ttwo\t0.6667\n"
    assert model.calls[-1] == ("classify", ("one", "two"), ("a {}", "the {}"))
    for labels in ("one", "a,b,a", "gone.txt", ","):
        assert run("classify", photos, "-m", "M", "--labels", labels) == 2
    assert run("classify", photos, "-m", "M", "--labels", "a,b", "--templates", "no place") == 2


def test_match(model: FakeModel, photos: Path, capsys) -> None:
    model.scores = {"a dog": 0.25}
    assert run("match", photos / "a.jpg", "a dog", "a cat", "-m", "M") == 0
    assert capsys.readouterr().out == "a dog\t0.2500\na cat\t0.7500\n"
    assert run("match", photos / "gone.jpg", "a dog", "-m", "M") == 1
    assert run("match", photos, "a dog", "-m", "M") == 2
    assert run("match", photos / "a.jpg", "-m", "M") == 2


def test_embed(model: FakeModel, photos: Path, tmp_path: Path, capsys) -> None:
    assert run("embed", photos, "-m", "M", "--out", tmp_path / "x.npy") == 0
    assert np.load(tmp_path / "x.npy").shape == (3, 5)
    assert (tmp_path / "x.names.txt").read_text().splitlines()[0] == f"{photos}/a.jpg"
    assert run("embed", photos / "gone.jpg", "-m", "M", "--out", tmp_path / "y.parquet") == 1
    assert not (tmp_path / "y.parquet").exists()
    assert capsys.readouterr().out == ""
    assert run("embed", photos, "-m", "M", "--out", tmp_path / "x.txt") == 2
    assert run("embed", photos, "-m", "M") == 2


def test_a_stopped_embedding_resumes(
    model: FakeModel, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("embed", photos, "-m", "M", "--batch-size", 1, "--out")
    assert run(*words, tmp_path / "whole.npy") == 0
    embed, calls = model.embed_images, 0

    def stopping(images):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return embed(images)

    monkeypatch.setattr(model, "embed_images", stopping)
    out = tmp_path / "stopped.npy"
    assert run(*words, out) != 0
    assert not out.exists()
    model.read_names.clear()
    assert run(*words, out) == 0
    assert len(set(model.read_names)) == 2
    assert np.load(out).tolist() == np.load(tmp_path / "whole.npy").tolist()
    assert (tmp_path / "stopped.names.txt").read_text() == (tmp_path / "whole.names.txt").read_text()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "better"),
    [
        ("caption P --out X", "Salesforce/blip-image-captioning-base"),
        ("ask P -q what?", "Salesforce/blip-vqa-base"),
        ("classify P --labels a,b", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("match P/a.jpg a b", "Salesforce/blip-itm-base-coco"),
        ("embed P --out Y", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
    ],
)
def test_the_default_model_is_the_bundled_one_with_a_notice(
    photos: Path, tmp_path: Path, monkeypatch, arguments: str, better: str, capsys
) -> None:
    sources: list[str] = []

    def load(source: str, **_: object) -> FakeModel:
        sources.append(source)
        return FakeModel()

    monkeypatch.setattr(common, "load", load)
    paths = {"P": str(photos), "X": str(tmp_path / "x.jsonl"), "Y": str(tmp_path / "y.npy")}
    words = [paths.get(word, word.replace("P/", f"{photos}/")) for word in arguments.split()]
    assert run(*words, "--json") == 0
    out, err = capsys.readouterr()
    line = f"using the bundled model nano (9 M weights, small and often wrong); -m {better} is much better"
    assert err.splitlines()[0] == line
    assert all(json.loads(row) for row in out.splitlines())
    assert run(*words, "-m", "nano") == 0
    assert "bundled" not in capsys.readouterr().err
    # A second run of `caption` and `embed` has nothing to do, and loads no model.
    assert sources == ["nano"] * (1 if words[0] in ("caption", "embed") else 2)


def test_models(capsys) -> None:
    assert run("models") == 0
    out = capsys.readouterr().out
    assert out.startswith("nano\t")
    assert "Salesforce/blip-image-captioning-base\tcaption\t384" in out
    assert run("models", "--capability", "ask", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows
    assert all("answer" in row["capabilities"] and row["license"] and row["memory_mb"] > 0 for row in rows)
    assert "answer" in rows[0]["recommended_for"]
    assert run("models", "--capability", "fly") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        "caption",
        "caption P -m M --what",
        "caption P -m M --write maybe",
        "caption P -m M --num-beams x",
        "caption P -m M --num-beams 0",
        "caption P -m M --max-new-tokens 3.5",
        "caption P -m M --seed -1",
        "caption P -m M --length-penalty inf",
        "caption P -m M -m N",
        "caption P -m M --num-beams 3 --top-p 0.9",
        "caption P -m M --top-p 1.5",
        "caption P -m M --top-p nan",
        "caption P -m M --temperature 0",
        "caption P -m M --min-new-tokens 5 --max-new-tokens 4",
        "caption P -m M --drop-if [",
        "caption P -m M --min-match 2",
        "caption P -m M --judge J",
        "caption P -m M --out x.txt",
        "caption P -m M --device tpu",
        "caption P -m M --dtype int8",
        "caption P -m M --batch-size 0",
        "caption P -m M --workers -1",
        "fly",
    ],
)
def test_wrong_usage_exits_with_2_and_a_message(
    model: FakeModel, photos: Path, arguments: str, capsys
) -> None:
    assert run(*arguments.replace("P", str(photos)).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sightloop: ")
    assert "Traceback" not in err
    assert texts(photos) == {}
    assert model.calls == []


def test_a_checkpoint_that_cannot_be_loaded_exits_with_2(photos: Path, monkeypatch, capsys) -> None:
    def load(source, **_):
        raise CheckpointError(f"{source}: no such model.\nPut its files there.")

    monkeypatch.setattr(common, "load", load)
    assert run("caption", photos, "-m", "M") == 2
    assert capsys.readouterr().err == "sightloop: M: no such model.\nsightloop: Put its files there.\n"


def test_a_model_without_the_capability_exits_with_2(model: FakeModel, photos: Path, capsys) -> None:
    model.capabilities = frozenset({"embed"})
    assert run("caption", photos, "-m", "M") == 2
    assert "sightloop models --capability caption" in capsys.readouterr().err


def test_hostile_names_stay_on_one_line(model: FakeModel, photos: Path, capsys) -> None:
    for name in ("x\ny.jpg", "\x1b[31mred.jpg", "bad\udcff.jpg", "\u202egpj.exe.jpg"):
        (photos / name).write_bytes(b"nothing")
    (photos / "good\nname.jpg").write_bytes((photos / "a.jpg").read_bytes())
    assert run("caption", photos, photos / "gone\n.jpg", str(photos / "*.webp"), "-m", "M", "--json") == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 7
    assert "\x1b" not in err
    assert "\u202e" not in err
    assert "x\\ny.jpg" in err
    assert "bad\\xff.jpg" in err
    assert "10 images: 4 done, 0 skipped, 6 failed" in err
    assert len([json.loads(line) for line in out.splitlines()]) == 4


def test_no_images(model: FakeModel, tmp_path: Path, capsys) -> None:
    assert run("caption", tmp_path, "-m", "M") == 1
    assert f"failed: {tmp_path}: the folder" in capsys.readouterr().err
    assert model.read_names == []
    assert run("caption", tmp_path / "gone", "-m", "M") == 1
    assert "1 image: 0 done, 0 skipped, 1 failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117]\nDefaultCPUAllocator: can't allocate memory: you tried"
        ),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."),
    ],
)
def test_out_of_memory_names_the_batch_size(
    model: FakeModel, photos: Path, monkeypatch, error: Exception, capsys
) -> None:
    def caption(images, prompt=None, **decoding):
        raise error

    monkeypatch.setattr(model, "caption", caption)
    assert run("caption", photos, "-m", "M") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert "smaller --batch-size" in line


def test_a_fault_of_the_program_is_not_hidden(model: FakeModel, photos: Path, monkeypatch) -> None:
    def caption(images, prompt=None, **decoding):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(model, "caption", caption)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("caption", photos, "-m", "M")


def test_a_full_disk_exits_with_1(
    model: FakeModel, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    def finish(self):
        raise OSError(28, "No space left on device", "c.csv")

    monkeypatch.setattr("sightloop.annotation.captioning.CaptionTable.finish", finish)
    assert run("caption", photos, "-m", "M", "--out", tmp_path / "c.csv") == 1
    assert "sightloop: c.csv: no space left on device: make room" in capsys.readouterr().err
    assert (tmp_path / "c.csv.partial").exists()


def test_an_interrupted_run_is_resumed_from_its_journal(
    model: FakeModel, photos: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    original = model.caption

    def caption(images, prompt=None, **decoding):
        if len(model.calls) == 2:
            raise KeyboardInterrupt
        return original(images, prompt, **decoding)

    monkeypatch.setattr(model, "caption", caption)
    arguments = ("caption", photos, "-m", "M", "--out", tmp_path / "c.jsonl", "--batch-size", 1)
    assert run(*arguments) == 130
    assert "Stopped early. 2 images: 2 done" in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl").exists()
    model.calls.append("resume")
    assert run(*arguments) == 0
    assert "3 images: 1 done, 2 skipped" in capsys.readouterr().err
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 3


PROGRAM = """
import sys, sightloop.apps.cli.main as cli, sightloop.apps.cli.common as running
from tests.apps.fake_model import FakeModel
if __name__ == "__main__":
    fake = FakeModel(seconds=float(sys.argv[1]))
    def load(source, **_):
        print("loading", file=sys.stderr, flush=True)
        return fake
    running.load = load
    running.check_checkpoint = lambda source: None
    sys.exit(cli.main(sys.argv[2:]))
"""


def command(seconds: float, *arguments: object) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(seconds), *map(str, arguments)]


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}",
    "PYTHONWARNINGS": "error",
    "COLUMNS": "100",
}


def written(folder: Path) -> tuple[int, int]:
    """Progress of a run: number of caption files, and bytes of the journal."""
    journal = folder / "c.jsonl.partial"
    return len(list(folder.rglob("*.txt"))), journal.stat().st_size if journal.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("table", [False, True])
def test_a_killed_run_loses_nothing(tmp_path: Path, table: bool) -> None:
    photos = tmp_path / "photos"
    for i in range(60):
        make_image(photos / f"{i % 3}" / f"p{i:02d}.png")
    (photos / "0/p03.txt").write_text("by hand\n")
    (photos / "1/p04.txt").write_text("")
    out = ["--out", tmp_path / "c.jsonl"] if table else []
    chance = random.Random(0)
    kills = 0  # that hit a running process
    for _ in range(10):
        before = written(tmp_path)
        job = subprocess.Popen(
            command(0.04, "caption", photos, "-m", "M", "--batch-size", 1, *out),
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # Wait for progress, not for a time: a kill before or after the work would test nothing.
        while job.poll() is None and written(tmp_path) == before:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.08))
        kills += job.poll() is None
        job.kill()
        job.wait()
        for path in photos.rglob("*.txt"):
            assert path.read_text() in (f"an image of {path.stem}\n", "by hand\n", "")
    assert kills >= 5
    done = subprocess.run(
        command(0, "caption", photos, "-m", "M", *out), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if table:
        rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
        assert [Path(row["name"]).stem for row in rows] == sorted(
            (f"p{i:02d}" for i in range(60)), key=lambda stem: (int(stem[1:]) % 3, stem)
        )
        assert all(row["caption"] == f"an image of {Path(row['name']).stem}" for row in rows)
        assert not (tmp_path / "c.jsonl.partial").exists()
        return
    assert (photos / "0/p03.txt").read_text() == "by hand\n"
    for i in set(range(60)) - {3}:  # also 4, whose caption file was empty
        assert (photos / f"{i % 3}" / f"p{i:02d}.txt").read_text() == f"an image of p{i:02d}\n"
    # Folders, images with their captions, and in each folder the record of who wrote them.
    assert len(list(photos.rglob("*"))) == 3 + 120 + 3
    assert not list(photos.rglob("*.tmp"))


def test_sigint_exits_with_130(photos: Path) -> None:
    job = subprocess.Popen(
        command(30, "caption", photos, "-m", "M"),
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert job.stderr is not None
    for line in job.stderr:  # wait for the model, not for a time: a busy machine starts slowly
        if "loading" in line:
            break
    time.sleep(0.5)
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 130, err
    assert "Traceback" not in err
    assert texts(photos) == {}


@pytest.mark.parametrize(("verb", "status"), [(["caption"], 0), (["classify", "--labels", "a,b"], 141)])
def test_a_reader_that_closes_the_pipe(photos: Path, verb: list[str], status: int) -> None:
    job = subprocess.Popen(
        command(0.5, verb[0], photos, "-m", "M", *verb[1:]),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.close()
        err = job.stderr.read()
    assert job.returncode == status, err
    assert "Error" not in err
    if verb == ["caption"]:  # the caption files are the result, not the rows
        assert len(texts(photos)) == 3


def test_on_a_terminal_there_is_a_table(photos: Path) -> None:
    (photos / "broken.jpg").write_bytes(b"nothing")
    screen, terminal = pty.openpty()
    job = subprocess.Popen(
        command(0.2, "caption", photos, "-m", "M"),
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    output = b""
    while True:
        try:
            part = os.read(screen, 4096)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(screen)
    assert job.wait(timeout=20) == 1
    shown = output.decode()
    assert "caption" in shown
    assert "an image of a" in shown
    assert shown.count("broken.jpg: not an image") == 1
    assert "4 images: 3 done, 0 skipped, 1 failed" in shown


def test_help_imports_nothing_heavy() -> None:
    heavy = ["torch", "numpy", "PIL", "pyarrow", "transformers", "huggingface_hub"]
    code = f"""
import sys, contextlib, io
from sightloop.apps.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as out:
    assert main(["--help"]) == 0
assert "caption" in out.getvalue()
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_option_has_help() -> None:
    commands = [name for name in main.app if not name.startswith("-")]
    assert len(commands) == 22
    for command in commands:
        for argument in main.app[command].assemble_argument_collection(parse_docstring=True):
            assert argument.parameter.help or not argument.show, (command, argument.name)
