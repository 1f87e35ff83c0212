"""However the rows lie over processes: shares sum to the loss of one process, gradients to its gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sightloop.objectives.gather import gather_rows, ring_exchange, row_counts, row_offset
from tests.forked import spawn
from tests.objectives.distributed import DIVISIONS, PROCESSES, batch, results, work

OF_ROWS = ("d_image", "d_text")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("processes")
    spawn(work, (str(made),), PROCESSES)
    return made


@pytest.mark.parametrize("number", range(len(DIVISIONS)))
def test_any_division(number: int, folder: Path) -> None:
    counts = DIVISIONS[number]
    shares = [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in counts]
    alone = results(*batch())
    for name, wanted in alone.items():
        parts: list[Tensor] = [share[name] for share in shares]
        if name == "counts":
            assert all(part.tolist() == list(counts.values()) for part in parts)
        elif name.endswith("chance"):
            assert all(part == wanted for part in parts)
        else:
            got = torch.cat(parts) if name.endswith(OF_ROWS) else torch.stack(parts).sum(0)
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_alone_nothing_is_sent() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(x) is x
    assert not gather_rows(x, gradient=False).requires_grad
    assert row_counts(3) == (3,)
    assert row_offset(3) == (0, 3)
    assert ring_exchange(x, 3).wait() is x
