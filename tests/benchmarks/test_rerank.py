"""The benchmark of re-ranking judges the pairs that the evaluation judged; it says nothing about time here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rerank import main
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world


def test_it_runs_and_counts_its_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = synthetic_world("train", 6, 1)
    write_synthetic_world(tmp_path / "scenes.tar", [scenes[i] for i in range(6)])
    main(["-d", str(tmp_path / "scenes.tar"), "-k", "16", "--pairs", "5"])
    said = capsys.readouterr().out
    texts = len({text for i in range(6) for text in scenes[i].captions})
    assert f"{6 * texts:,} pairs" in said
    assert "ratio" in said
