"""Sharded networks learn the same, whatever processes do differently; their runs stop, go on and end as others do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UsageError
from sightloop.training.events import StepDone
from sightloop.training.trainer import train
from tests.forked import Ranks
from tests.training.run_ranks import record_losses, train_until_killed

# All of BLIP, small: teacher, queue, average, clipped gradients; encoder and decoder share modules and words.
SMALL = (
    "data.batch=8",
    "data.augment=null",
    "teacher.queue=20",
    "teacher.momentum=0.9",
    "ema=0.9",
    "optimizer.clip_norm=5",
    "schedule.warmup_steps=2",
    "steps=4",
    "save_every=2",
)


class Job(NamedTuple):
    data: Path
    out: Path
    settings: Sequence[str]
    stop: int | None = None


def together(jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """Every job on two processes, one after the other; what the first process saw, which is in `out`.json too."""
    rows = [(str(job.data), str(job.out), [*SMALL, *job.settings], job.stop) for job in jobs]
    Ranks(record_losses, (rows, f"{out}.json"), out, 2).finish()
    return json.loads(Path(f"{out}.json").read_text())


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], error: float = 2e-4) -> bool:
    return set(a) == set(b) and all(torch.allclose(a[name], b[name], atol=error, rtol=0) for name in a)


def result(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def last(out: Path) -> dict[str, torch.Tensor]:
    return load_file(max((out / "checkpoints").glob("step-*")) / "state.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 40, seed=0))
    return path


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of which few have a caption: in many a step, a process has none."""
    folder = tmp_path_factory.mktemp("sparse")
    for index in range(9):
        Image.fromarray(np.full((64, 64, 3), index * 20, np.uint8)).save(folder / f"{index}.png")
        if index % 3 == 0:
            (folder / f"{index}.txt").write_text(f"shade number {index}")
    return folder


UNEVEN = ("data.batch=9", "data.micro_batch=4", "steps=2")  # rows 5 and 4: two parts and one
SPARSE = ("data.batch=4", "terms.vqa=0", "model.vocab_size=40", "steps=4")
LORA = ('model.lora=["*.attn.qkv", "*.cross.kv"]', "ema=0", "steps=2", "activation_checkpointing=true")
MIM = (
    "terms.itc=0",
    "terms.itm=0",
    "terms.lm=0",
    "terms.vqa=0",
    "terms.mim=1",
    "steps=2",
    "precision=bfloat16",
)
PAIRS = {"whole": (), "uneven": UNEVEN, "sparse": SPARSE, "lora": LORA, "bfloat16": MIM}


@pytest.fixture(scope="module")
def found(data: Path, sparse: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Each pair of runs, replicated and sharded; and sharded runs that stop after step 3, one of which goes on."""
    out = tmp_path_factory.mktemp("runs")
    unseen = out / "unseen.tar"
    write_synthetic_world(unseen, synthetic_world("unseen", 4, seed=1))
    jobs: dict[str, Job] = {}
    for name, settings in PAIRS.items():
        source = sparse if name == "sparse" else data
        more = (f"evaluation.data={unseen}", "evaluation.leaks=false") if name == "whole" else ()
        for kind in ("false", "true"):
            key = f"{name} {kind}"
            jobs[key] = Job(source, out / key, (*settings, *more, f"shard={kind}"))
    jobs["stopped"] = Job(data, out / "stopped", ("shard=true",), 3)
    jobs["other"] = Job(data, out / "other", ("shard=true",), 3)
    jobs["goes on"] = Job(data, out / "stopped", ("shard=true",))
    return out, dict(zip(jobs, together(list(jobs.values()), out / "printed"), strict=True))


@pytest.mark.parametrize("name", PAIRS)
def test_sharded_is_replicated(name: str, found: tuple[Path, dict[str, Any]]) -> None:
    out, seen = found
    ours, theirs = seen[f"{name} true"], seen[f"{name} false"]
    error = 1e-5 if name != "bfloat16" else 5e-3
    assert len(ours["losses"]) >= 2
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=error)
    assert ours["norms"] == pytest.approx(theirs["norms"], rel=10 * error)
    assert close(result(out / f"{name} true"), result(out / f"{name} false"))
    assert close(
        last(out / f"{name} true"), last(out / f"{name} false"), 1e-2 if name == "bfloat16" else 1e-3
    )


def test_steps_of_both_kinds_were_taken(found: tuple[Path, dict[str, Any]]) -> None:
    seen = found[1]
    assert all(seen["whole true"]["alike"])
    assert not any(seen["uneven true"]["alike"])
    assert set(seen["sparse true"]["alike"]) == {True, False}
    assert not seen["whole false"]["alike"]


@pytest.mark.parametrize("kind", ["true", "false"])
def test_parameters_that_no_process_uses_do_not_change(
    kind: str, found: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """As in one process: weight decay too leaves alone what has no gradient."""
    list(train("world", str(data), tmp_path / "run", settings=[*SMALL, *MIM], device="cpu"))
    ours, theirs = result(tmp_path / "run"), result(found[0] / f"bfloat16 {kind}")
    unused = [name for name in ours if name.startswith(("encoder.", "decoder."))]
    assert len(unused) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in unused)


def test_the_result_is_a_model(found: tuple[Path, dict[str, Any]]) -> None:
    out, seen = found
    model = sightloop.load(out / "whole true" / "model")
    assert isinstance(model.caption(np.zeros((64, 64, 3), np.uint8))[0], str)
    both = [
        sorted(path.name for path in (out / f"whole {kind}" / "model").iterdir())
        for kind in ("true", "false")
    ]
    assert both[0] == both[1]
    assert seen["whole true"]["evaluated"][0].keys() == seen["whole false"]["evaluated"][0].keys()


def test_a_stopped_run_resumes_bit_equal(found: tuple[Path, dict[str, Any]]) -> None:
    """It had taken step 3, which no checkpoint holds."""
    out, seen = found
    assert len(seen["goes on"]["losses"]) == 2
    assert seen["goes on"]["losses"] == seen["whole true"]["losses"][2:]
    ours, theirs = last(out / "stopped"), last(out / "whole true")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_resumes_on_one_process_unsharded(
    found: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    out, seen = found
    shutil.copytree(out / "other", tmp_path / "run")
    events = list(train("world", str(data), tmp_path / "run", settings=SMALL, device="cpu"))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert losses == pytest.approx(seen["whole true"]["losses"][2:], abs=1e-5)


def test_a_killed_run_resumes(found: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    Ranks(train_until_killed, (str(data), str(out), [*SMALL, "shard=true"], 3), tmp_path / "killed", 2).die()
    assert not (out / "model").exists()
    (seen,) = together([Job(data, out, ("shard=true",))], tmp_path / "resumed")
    assert seen["losses"] == found[1]["whole true"]["losses"][2:]
    assert close(result(out), result(found[0] / "whole true"), 0)


def test_a_missing_compiler_is_an_error_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/no/compiler")
    with pytest.raises(UsageError, match=r"compile=true.*no /no/compiler.*compile=false"):
        list(train("world", str(data), tmp_path / "run", settings=[*SMALL, "compile=true"], device="cpu"))
    assert not (tmp_path / "run").exists()
