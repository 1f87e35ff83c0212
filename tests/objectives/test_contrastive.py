"""ITC, CLIP's softmax and SigLIP's sigmoid against loops over single pairs, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sightloop.errors import UsageError
from sightloop.objectives.contrastive import Candidates, clip_loss, enqueue, itc_loss, siglip_loss
from sightloop.types import Loss

SIZES = st.integers(1, 7)
CHUNKS = st.integers(1, 9)


def unit(rows: int, seed: int, width: int = 5) -> Tensor:
    """Leaves of unit length, float64 `[rows, width]`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(x, dim=1).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def same_with_gradients(one: Tensor, other: Tensor, leaves: list[Tensor]) -> None:
    """Equal values and equal gradients of all leaves."""
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for a, b in zip(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def row_loss(row: Tensor, candidates: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    logits = torch.stack([scale * (row * c).sum() for c in candidates])
    return -(target * logits.log_softmax(0)).sum()


def slow_softmax(image: Tensor, text: Tensor, scale: Tensor, ids: list[int]) -> Tensor:
    total = image.new_zeros(())
    for rows, candidates in ((image, text), (text, image)):
        for i, row in enumerate(rows):
            target = torch.tensor([float(ids[i] == other) for other in ids], dtype=torch.float64)
            total = total + row_loss(row, candidates, scale, target / target.sum())
    return total / (2 * len(image))


def slow_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: list[int]) -> Tensor:
    total = image.new_zeros(())
    for i, x in enumerate(image):
        for j, y in enumerate(text):
            sign = 1.0 if ids[i] == ids[j] else -1.0
            total = total + torch.log(1 + torch.exp(-sign * (scale * (x * y).sum() + bias)))
    return total / len(image)


def slow_itc(
    image: Tensor, text: Tensor, known: Candidates, temperature: Tensor, ids: list[int], alpha: float
) -> Tensor:
    total = image.new_zeros(())
    for rows, teachers, others in ((image, known.image, known.text), (text, known.text, known.image)):
        for i, row in enumerate(rows):
            hard = torch.tensor([float(ids[i] == other) for other in ids], dtype=torch.float64)
            soft = torch.stack([(teachers[i] * c).sum() / temperature for c in others]).softmax(0)
            target = alpha * soft.detach() + (1 - alpha) * hard / hard.sum()
            total = total + row_loss(row, others, 1 / temperature, target)
    return total / (2 * len(image))


@given(SIZES, CHUNKS, st.booleans(), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_softmax_pairs(rows: int, chunk: int, grouped: bool, seed: int) -> None:
    image, text, scale = unit(rows, seed), unit(rows, seed + 100), scalar(7.0)
    ids = [i // 2 for i in range(rows)] if grouped else list(range(rows))
    got = clip_loss(image, text, scale, ids=torch.tensor(ids) if grouped else None, chunk=chunk)
    same_with_gradients(got.value, slow_softmax(image, text, scale, ids), [image, text, scale])
    assert got.chance == pytest.approx(math.log(rows))


@given(SIZES, CHUNKS, st.booleans(), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_sigmoid_pairs(rows: int, chunk: int, grouped: bool, seed: int) -> None:
    image, text, scale, bias = unit(rows, seed), unit(rows, seed + 100), scalar(7.0), scalar(-2.0)
    ids = [i // 2 for i in range(rows)] if grouped else list(range(rows))
    got = siglip_loss(image, text, scale, bias, ids=torch.tensor(ids) if grouped else None, chunk=chunk)
    same_with_gradients(got.value, slow_sigmoid(image, text, scale, bias, ids), [image, text, scale, bias])
    best = [ids[int((x * text).sum(1).argmax())] == ids[i] for i, x in enumerate(image)]
    assert float(got.facts["accuracy"]) == pytest.approx(sum(best) / rows)


@given(
    st.integers(1, 5),
    st.integers(0, 6),
    CHUNKS,
    st.booleans(),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_itc(rows: int, queued: int, chunk: int, grouped: bool, alpha: float, seed: int) -> None:
    image, text, temperature = unit(rows, seed), unit(rows, seed + 100), scalar(0.2)
    ids = [i % 3 for i in range(rows + queued)] if grouped else list(range(rows + queued))
    known = Candidates(
        unit(rows + queued, seed + 200).detach(),
        unit(rows + queued, seed + 300).detach(),
        batch=rows,
        ids=torch.tensor(ids) if grouped else None,
    )
    got = itc_loss(image, text, known, temperature, alpha=alpha, chunk=chunk)
    want = slow_itc(image, text, known, temperature, ids, alpha)
    same_with_gradients(got.value, want, [image, text, temperature])
    assert got.chance == pytest.approx(math.log(rows + queued))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
@settings(max_examples=20, deadline=None)
def test_shares_of_itc_sum_to_the_whole(parts: list[int]) -> None:
    total = sum(parts)
    if total == 0:
        return
    image, text, temperature = unit(total, 1), unit(total, 2), scalar(0.3)
    everything = (unit(total + 3, 3).detach(), unit(total + 3, 4).detach(), total)
    whole = itc_loss(image, text, Candidates(*everything), temperature)
    shares: list[Loss] = []
    start = 0
    for part in parts:
        own = slice(start, start + part)
        shares.append(itc_loss(image[own], text[own], Candidates(*everything, offset=start), temperature))
        start += part
    summed = torch.stack([share.value for share in shares]).sum()
    same_with_gradients(summed, whole.value, [image, text, temperature])
    accuracy = sum(float(share.facts["accuracy"]) for share in shares)
    assert accuracy == pytest.approx(float(whole.facts["accuracy"]))


@given(st.integers(0, 7), st.lists(st.integers(0, 17), max_size=6), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_queue_is_a_ring(size: int, steps: list[int], flat: bool) -> None:
    shape = (size,) if flat else (size, 2)
    queue, pointer = torch.zeros(shape), 0
    wanted, place, value = [0.0] * size, 0, 1.0
    for count in steps:
        new = torch.arange(value, value + count)
        value += count
        for x in new.tolist():
            if size:
                wanted[place] = x
                place = (place + 1) % size
        pointer = enqueue(queue, pointer, new if flat else new[:, None].expand(count, 2))
    assert pointer == place
    assert queue.reshape(size, -1)[:, :1].flatten().tolist() == wanted if size else queue.numel() == 0


@pytest.mark.parametrize("rows", [2, 5, 64])
def test_chance_is_what_knowing_nothing_costs(rows: int) -> None:
    """All embeddings alike: the softmax losses sit at chance; the sigmoid's best bias does."""
    same = nn.functional.normalize(torch.ones(rows, 4, dtype=torch.float64), dim=1)
    scale = scalar(10.0)
    clip = clip_loss(same, same, scale)
    assert clip.value.item() == pytest.approx(clip.chance)
    candidates = torch.cat([same, same])
    blip = itc_loss(same, same, Candidates(candidates, candidates, rows), scalar(0.07))
    assert blip.value.item() == pytest.approx(blip.chance) == pytest.approx(math.log(2 * rows))

    def constant(logit: float, ids: Tensor | None = None) -> Loss:
        return siglip_loss(same, same, scale, scalar(logit - 10.0), ids=ids)

    best = min(constant(math.log(1 / (rows - 1)) + d).value.item() for d in (-0.01, 0.0, 0.01))
    assert best == pytest.approx(constant(0.0).chance, rel=1e-12)
    assert best == pytest.approx(math.log(rows) + (rows - 1) * math.log(rows / (rows - 1)))
    assert constant(0.0).value.item() == pytest.approx(rows * math.log(2))
    ids = torch.zeros(rows, dtype=torch.int64)
    ids[0] = 1
    share = (1 + (rows - 1) ** 2) / rows**2
    known = constant(math.log(share / (1 - share)), ids)
    assert known.value.item() == pytest.approx(known.chance)


def test_perfect_embeddings_are_right() -> None:
    x = torch.eye(6)
    assert clip_loss(x, x, torch.tensor(50.0)).facts["accuracy"] == 1
    assert siglip_loss(x, x, torch.tensor(50.0), torch.tensor(-25.0)).facts["accuracy"] == 1
    assert itc_loss(x, x, Candidates(x, x, 6), torch.tensor(0.01)).facts["accuracy"] == 1
    turned = x.roll(1, 0)
    assert clip_loss(x, turned, torch.tensor(50.0)).facts["accuracy"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    image, text = (unit(9, seed).detach().to(dtype).requires_grad_() for seed in (1, 2))
    scale, bias, wide = torch.tensor(20.0), torch.tensor(-5.0), (image.float(), text.float())
    known = Candidates(image.detach(), text.detach(), 9)
    makers: list[Callable[[Tensor, Tensor], Loss]] = [
        lambda x, y: clip_loss(x, y, scale),
        lambda x, y: siglip_loss(x, y, scale, bias),
        lambda x, y: itc_loss(x, y, known, 1 / scale),
    ]
    for make in makers:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = make(image, text).value
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, make(*wide).value)
        (gradient,) = torch.autograd.grad(got, image)
        assert gradient.dtype == dtype


def test_without_a_gradient() -> None:
    x = unit(3, 1).detach()
    with torch.no_grad():
        assert not siglip_loss(x, x, torch.tensor(1.0), torch.tensor(0.0)).value.requires_grad
        assert not clip_loss(x, x, torch.tensor(1.0), chunk=1).value.requires_grad


def test_what_is_wrong_is_said() -> None:
    x, one = torch.eye(3), torch.tensor(1.0)
    with pytest.raises(UsageError, match="pairs"):
        clip_loss(x, x[:2], one)
    with pytest.raises(UsageError, match="no rows"):
        siglip_loss(x[:0], x[:0], one, one)
    with pytest.raises(UsageError, match="candidates"):
        itc_loss(x, x, Candidates(x, x, 3, offset=1), one)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that anything made meanwhile."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            self.elements = max(self.elements, x.numel() if isinstance(x, Tensor) else 0)
        return made


@pytest.mark.parametrize("kind", ["clip", "siglip", "itc"])
def test_no_more_than_a_chunk_of_logits_is_held(kind: str) -> None:
    rows, chunk = 96, 8
    image, text, scale = unit(rows, 1), unit(rows, 2), scalar(9.0)
    with Largest() as largest:
        if kind == "clip":
            loss = clip_loss(image, text, scale, chunk=chunk)
        elif kind == "siglip":
            loss = siglip_loss(image, text, scale, scalar(-3.0), chunk=chunk)
        else:
            loss = itc_loss(image, text, Candidates(image.detach(), text.detach(), rows), scale, chunk=chunk)
        loss.value.backward()
    assert largest.elements <= rows * max(chunk, 2 * 5)  # [b, 2P] is what travels


def tower(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16))


@pytest.mark.parametrize("kind", ["clip", "siglip", "itc"])
def test_gradients_through_cached_embeddings(kind: str) -> None:
    """Embeddings in chunks without a graph, the loss on leaves, a second pass: the same gradients."""
    rows, chunk = 256, 16
    torch.manual_seed(0)
    pictures, texts = torch.randn(rows, 12), torch.randn(rows, 12)
    towers = nn.ModuleList([tower(1), tower(2)])
    scale = nn.Parameter(torch.tensor(10.0))
    known = Candidates(
        *(nn.functional.normalize(torch.randn(rows + 64, 16), dim=1) for _ in "ab"), batch=rows
    )

    def objective(image: Tensor, text: Tensor) -> Tensor:
        if kind == "clip":
            return clip_loss(image, text, scale).value
        if kind == "siglip":
            return siglip_loss(image, text, scale, torch.tensor(-5.0), chunk=100).value
        return itc_loss(image, text, known, 1 / scale).value

    def embed(at: slice) -> list[Tensor]:
        inputs = (pictures[at], texts[at])
        return [nn.functional.normalize(t(x), dim=1) for t, x in zip(towers, inputs, strict=True)]

    parameters = [*towers.parameters(), scale]
    objective(*embed(slice(None))).backward()
    wanted = [p.grad.clone() for p in parameters if p.grad is not None]
    towers.zero_grad()
    scale.grad = None

    pieces = [slice(i, i + chunk) for i in range(0, rows, chunk)]
    with torch.no_grad():
        parts = [embed(piece) for piece in pieces]
    leaves = [torch.cat(side).requires_grad_() for side in zip(*parts, strict=True)]
    objective(*leaves).backward()
    for piece in pieces:
        torch.autograd.backward(embed(piece), [leaf.grad[piece] for leaf in leaves if leaf.grad is not None])
    got = [p.grad for p in parameters if p.grad is not None]
    assert len(got) == len(wanted) == len(parameters)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()
