"""The command as a process: signals while it starts and works, and standard streams that are closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rules import REPOSITORY

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "100",
}
# Sends a signal to itself when a module is about to be imported.
SIGNALLED = """
import os, sys
number, name = int(sys.argv[1]), sys.argv[2]
class Finder:
    def find_spec(self, wanted, path=None, target=None):
        if wanted == name:
            os.kill(os.getpid(), number)
sys.meta_path.insert(0, Finder())
sys.argv = ["sightloop", *sys.argv[3:]]
from sightloop.__main__ import main
sys.exit(main())
"""
# The command line on a fake model.
FAKE = """
import sys
from sightloop.apps.cli import common
from tests.apps.fake_model import FakeModel
common.load = lambda source, **_: FakeModel()
common.check_checkpoint = lambda source: None
from sightloop.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("name", ["cyclopts", "sightloop.apps.cli.output", "sightloop.apps.cli.verbs"])
def test_an_interrupt_during_the_start(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(int(signal.SIGINT)), name, "models"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        # Background jobs ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_what_is_imported_before_the_handler_is_light() -> None:
    code = "import sys, sightloop.__main__; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    assert not {"enum", "typing", "dataclasses", "inspect", "cyclopts", "numpy"} & set(done.stdout.split())


def test_termination_removes_temporary_files(tmp_path: Path) -> None:
    code = f"""
import os, signal, sys
import sightloop.apps.cli.main as cli
from sightloop.data.atomic import atomic_path
def run():
    with atomic_path({str(tmp_path / "x")!r}):
        os.kill(os.getpid(), signal.SIGTERM)
    return 0
cli.main = run
from sightloop.__main__ import main
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False)
    assert done.returncode == 143
    assert list(tmp_path.iterdir()) == []


def shell(tmp_path: Path, redirection: str, *words: object) -> subprocess.CompletedProcess[str]:
    line = " ".join(["exec", '"$0"', "-c", '"$1"', *map(str, words), redirection])
    return subprocess.run(
        ["bash", "-c", line, sys.executable, FAKE],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tests.apps.fake_model import make_image

    for name in "ab":
        make_image(tmp_path / "photos" / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_captions_are_written_without_streams(folder: Path, redirection: str) -> None:
    done = shell(folder, redirection, "caption photos -m M")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert [path.read_text() for path in sorted(folder.glob("photos/*.txt"))] == [
        "an image of a\n",
        "an image of b\n",
    ]


@pytest.mark.parametrize(
    ("redirection", "status", "message"), [(">&-", 141, ""), ("> /dev/full", 1, "standard output: no space")]
)
def test_rows_that_cannot_be_written(folder: Path, redirection: str, status: int, message: str) -> None:
    for words in ("classify photos -m M --labels a,b", "models"):
        done = shell(folder, redirection, words)
        assert done.returncode == status, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
