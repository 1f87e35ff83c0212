"""Weights of linear layers in 8 or 4 bits: a fraction of the memory, and of what a decoding step has to read.

int8: one scale for each row, symmetric: w = q s, q in -127..127. int4: one scale and one zero for each group of 64
weights of a row: w = (q - 8) s + z, q in 0..15, scale and zero in bfloat16, 4.5 bits a weight. Rounded to nearest from
the extremes of each row or group; nothing is learned and no data is needed. Activations keep their precision, except
on a CPU, where torch's kernels for such weights are fast in bfloat16 alone and are always used so. Many rows (a prompt)
are multiplied with weights that are made again in their precision, some at a time.

The error of a product, |y - y'| / |y| over normal inputs and weights: 0.7 % with int8, 9 % with int4;
`tests/nn/test_quantise.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn

from sightloop.errors import UsageError
from sightloop.nn.attention import Linear
from sightloop.types import Bits

GROUP = 64
# Weights of a matrix that are rounded, or made again, at a time: they fit into a processor's cache, and no large matrix
# stands in memory in full precision.
_BLOCK = 1 << 19
_TINY = torch.finfo(torch.bfloat16).tiny
_INT8 = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
_INT4 = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
_PACK4 = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
# Rows from which it is quicker to make the weights again, block by block, than to multiply with them as they are:
# measured on one AVX-512 core, 4096 x 11008, bfloat16: 600 rows take 131 ms with int8 and 159 ms with int4, where the
# kernels take 503 and 330, and plain weights 114.
_MANY_8, _MANY_4 = 32, 128


class Int8(nn.Module):
    """A weight `[out, in]` in 8 bits, as the kernel of a `Linear`: x `[..., in]` -> `[..., out]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", weight.new_empty(weight.shape, dtype=torch.int8), persistent=False)
        self.register_buffer("scale", weight.new_empty(len(weight), dtype=torch.bfloat16), persistent=False)
        self.q: Tensor
        self.scale: Tensor
        for part in _parts(weight.shape):
            self.q[part], self.scale[part] = _in_8_bits(weight[part])

    def forward(self, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.device.type != "cpu" or _INT8 is None:
            out = _by_parts(rows, self.q.shape, self._part)
        elif len(rows) < _MANY_8:
            out = _INT8(rows.bfloat16(), self.q, self.scale)
        else:
            out = _by_parts(rows.bfloat16(), self.q.shape, self._part)
        return _finished(out, x, bias)

    def _part(self, part: slice, dtype: torch.dtype) -> Tensor:
        return (self.q[part].to(dtype) * self.scale[part, None].to(dtype)).t()


class Int4(nn.Module):
    """A weight `[out, in]` in 4 bits, as the kernel of a `Linear`; `in` is a multiple of GROUP, `out` of 16.

    packed: in the layout of torch's kernel for CPUs, `q` `[out, in / 2]`; else two weights a byte, as they follow.
    """

    def __init__(self, weight: Tensor, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed and _INT4 is not None and _PACK4 is not None
        rows, width = weight.shape
        self.register_buffer("q", weight.new_empty(rows, width // 2, dtype=torch.uint8), persistent=False)
        # [in / GROUP, out, 2]
        both = weight.new_empty(width // GROUP, rows, 2, dtype=torch.bfloat16)
        self.register_buffer("scale_zero", both, persistent=False)
        self.q: Tensor
        self.scale_zero: Tensor
        for part in _parts(weight.shape):
            self.q[part], self.scale_zero[:, part] = _in_4_bits(weight[part], self.packed)

    def forward(self, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        shape = torch.Size((len(self.q), x.shape[-1]))
        if not self.packed or _INT4 is None:
            out = _by_parts(rows, shape, self._part)
        elif len(rows) < _MANY_4 or not _rows_packed_together() or len(self.q) % _rows_packed_together():
            out = _INT4(rows.bfloat16(), self.q, GROUP, self.scale_zero)
        else:
            out = _by_parts(rows.bfloat16(), shape, self._part)
        return _finished(out, x, bias)

    def _part(self, part: slice, dtype: torch.dtype) -> Tensor:
        together = _rows_packed_together() if self.packed else 1
        q = _unpacked(self.q[part], together).unflatten(0, (-1, GROUP))  # [in / GROUP, GROUP, rows]
        scale, zero = self.scale_zero[:, None, part].movedim(-1, 0).to(dtype).contiguous()
        return torch.addcmul(zero, (q - 8).view(torch.int8).to(dtype), scale).flatten(0, 1)


def _parts(shape: torch.Size) -> Iterator[slice]:
    """Rows of a matrix `[out, in]`, some at a time: as many as 64 divides."""
    rows = max(_BLOCK // shape[1] // 64, 1) * 64
    return (slice(at, min(at + rows, shape[0])) for at in range(0, shape[0], rows))


def _by_parts(x: Tensor, shape: torch.Size, part: Callable[[slice, torch.dtype], Tensor]) -> Tensor:
    """x W^T, `[R, in]` -> `[R, out]`, of a W `[out, in]` of which no more than a part, `[in, rows]`, is ever made."""
    out = x.new_empty(len(x), shape[0])
    for rows in _parts(shape):
        out[:, rows] = x @ part(rows, x.dtype)
    return out


def _in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q `[rows, in]` and scale `[rows]`."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=_TINY).bfloat16()
    return (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _in_4_bits(weight: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """q `[rows, in / 2]`; scale and zero `[in / GROUP, rows, 2]`."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low) / 15).clamp(min=_TINY).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = (
        groups.sub(zero.float()[..., None])
        .div_(scale.float()[..., None])
        .add_(8)
        .round_()
        .clamp_(0, 15)
        .flatten(1)
    )
    both = torch.stack([scale, zero], dim=-1).transpose(0, 1)
    if packed and _PACK4 is not None:
        return _PACK4(q.to(torch.int32), 1), both
    q = q.to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4, both


def _unpacked(q: Tensor, together: int) -> Tensor:
    """Bytes `[rows, in / 2]` -> weights 0..15 `[in, rows]`; together: rows of the layout of torch's kernel that lie
    with each other, 1 for two weights a byte, as they follow."""
    low, high = q & 15, q >> 4
    if together == 1:
        return torch.stack([low, high], dim=-1).flatten(1).t()
    # Of each `together` rows: for each column, the first half in the low bits, the second in the high ones.
    halves = [half.view(len(q) // together, -1, together // 2).transpose(0, 1) for half in (low, high)]
    return torch.stack(halves, dim=2).flatten(1)


@cache
def _rows_packed_together() -> int:
    """`together` of `_unpacked`, which differs between processors; 0 where the layout is another one."""
    assert _PACK4 is not None
    q = torch.arange(128 * GROUP).mul(40503).bitwise_right_shift(8).bitwise_and(15).view(128, GROUP)
    packed = _PACK4(q.int(), 1)
    return next((rows for rows in (64, 32) if torch.equal(_unpacked(packed, rows), q.t())), 0)


def quantize_hook(net: nn.Module, bits: Bits, device: torch.device) -> Callable[[str, Tensor], bool]:
    """What takes the weights of a network's language model, one by one as they are read: (name, weight) -> taken.

    A layer that took its weight multiplies with few bits from then on, and its parameter stays without memory. Words,
    norms and biases are not taken, nor a matrix that two modules share; with int4 the head, and what cannot be cut into
    groups, get 8 bits. Raises UsageError for a network without a language model, or for other bits.
    """
    if bits not in ("int8", "int4"):
        raise UsageError(f"quantize={bits!r}: must be 'int8' or 'int4'")
    language = getattr(net, "language", None)
    if not isinstance(language, nn.Module):
        raise UsageError(
            f"quantize={bits!r}: this model has no language model whose weights could be fewer bits"
        )
    owners = [id(p) for module in net.modules() for p in module.parameters(recurse=False)]
    layers = {
        f"language.{name}.weight": module
        for name, module in language.named_modules()
        if isinstance(module, Linear) and owners.count(id(module.weight)) == 1
    }

    def take(name: str, weight: Tensor) -> bool:
        layer = layers.get(name)
        if layer is None:
            return False
        small = bits == "int4" and not name.endswith(".head.weight")
        if small and weight.shape[1] % GROUP == 0 and weight.shape[0] % 16 == 0:
            layer.kernel = Int4(weight, packed=device.type == "cpu")
        else:
            layer.kernel = Int8(weight)
        return True

    return take


def is_quantized(layer: Linear) -> bool:
    """Whether a layer has its weight in few bits, and its parameter no memory."""
    return isinstance(layer.kernel, (Int8, Int4))


def _finished(out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    out = out.to(x.dtype).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias
