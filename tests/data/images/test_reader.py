"""Reading many images: in order, lazily, and past anything that kills, hangs or bloats a decoder."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sightloop.data.images import decode_worker, preprocess, reader
from sightloop.data.images.reader import read_images
from sightloop.errors import ImageError, UsageError
from sightloop.types import ImageSource, ImageSpec, Limits, Pixels

SPEC = ImageSpec(shortest_edge=24, crop=(24, 24))
BOTH = pytest.mark.parametrize("isolate", [False, True])


def save(path: Path, shade: int, size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, (shade, 255 - shade, 7)).save(path, format="PNG")
    return path


def slow_png(path: Path, side: int) -> Path:
    """An image of zeros in a small file: quick to write, a while to decode."""
    rows = zlib.compress(bytes(3 * side + 1) * side, 1)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in parts
        )
    )
    return path


def children() -> list[int]:
    """Decoder processes of this one."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                command = (entry / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            if parent == os.getpid() and b"sightloop.data.images.decode_worker" in command:
                found.append(int(entry.name))
    return found


def alone(source: ImageSource) -> Pixels | ImageError:
    try:
        return preprocess.preprocess(source, SPEC)
    except ImageError as error:
        return error


@BOTH
@pytest.mark.parametrize("workers", [1, 3])
def test_order_and_values(tmp_path: Path, isolate: bool, workers: int) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    good = [save(tmp_path / f"{shade}.png", shade) for shade in range(0, 250, 10)]
    array = np.full((30, 30, 3), 9, np.uint8)
    prepared = preprocess.preprocess(good[3], SPEC)
    sources: list[ImageSource] = [
        *good,
        tmp_path / "broken.jpg",
        good[0].read_bytes(),
        Image.open(good[1]),
        array,
    ]
    sources += [tmp_path / "absent", b"", prepared, str(good[2])]
    results = list(read_images(iter(sources), SPEC, workers=workers, isolate=isolate))
    assert len(results) == len(sources)
    for source, result in zip(sources, results, strict=True):
        wanted = alone(source)
        assert type(result) is type(wanted)
        assert result.name == wanted.name
        if isinstance(wanted, ImageError):
            assert str(result) == str(wanted)
        if isinstance(wanted, Pixels):
            assert isinstance(result, Pixels)
            assert result.size == wanted.size
            assert np.array_equal(result.values, wanted.values)
            assert result.values.flags.writeable
    for source in sources:
        if isinstance(source, Image.Image):
            source.close()


@BOTH
def test_reads_lazily_and_stops_at_close(tmp_path: Path, isolate: bool) -> None:
    path = save(tmp_path / "a.png", 3)
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield path

    stream = read_images(endless(), SPEC, workers=2, isolate=isolate)
    assert taken == 0
    for _ in range(5):
        assert isinstance(next(stream), Pixels)
    assert 5 <= taken <= 5 + 2 * 4 + 1
    stream.close()  # type: ignore[attr-defined]
    assert not children()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sightloop-reader")]


@BOTH
def test_nothing_in_nothing_out(isolate: bool) -> None:
    assert list(read_images([], SPEC, isolate=isolate)) == []
    assert not children()


@BOTH
def test_errors_of_the_source_come_through(tmp_path: Path, isolate: bool) -> None:
    def failing() -> Iterator[Path]:
        yield save(tmp_path / "a.png", 3)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(read_images(failing(), SPEC, isolate=isolate))
    assert not children()


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError, match="workers"):
        read_images([], SPEC, workers=0)
    with pytest.raises(UsageError, match="mode"):
        read_images([], SPEC, mode="quick")  # type: ignore[arg-type]


@BOTH
def test_odd_names(tmp_path: Path, isolate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["new\nline.png", "ünïcödé 图.png", " -x.png", "tab\t'\"$.png"]
    names.append(os.fsdecode(b"undecodable \xff\xfe.png"))
    monkeypatch.chdir(tmp_path)
    for shade, name in enumerate(names):
        save(tmp_path / name, shade)
    results = list(read_images(names, SPEC, isolate=isolate))
    assert [result.name for result in results] == names
    assert [int(result.values[0, 0, 0]) for result in results if isinstance(result, Pixels)] == list(range(5))


def test_a_hang_costs_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_WALL_CLOCK_FACTOR", 1000.0)  # the limit of CPU time ends it
    small, slow = save(tmp_path / "a.png", 3), slow_png(tmp_path / "slow.png", 9_000)
    limits = Limits(max_seconds=0.2)
    results = list(read_images([small, slow, small, slow, small], SPEC, limits=limits, isolate=True))
    assert [isinstance(result, Pixels) for result in results] == [True, False, True, False, True]
    assert isinstance(results[1], ImageError)
    assert results[1].reason == "took longer than the limit of 0.2 s"
    assert results[1].name == str(slow)


def test_waiting_for_the_processor_costs_no_picture(tmp_path: Path) -> None:
    small = save(tmp_path / "a.png", 3)
    stream = read_images([small] * 9, SPEC, limits=Limits(max_seconds=1), isolate=True, workers=1)
    assert isinstance(next(stream), Pixels)
    (child,) = children()
    os.kill(child, signal.SIGSTOP)
    time.sleep(1.3)
    os.kill(child, signal.SIGCONT)
    assert all(isinstance(result, Pixels) for result in stream)


def test_a_memory_bomb_costs_one_picture(tmp_path: Path) -> None:
    small, large = save(tmp_path / "a.png", 3), slow_png(tmp_path / "large.png", 6_000)
    limits = Limits(max_memory_bytes=100 * 2**20)  # the image takes 144 MB in Pillow
    results = list(read_images([small, large, small], SPEC, limits=limits, isolate=True, workers=1))
    assert [isinstance(result, Pixels) for result in results] == [True, False, True]
    assert isinstance(results[1], ImageError)
    assert results[1].reason == "needs too much memory"


def test_a_request_larger_than_the_cap_costs_one_picture(tmp_path: Path) -> None:
    small = save(tmp_path / "a.png", 3).read_bytes()
    limits = Limits(max_memory_bytes=50 * 2**20)
    results = list(
        read_images([small, bytes(80 * 2**20), small], SPEC, limits=limits, isolate=True, workers=1)
    )
    assert [isinstance(result, Pixels) for result in results] == [True, False, True]


def test_a_killed_child_costs_one_picture(tmp_path: Path) -> None:
    small, slow = save(tmp_path / "a.png", 3), slow_png(tmp_path / "slow.png", 9_000)
    stream = read_images([small, slow, small], SPEC, isolate=True, workers=1, limits=Limits(max_seconds=60))
    assert isinstance(next(stream), Pixels)
    time.sleep(0.1)  # the child is at the slow one now, or soon
    for child in children():
        os.kill(child, signal.SIGKILL)
    second, third = stream
    assert isinstance(second, ImageError)
    assert second.reason == "crashed the decoder (exit status -9)"
    assert isinstance(third, Pixels)
    assert not children()


def test_close_in_the_middle_of_a_hang(tmp_path: Path) -> None:
    slow = slow_png(tmp_path / "slow.png", 11_000)
    stream = read_images([save(tmp_path / "a.png", 3), slow, slow, slow], SPEC, isolate=True)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert not children()


def test_a_child_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    [result] = read_images([save(tmp_path / "a.png", 3)], SPEC, isolate=True)
    assert isinstance(result, ImageError)
    assert "did not start" in result.reason


def start_child() -> subprocess.Popen[bytes]:
    child = reader._Worker({"spec": {}, "limits": {}}, 5.0)
    reader._read_exactly(child._process.stdout, 1)  # type: ignore[arg-type]
    return child._process


def test_children_end_with_their_pipe_and_ignore_interrupts() -> None:
    process = start_child()
    process.send_signal(signal.SIGINT)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(decode_worker.REQUEST.pack(1, 3) + b"abc")
    process.stdin.flush()
    assert process.stdout.read(1) == decode_worker.STARTED
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_children_inherit_nothing_and_import_no_torch() -> None:
    with open(os.devnull) as extra:
        os.set_inheritable(extra.fileno(), True)
        process = start_child()
    try:
        links = {os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")}
        assert all(link.startswith("pipe:") or link == os.devnull for link in links)
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "libtorch" not in maps
        assert "SigIgn:" in Path(f"/proc/{process.pid}/status").read_text()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child first ends its image")
def test_children_die_with_their_parent(tmp_path: Path) -> None:
    slow = slow_png(tmp_path / "slow.png", 11_000)
    code = (
        "import sys, time\n"
        "from sightloop.data.images.reader import read_images\n"
        "from sightloop.types import ImageSpec, Limits\n"
        "stream = read_images([sys.argv[1]] * 2, ImageSpec(), isolate=True, limits=Limits(max_seconds=60))\n"
        "import threading; threading.Thread(target=lambda: next(stream), daemon=True).start()\n"
        "import subprocess; time.sleep(1)\n"
        "pids = [p.pid for p in __import__('gc').get_objects() if isinstance(p, subprocess.Popen)]\n"
        "print(*pids, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(slow)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert pids
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_real_photographs(shared_data: Path) -> None:
    paths = sorted((shared_data / "coco128").rglob("*.jpg"))[:24]
    here = list(read_images(paths, SPEC))
    apart = list(read_images(paths, SPEC, isolate=True))
    for one, other in zip(here, apart, strict=True):
        assert isinstance(one, Pixels)
        assert isinstance(other, Pixels)
        assert (one.name, one.size) == (other.name, other.size)
        assert np.array_equal(one.values, other.values)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_was_started_early_is_taken_once(tmp_path: Path) -> None:
    reader.start_early()
    reader.start_early()
    [early] = children()
    paths = [save(tmp_path / f"{shade}.png", shade) for shade in range(4)]
    stream = read_images(paths, SPEC, workers=1, isolate=True)
    assert isinstance(next(stream), Pixels)
    assert children() == [early]
    stream.close()  # type: ignore[attr-defined]
    reader.stop_early()
    assert not children()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_process_that_was_started_early_may_have_ended(tmp_path: Path) -> None:
    reader.start_early()
    [early] = children()
    os.kill(early, signal.SIGKILL)
    os.waitid(os.P_PID, early, os.WEXITED | os.WNOWAIT)
    [result] = read_images([save(tmp_path / "a.png", 3)], SPEC, isolate=True)
    assert isinstance(result, Pixels)
    reader.start_early()
    reader.stop_early()
    assert not children()
