"""Drawing as an evaluation task, on a painter that learned nothing: the whole run, its report, and its resumption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import sightloop
from sightloop.data.datasets.synthetic import (
    check_scene,
    parse_scene,
    plain_combination,
    synthetic_world,
    write_synthetic_world,
)
from tests.tiny_checkpoints.clip_and_blip import write_clip
from tests.tiny_checkpoints.painter import painter_model


def test_a_painter_that_learned_nothing_has_finite_scores_and_a_report(tmp_path: Path) -> None:
    clip, world, report = tmp_path / "clip", tmp_path / "world.tar", tmp_path / "report"
    write_clip(clip)
    write_synthetic_world(world, synthetic_world("train", 3, 0, size=16, scenes="plain"))
    painter = painter_model(tmp_path / "painter")
    result = sightloop.evaluate(
        "draw", world, model=painter, out=report, clip=str(clip), rank_samples=4, rank_by="nano"
    )
    values = dict(result)
    assert np.isfinite(list(values.values())).all()
    assert {"object", "all right", "all right (other texts)", "CLIPScore", "CMMD"} <= set(values)
    assert "all right, best of 4 by itm" in values
    assert (report / "report.html").is_file()
    assert json.loads((report / "report.json").read_text())["about"]["task"] == "draw"
    texts = [sample.captions[0] for sample in sightloop.open_dataset(world)]
    checks: list[float] = []
    for text in texts:
        combination = plain_combination(text)
        assert combination is not None
        image = painter.draw(text, 4)[0]
        checks.append(float(check_scene(parse_scene(np.asarray(image)), combination).object))
    assert values["object"] == np.mean(checks)
