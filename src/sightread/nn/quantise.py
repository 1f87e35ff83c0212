"""Weights of linear layers in 8 or 4 bits: a fraction of the memory, and of what a decoding step has to read.

int8: one scale for each row, symmetric: w = q s, q in -127..127. int4: one scale and one zero for each group of 64
weights of a row: w = (q - 8) s + z, q in 0..15, scale and zero in bfloat16, 4.5 bits a weight. Rounded to nearest from
the extremes of each row or group; nothing is learned and no data is needed. Activations keep their precision, except
on a CPU, where torch's kernels for such weights are fast in bfloat16 alone and are always used so.

The error of a product, |y - y'| / |y| over normal inputs and weights: 0.7 % with int8, 9 % with int4;
`tests/nn/test_quantise.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from sightread.errors import UsageError
from sightread.nn.attention import Linear

Bits: TypeAlias = Literal["int8", "int4"]

GROUP = 64
_ROWS = (
    1024  # of a matrix at a time, so that no large one stands in memory in full precision; a multiple of 64
)
_TINY = torch.finfo(torch.bfloat16).tiny
_INT8 = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
_INT4 = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
_PACK4 = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
# Rows from which it is quicker to make a matrix of 8-bit weights again than to multiply with them as they are: measured
# on one AVX-512 core, 4096 x 11008, bfloat16: 27 ms for 32 rows and 107 ms for 128, against 45 ms and the product.
_MANY = 64


class Int8(nn.Module):
    """A weight `[out, in]` in 8 bits, as the kernel of a `Linear`: x `[..., in]` -> `[..., out]`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        parts = [_in_8_bits(part) for part in weight.split(_ROWS)]
        self.register_buffer("q", torch.cat([q for q, _ in parts]), persistent=False)
        self.register_buffer("scale", torch.cat([scale for _, scale in parts]), persistent=False)
        self.q: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if rows.device.type != "cpu" or _INT8 is None:
            out = nn.functional.linear(rows, self.q.to(x.dtype)) * self.scale.to(x.dtype)
        elif len(rows) < _MANY:
            out = _INT8(rows.bfloat16(), self.q, self.scale)
        else:
            out = nn.functional.linear(rows.bfloat16(), self.q.bfloat16()) * self.scale
        return _finished(out, x, bias)


class Int4(nn.Module):
    """A weight `[out, in]` in 4 bits, as the kernel of a `Linear`; `in` is a multiple of GROUP, `out` of 16.

    packed: in the layout of torch's kernel for CPUs, `q` `[out, in / 2]`; else two weights a byte, as they follow.
    """

    def __init__(self, weight: Tensor, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed and _INT4 is not None and _PACK4 is not None
        parts = [_in_4_bits(part, self.packed) for part in weight.split(_ROWS)]
        self.register_buffer("q", torch.cat([q for q, _ in parts]), persistent=False)
        # [in / GROUP, out, 2]
        self.register_buffer("scale_zero", torch.cat([both for _, both in parts], dim=1), persistent=False)
        self.q: Tensor
        self.scale_zero: Tensor

    def forward(self, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.packed and _INT4 is not None:
            out = _INT4(rows.bfloat16(), self.q, GROUP, self.scale_zero)
        else:
            out = nn.functional.linear(rows, self._weight().to(x.dtype))
        return _finished(out, x, bias)

    def _weight(self) -> Tensor:
        q = torch.stack([self.q & 15, self.q >> 4], dim=-1).flatten(1).unflatten(1, (-1, GROUP))
        scale, zero = self.scale_zero.transpose(0, 1).float().unbind(-1)
        return ((q.float() - 8) * scale[..., None] + zero[..., None]).flatten(1)


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
    both = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
    if packed and _PACK4 is not None:
        return _PACK4(q.to(torch.int32), 1), both
    q = q.to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4, both


def quantiser(net: nn.Module, bits: Bits, device: torch.device) -> Callable[[str, Tensor], bool]:
    """What takes the weights of a network's language model, one by one as they are read: (name, weight) -> taken.

    A layer that took its weight multiplies with few bits from then on, and its parameter stays without memory. Words,
    norms and biases are not taken, nor a matrix that two modules share; with int4 the head, and what cannot be cut into
    groups, get 8 bits. Raises UsageError for a network without a language model, or for other bits.
    """
    if bits not in ("int8", "int4"):
        raise UsageError(f"quantise={bits!r}: must be 'int8' or 'int4'")
    language = getattr(net, "language", None)
    if not isinstance(language, nn.Module):
        raise UsageError(
            f"quantise={bits!r}: this model has no language model whose weights could be fewer bits"
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


def quantised(layer: Linear) -> bool:
    """Whether a layer has its weight in few bits, and its parameter no memory."""
    return isinstance(layer.kernel, (Int8, Int4))


def _finished(out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    out = out.to(x.dtype).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias
