"""Images against texts: BLIP's ITC, CLIP's softmax over all pairs, SigLIP's sigmoid over each pair.

Embeddings are `[b, P]`, unit length, row i of the images belongs to row i of the texts. Everything is computed in
float32 at least, whatever autocast says. Each process hands in its own rows and gets its share of the loss of the
global batch of B rows (see `types.Loss`); all processes must call at the same time.

`ids` (int64 `[b]`) may say which rows show the same thing: pairs of equal ids count as matching, in both directions.
`Positives` of the global batch say it for images and texts that several samples share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sightloop.errors import UsageError
from sightloop.objectives.gather import Group, gather_rows, rank_and_size, ring_exchange, row_counts
from sightloop.objectives.matching import binary_entropy
from sightloop.objectives.positives import Positives
from sightloop.types import Loss


@dataclass(frozen=True, slots=True)
class Candidates:
    """What ITC compares with: the momentum teacher's embeddings `[C, P]` of images and of texts.

    First those of the global batch in rank order (`gather_rows`), of which this process's own start at `offset`, then
    those of the queues. batch: B, so that C = B + Q. ids: int64 `[C]`, where rows may show the same thing, or
    `Positives` of all C.
    """

    image: Tensor
    text: Tensor
    batch: int
    offset: int = 0
    ids: Tensor | Positives | None = None


def itc_loss(
    image: Tensor,
    text: Tensor,
    candidates: Candidates,
    temperature: Tensor,
    *,
    alpha: float = 0.4,
    chunk: int = 1024,
) -> Loss:
    """Image-text contrastive loss with a momentum teacher, soft targets and queues (ALBEF, section 3.2; BLIP, 3.2).

    The student's image and text `[b, P]` (image also `[b, Q, P]`, see `similarities`) against `candidates`; the target
    of a row is alpha * softmax of the teacher's own similarities + (1 - alpha) * the matching candidates. The mean over
    both directions and the global batch.
    temperature: scalar, learned or not; similarities are divided by it. chunk: rows whose logits `[chunk, C]` are held
    at once. Chance: ln C. Facts: accuracy, the share of rows whose best candidate matches.
    """
    rows, start = image.shape[0], candidates.offset
    if len(candidates.image) != len(candidates.text) or not start + rows <= candidates.batch <= len(
        candidates.text
    ):
        raise UsageError(
            f"candidates: {rows} rows from {start} on must lie in a batch of {candidates.batch}, and that in as many "
            f"images as texts, but there are {len(candidates.image)} and {len(candidates.text)}"
        )
    own = slice(start, start + rows)
    positives = Positives(candidates.ids) if isinstance(candidates.ids, Tensor) else candidates.ids
    targets = _Targets(torch.arange(own.start, own.stop, device=image.device), positives, alpha)
    scale = 1 / temperature
    to_text = _one_direction_loss(image, candidates.text, scale, targets, candidates.image[own], chunk)
    to_image = _one_direction_loss(
        text, candidates.image, scale, replace(targets, from_text=True), candidates.text[own], chunk
    )
    return _average_directions(to_text, to_image, candidates.batch, math.log(len(candidates.text)))


def enqueue(queue: Tensor, pointer: int, new: Tensor) -> int:
    """Writes new `[n, ...]` over the oldest rows of the ring queue `[Q, ...]`, in place; returns the next pointer.

    Row i of new goes to (pointer + i) modulo Q; of more than Q rows the last Q stay. Q may be zero. Every process that
    keeps the queue must be given the rows of the global batch, not its own.
    """
    size, count = queue.shape[0], new.shape[0]
    if size == 0:
        return 0
    kept = min(size, count)
    slots = (pointer + torch.arange(count - kept, count, device=queue.device)) % size
    with torch.no_grad():
        queue.index_copy_(0, slots, new[count - kept :].detach().to(queue.dtype))
    return (pointer + count) % size


def clip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    ids: Tensor | Positives | None = None,
    group: Group = None,
    chunk: int = 1024,
) -> Loss:
    """CLIP's symmetric cross-entropy over all pairs of the global batch (Radford et al. 2021, figure 3).

    With `ids` it is UniCL (Yang et al. 2022, equations 2 to 4; Florence, equation 1): the mean over rows and directions
    of -1/|P(i)| sum_k ln p(k | i), k in the row's positives P(i).
    image, text `[b, P]`; scale: scalar factor of the similarities (1 / temperature). Each process computes its rows
    against all columns; the gradient reaches the columns' owners. chunk: rows whose logits `[chunk, B]` are held at
    once. Chance: ln B. Facts: accuracy, the share of rows whose best candidate in the batch matches.
    """
    counts, start, total = _global_batch(image, text, group)
    # One message for both: [b, 2P].
    embeddings = torch.cat([_to_float32(image), _to_float32(text)], dim=1)
    if rank_and_size(group)[1] > 1 and torch.is_grad_enabled() and not embeddings.requires_grad:
        embeddings.requires_grad_()  # the way back is a call that all processes make, also one without rows
    images, texts = gather_rows(embeddings, group, counts=counts).chunk(2, dim=1)
    positives = Positives(gather_rows(ids, group, counts=counts)) if isinstance(ids, Tensor) else ids
    targets = _Targets(torch.arange(start, start + image.shape[0], device=image.device), positives)
    to_text = _one_direction_loss(image, texts, scale, targets, None, chunk)
    to_image = _one_direction_loss(text, images, scale, replace(targets, from_text=True), None, chunk)
    return _average_directions(to_text, to_image, total, math.log(total))


def siglip_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    ids: Tensor | Positives | None = None,
    group: Group = None,
    chunk: int = 1024,
) -> Loss:
    """SigLIP's sigmoid loss (Zhai et al. 2023, algorithm 1): a yes or no for each of the B^2 pairs, summed, / B.

    image, text `[b, P]`; logits are scale * similarity + bias, both scalars. The blocks of texts travel round the ring
    of processes, their gradients with them; no process holds more than one foreign block and `[b, chunk]` logits.

    Chance: the best answer that knows nothing calls each pair matching with p = 1 / B, the share of matching pairs,
    which costs B * H(p) = ln B + (B - 1) * ln(B / (B - 1)), H the binary entropy: about ln B + 1. (Zero logits cost
    B * ln 2, and SigLIP's start at a bias of -10 about 10.) With ids, p is the share of pairs that match.
    Facts: accuracy, the share of images whose best text in the batch matches.
    """
    counts, start, total = _global_batch(image, text, group)
    own = torch.arange(start, start + image.shape[0], device=image.device)
    if ids is None:
        positives, matching = Positives(torch.arange(total, device=image.device)), total
    else:
        positives = Positives(gather_rows(ids, group, counts=counts)) if isinstance(ids, Tensor) else ids
        matching = _count_matching(positives, own, group)
    ring = _RingBatch(own, positives, counts, group, chunk)
    with torch.autocast(image.device.type, enabled=False):
        value, hits = cast(tuple[Tensor, Tensor], _SigmoidLoss.apply(image, text, scale, bias, ring))
    chance = total * binary_entropy(matching / total**2)
    return Loss(value, chance, {"accuracy": hits / total})


def _count_matching(positives: Positives, own: Tensor, group: Group) -> int:
    """Matching pairs of the global batch; `own` are this process's rows `[b]`."""
    if positives.texts is None:
        return int(positives.ids.unique(return_counts=True)[1].square().sum())
    count = sum(int(positives.of_images(rows).sum()) for rows in own.split(512))
    return int(gather_rows(torch.tensor([count], device=own.device), group).sum())


def _global_batch(image: Tensor, text: Tensor, group: Group) -> tuple[tuple[int, ...], int, int]:
    if image.shape != text.shape:
        raise UsageError(
            f"image and text must be pairs of one width, but are {[*image.shape]} and {[*text.shape]}"
        )
    counts = row_counts(image.shape[0], group)
    if not any(counts):
        raise UsageError("the global batch has no rows")
    return counts, sum(counts[: rank_and_size(group)[0]]), sum(counts)


def _average_directions(
    to_text: tuple[Tensor, Tensor], to_image: tuple[Tensor, Tensor], total: int, chance: float
) -> Loss:
    """Both directions' (loss, hits), summed over my rows -> the share of the mean over the global batch."""
    return Loss(
        (to_text[0] + to_image[0]) / (2 * total),
        chance,
        {"accuracy": (to_text[1] + to_image[1]) / (2 * total)},
    )


def _to_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Cosines `[n, m]` of a `[n, P]` with b `[m, P]`, either of which may have several vectors a row, `[n, Q, P]`: the
    nearest counts (BLIP-2, Li et al. 2023, section 3.1)."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dim() == b.dim() == 2:
            return _to_float32(a) @ _to_float32(b).T
        a_vectors, b_vectors = (x if x.dim() == 3 else x[:, None] for x in (_to_float32(a), _to_float32(b)))
        cosines = a_vectors.flatten(0, 1) @ b_vectors.flatten(0, 1).T
        return cosines.view(len(a), a_vectors.shape[1], len(b), b_vectors.shape[1]).amax(dim=(1, 3))


@dataclass(frozen=True, slots=True)
class _Targets:
    """Which candidates the rows should find: own index `[b]`, or all positives; rows are images, or texts."""

    own: Tensor
    positives: Positives | None = None
    alpha: float = 0.0
    from_text: bool = False

    def split(self, chunk: int) -> Iterator[_Targets]:
        for own in self.own.split(chunk):
            yield replace(self, own=own)


def _one_direction_loss(
    rows: Tensor, candidates: Tensor, scale: Tensor, targets: _Targets, teacher: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """(loss, hits), summed over the rows `[b, P]`; the logits of one chunk of rows at a time are held."""
    teachers = [None] * max(1, -(-len(rows) // chunk)) if teacher is None else teacher.split(chunk)
    # split() gives one empty piece for no rows: also then the graph reaches the collectives.
    pieces = list(zip(rows.split(chunk), targets.split(chunk), teachers, strict=True))
    results = [
        _chunk_loss(piece, candidates, scale, part, guide)
        if len(pieces) == 1
        else cast(
            tuple[Tensor, Tensor],
            checkpoint(
                _chunk_loss,
                piece,
                candidates,
                scale,
                part,
                guide,
                use_reentrant=False,
                preserve_rng_state=False,
            ),
        )
        for piece, part, guide in pieces
    ]
    return torch.stack([loss for loss, _ in results]).sum(), torch.stack([hits for _, hits in results]).sum()


def _chunk_loss(
    rows: Tensor, candidates: Tensor, scale: Tensor, targets: _Targets, teacher: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy as logsumexp(logits) - sum(target * logits): targets sum to one."""
    logits = scale * similarities(rows, candidates)
    own = targets.own[:, None]
    if targets.positives is None:
        target_logit = logits.gather(1, own)[:, 0]
        hits = logits.argmax(1, keepdim=True) == own
    else:
        positives = targets.positives
        same = positives.of_texts(targets.own) if targets.from_text else positives.of_images(targets.own)
        target_logit = (logits * same).sum(1) / same.sum(1)
        hits = same.gather(1, logits.argmax(1, keepdim=True))
    if teacher is not None and targets.alpha > 0:
        with torch.no_grad():
            soft = (scale * similarities(teacher, candidates)).softmax(1)
        target_logit = targets.alpha * (soft * logits).sum(1) + (1 - targets.alpha) * target_logit
    return (logits.logsumexp(1) - target_logit).sum(), hits.sum().to(logits.dtype)


@dataclass(frozen=True, slots=True)
class _RingBatch:
    """My rows of the global batch `[b]`, all matching pairs, and the rows of each process."""

    own: Tensor
    positives: Positives
    counts: tuple[int, ...]
    group: Group
    chunk: int


class _SigmoidLoss(torch.autograd.Function):
    """Loss and gradients in one pass: a sum over pairs needs nothing from later, and no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ring: _RingBatch
    ) -> tuple[Tensor, Tensor]:
        rank, world = rank_and_size(ring.group)
        starts = [sum(ring.counts[:r]) for r in range(world)]
        block = _to_float32(text)
        sums = _PairSums(_to_float32(image), scale.detach(), bias.detach(), ring)
        gradient = torch.zeros_like(block)
        for hop in range(world):
            owner, arriving = (rank - hop) % world, ring.counts[(rank - hop - 1) % world]
            # The next texts travel while these are worked on; the gradients follow with this process's part.
            pending = ring_exchange(block, arriving, ring.group, tag=0) if hop < world - 1 else None
            sums.add(block, gradient, starts[owner])
            gradient = ring_exchange(gradient, arriving, ring.group, tag=1).wait()
            block = pending.wait() if pending else block
        ctx.save_for_backward(
            sums.d_image.to(image.dtype),
            gradient.to(text.dtype),
            sums.d_scale.to(scale.dtype).reshape(scale.shape),
            sums.d_bias.to(bias.dtype).reshape(bias.shape),
        )
        hits = sums.hits.sum().to(sums.loss.dtype)
        ctx.mark_non_differentiable(hits)
        return sums.loss, hits

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        return (*(gradients[0].to(d.dtype) * d for d in ctx.saved_tensors), None)


class _PairSums:
    """What a process adds up over all pairs of its images `[b, P]` with the blocks of texts that come by."""

    def __init__(self, image: Tensor, scale: Tensor, bias: Tensor, ring: _RingBatch) -> None:
        self.image, self.scale, self.bias, self.ring = image, scale, bias, ring
        self.total = sum(ring.counts)
        self.d_image = torch.zeros_like(image)
        self.loss, self.d_scale, self.d_bias = (image.new_zeros(()) for _ in range(3))
        self.best = image.new_full((len(image),), -math.inf)
        self.hits = torch.zeros_like(ring.own, dtype=torch.bool)

    def add(self, block: Tensor, gradient: Tensor, first: int) -> None:
        """block: texts `[n, P]` from row `first` of the global batch on; their gradient is added to `gradient`."""
        for start in range(0, len(block) if len(self.image) else 0, self.ring.chunk):
            piece = slice(start, start + self.ring.chunk)
            similarity = self.image @ block[piece].T
            columns = slice(first + start, first + min(start + self.ring.chunk, len(block)))
            same = self.ring.positives.of_images(self.ring.own, columns)
            # log sigmoid of +logit where the pair matches, of -logit elsewhere
            sign = same.to(similarity.dtype).mul_(2).sub_(1)
            signed = (similarity * self.scale).add_(self.bias).mul_(sign)
            self.loss -= F.logsigmoid(signed).sum() / self.total
            d_logits = signed.neg_().sigmoid_().mul_(sign).div_(-self.total)
            self.d_bias += d_logits.sum()
            self.d_scale += (d_logits * similarity).sum()
            d_similarity = d_logits.mul_(self.scale)
            self.d_image.addmm_(d_similarity, block[piece])
            gradient[piece].addmm_(d_similarity.T, self.image)
            best, at = similarity.max(1)
            better = best > self.best
            self.hits = torch.where(better, same.gather(1, at[:, None])[:, 0], self.hits)
            self.best = torch.where(better, best, self.best)
