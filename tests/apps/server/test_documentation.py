"""The Python and the curl commands of the page about the server, against a running one."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.apps.server.running import Running, jpeg, running
from tests.documents import blocks
from tests.rules import REPOSITORY

PAGE = blocks((REPOSITORY / "docs" / "how-to" / "serve.md").read_text("utf-8"))


@pytest.fixture(scope="module")
def served(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[Running, Path]]:
    folder = tmp_path_factory.mktemp("served")
    (folder / "photo.jpg").write_bytes(jpeg())
    with running(lambda _source: nano, folder=folder) as server:
        yield server, folder


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("number", range(sum(block.language == "python" for block in PAGE)))
def test_python(
    served: tuple[Running, Path],
    number: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, folder = served
    monkeypatch.chdir(folder)
    text = [block.text for block in PAGE if block.language == "python"][number]
    if "import gradio" in text:
        pytest.importorskip("gradio", reason="needs gradio, which is large")
    names: dict[str, Any] = {}
    exec(compile(text.replace("http://127.0.0.1:8000", server.address), "serve.md", "exec"), names)
    assert capsys.readouterr().out.strip()
    client = names["client"]
    (client.close if hasattr(client, "close") else client._client_wrapper.httpx_client.httpx_client.close)()


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(served: tuple[Running, Path]) -> None:
    server, folder = served
    texts = [block.text for block in PAGE if block.language == "bash" and "curl" in block.text]
    assert len(texts) == 2
    for text in texts:
        script = "set -e\n" + text.replace("http://127.0.0.1:8000", server.address).replace(
            "curl -s", "curl -sS --fail"
        )
        out = subprocess.run(
            ["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
        decoder, rest = json.JSONDecoder(), out.strip()
        while rest.startswith("{"):
            _, end = decoder.raw_decode(rest)
            rest = rest[end:].strip()
        assert not rest or rest.startswith("# HELP")
