"""Quantization of linear layers to 8 or 4 bits: weights of language models, weights and activations of towers.

Weights alone, for less memory and less to read per decoding step. int8: one scale per row, symmetric, w = q s with q in
-127..127. int4: one scale and one zero point per group of 64 weights of a row, w = (q - 8) s + z with q in 0..15; scale
and zero point in bfloat16, 4.5 bits per weight in all. Scales come from the extremes of each row or group and values
are rounded to nearest; no calibration data is needed. Activations keep their dtype, except on a CPU, where torch's
kernels for such weights are fast in bfloat16 only and are always used in it. Many rows at once (a prompt) are
multiplied with dequantized weights, one block of rows at a time.

Weights and activations, for speed on CPUs that multiply bytes (VNNI, AMX): int8 weights as above, and each token's
activations with a scale of their own, from their extreme, so that no result depends on the batch. Sums are exact.

Relative error of a product, |y - y'| / |y| for normally distributed inputs and weights: 0.7 % with int8 weights, 1.2 %
with int8 activations too, 9 % with int4 (measured by `tests/nn/test_quantize.py`).
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightloop.errors import UsageError
from sightloop.nn.attention import Linear
from sightloop.types import Bits

_QUANTIZED_PARTS = {"blocks", "head"}  # modules of a tower or decoder that hold its large linear layers
GROUP = 64  # weights of a row that share a scale and a zero point, int4
# Weights that are quantized or dequantized at a time: they fit into a processor's cache, and no large matrix is ever
# in memory in full precision.
_BLOCK_SIZE = 1 << 19
_MIN_SCALE = torch.finfo(torch.bfloat16).tiny
_SMALLEST_PEAK = 1e-30  # of a row: its reciprocal is finite
# Quantizes rows of floats with a given scale, multiplies, and scales the sums back.
_FBGEMM = getattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32", None)
_WITH_SCALES = getattr(torch, "_make_per_channel_quantized_tensor", None)
_INT8 = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
_INT4 = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
_PACK4 = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
# Rows of x from which dequantizing block by block is faster than torch's kernels. Measured on one AVX-512 core, 4096 x
# 11008, bfloat16, 600 rows: 131 ms with int8 and 159 ms with int4; the kernels take 503 and 330, plain weights 114.
_MIN_ROWS_DEQUANTIZED_INT8, _MIN_ROWS_DEQUANTIZED_INT4 = 32, 128


class _GradientContext(Protocol):
    """The part of autograd's context object that `_GradientFunction` uses."""

    kernel: nn.Module
    width: int


class _GradientFunction(torch.autograd.Function):
    """A product with a quantized weight, differentiable in its input alone: the gradient is that of the weight's
    values, as if nothing were rounded (straight through, Bengio et al. 2013, arXiv 1308.3432).
    """

    @staticmethod
    def forward(x: Tensor, kernel: nn.Module, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return kernel(x.detach(), x, bias)

    @staticmethod
    def setup_context(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _GradientContext, inputs: tuple[Tensor, nn.Module, Tensor | None], output: Tensor
    ) -> None:
        ctx.kernel, ctx.width = inputs[1], inputs[0].shape[-1]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _GradientContext, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        # Rows of the identity are multiplied without an error: they yield the weight, in any layout.
        identity = torch.eye(ctx.width, dtype=grad.dtype, device=grad.device)
        weight = ctx.kernel(identity, identity, None)  # [in, out]
        return grad @ weight.t(), None, None


def _with_gradient(kernel: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    return _GradientFunction.apply(x, kernel, bias)  # pyright: ignore[reportReturnType]


class Int8Weight(nn.Module):
    """Weight `[out, in]` in 8 bits, used as the `kernel` of a `Linear`: x `[..., in]` -> `[..., out]`.

    Attributes:
        q: int8 `[out, in]`.
        scale: bfloat16 `[out]`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("q", weight.new_empty(weight.shape, dtype=torch.int8), persistent=False)
        self.register_buffer("scale", weight.new_empty(len(weight), dtype=torch.bfloat16), persistent=False)
        self.q: Tensor
        self.scale: Tensor
        for block in _row_blocks(weight.shape):
            self.q[block], self.scale[block] = _quantize_int8(weight[block])

    def forward(self, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        if x.requires_grad:
            return _with_gradient(self, x, bias)
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        if rows.device.type != "cpu" or _INT8 is None:
            out = _blockwise_linear(rows, self.q.shape, self._dequantize)
        elif len(rows) < _MIN_ROWS_DEQUANTIZED_INT8:
            out = _INT8(rows.bfloat16(), self.q, self.scale)
        else:
            out = _blockwise_linear(rows.bfloat16(), self.q.shape, self._dequantize)
        return _reshape_and_add_bias(out, x, bias)

    def _dequantize(self, block: slice, dtype: torch.dtype) -> Tensor:
        """Rows `block` of the weight, transposed: `[in, rows]`."""
        return (self.q[block].to(dtype) * self.scale[block, None].to(dtype)).t()


class Int8Product(nn.Module):
    """Weight `[out, in]` and activations in 8 bits on a CPU, used as the `kernel` of a `Linear`.

    y = s_x s_w (q_x q_w) with integer sums: FBGEMM's, or oneDNN's where the processor has AMX, which FBGEMM does not
    use. Without VNNI activations get 7 bits, since two products of 8 would exceed the 16 bits of AVX2's sums.

    Attributes:
        scale: float32 `[out]`, of the rows of the weight.
    """

    def __init__(self, weight: Tensor, *, onednn: bool | None = None) -> None:
        super().__init__()
        self.onednn = has_amx() if onednn is None else onednn
        self.steps = 127 if has_vnni() else 63  # of an activation, either side of zero
        q = torch.empty_like(weight, dtype=torch.int8)
        scale = torch.empty(len(weight), dtype=torch.float32)
        for block in _row_blocks(weight.shape):
            rows = weight[block].float()
            scale[block] = (rows.abs().amax(dim=1) / 127).clamp(min=_SMALLEST_PEAK)
            q[block] = (rows / scale[block, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.register_buffer("scale", scale, persistent=False)
        self.scale: Tensor
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.packed = torch.ops.onednn.qlinear_prepack(q, None) if self.onednn else _pack_fbgemm(q, scale)

    def forward(self, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        if x.requires_grad:
            return _with_gradient(self, x, bias)
        rows = x.reshape(-1, x.shape[-1]).float()  # [R, in]
        if len(rows) == 1 and not self.onednn:  # one token: the scale is a number, and each call counts
            peak = float(rows.abs().max())
            if not math.isfinite(peak):
                return x.new_full((*x.shape[:-1], len(self.scale)), math.nan)
            out = _FBGEMM(rows, max(peak, _SMALLEST_PEAK) / self.steps, self.steps + 1, self.packed)  # pyright: ignore[reportOptionalCall]
            out = out if bias is None else out.add_(bias)
        else:
            peak = rows.abs().amax(dim=1, keepdim=True).clamp_(min=_SMALLEST_PEAK)  # [R, 1]
            out = self._multiply(rows / peak) if len(rows) else rows.new_empty(0, len(self.scale))
            out = out.mul_(peak) if bias is None else torch.addcmul(bias.float(), out, peak)
        return out.to(x.dtype).view(*x.shape[:-1], len(self.scale))

    def _multiply(self, x: Tensor) -> Tensor:
        """Rows between -1 and 1, `[R, in]` -> `[R, out]`, float32."""
        step, zero = 1 / self.steps, self.steps + 1
        if not self.onednn:
            return _FBGEMM(x, step, zero, self.packed)  # pyright: ignore[reportOptionalCall]
        q = x.mul_(self.steps).round_().add_(zero).to(torch.uint8)
        return torch.ops.onednn.qlinear_pointwise(
            q, step, zero, self.packed, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )


def _pack_fbgemm(q: Tensor, scale: Tensor) -> object:
    """FBGEMM's packed weight of q int8 `[out, in]` with a scale `[out]`."""
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with (
            warnings.catch_warnings()
        ):  # tensors that know their scale are to go; FBGEMM takes its weights as such
            warnings.simplefilter("ignore", UserWarning)
            zeros = torch.zeros(len(q), dtype=torch.int64)
            weight = _WITH_SCALES(q, scale.double(), zeros, 0)  # pyright: ignore[reportOptionalCall]
            return torch.ops.quantized.linear_prepack(weight, None)
    finally:
        torch.backends.quantized.engine = engine


def has_amx() -> bool:
    """Whether this processor multiplies bytes in AMX tiles."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported()) and _has_onednn_int8()


def has_vnni() -> bool:
    """Whether this processor adds products of bytes to 32 bits (VNNI)."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return supported is not None and bool(supported())


def can_multiply_int8() -> bool:
    """Whether this torch has the kernels of `Int8Product`."""
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    return has_amx() or (fbgemm and _FBGEMM is not None and _WITH_SCALES is not None)


def _has_onednn_int8() -> bool:
    return hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()


class Int4Weight(nn.Module):
    """Weight `[out, in]` in 4 bits, used as the `kernel` of a `Linear`: x `[..., in]` -> `[..., out]`.

    Args:
        weight: `[out, in]`; `in` must be a multiple of GROUP, `out` of 16.
        packed: store `q` in the layout of torch's kernel for CPUs, if this torch has one; otherwise two neighboring
            weights of a row share a byte (see `_unpack_int4`).

    Attributes:
        q: uint8 `[out, in / 2]`.
        scale_zero: scales and zero points, bfloat16 `[in / GROUP, out, 2]`.
    """

    def __init__(self, weight: Tensor, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed and _INT4 is not None and _PACK4 is not None
        rows, width = weight.shape
        self.register_buffer("q", weight.new_empty(rows, width // 2, dtype=torch.uint8), persistent=False)
        scale_zero = weight.new_empty(width // GROUP, rows, 2, dtype=torch.bfloat16)
        self.register_buffer("scale_zero", scale_zero, persistent=False)
        self.q: Tensor
        self.scale_zero: Tensor
        for block in _row_blocks(weight.shape):
            self.q[block], self.scale_zero[:, block] = _quantize_int4(weight[block], self.packed)

    def forward(self, x: Tensor, _: Tensor, bias: Tensor | None) -> Tensor:
        if x.requires_grad:
            return _with_gradient(self, x, bias)
        rows = x.reshape(-1, x.shape[-1])  # [R, in]
        shape = torch.Size((len(self.q), x.shape[-1]))
        if not self.packed or _INT4 is None:
            out = _blockwise_linear(rows, shape, self._dequantize)
        elif (
            len(rows) < _MIN_ROWS_DEQUANTIZED_INT4
            or not _kernel_row_group()
            or len(self.q) % _kernel_row_group()
        ):
            out = _INT4(rows.bfloat16(), self.q, GROUP, self.scale_zero)
        else:
            out = _blockwise_linear(rows.bfloat16(), shape, self._dequantize)
        return _reshape_and_add_bias(out, x, bias)

    def _dequantize(self, block: slice, dtype: torch.dtype) -> Tensor:
        """Rows `block` of the weight, transposed: `[in, rows]`."""
        row_group = _kernel_row_group() if self.packed else 1
        q = _unpack_int4(self.q[block], row_group).unflatten(0, (-1, GROUP))  # [in / GROUP, GROUP, rows]
        # [in / GROUP, 1, rows] each
        scale, zero = self.scale_zero[:, None, block].movedim(-1, 0).to(dtype).contiguous()
        return torch.addcmul(zero, (q - 8).view(torch.int8).to(dtype), scale).flatten(0, 1)


def _row_blocks(shape: torch.Size) -> Iterator[slice]:
    """Slices over the rows of a matrix `[out, in]`, each of about `_BLOCK_SIZE` weights and a multiple of 64 rows."""
    rows = max(_BLOCK_SIZE // shape[1] // 64, 1) * 64
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def _blockwise_linear(
    x: Tensor, shape: torch.Size, dequantize: Callable[[slice, torch.dtype], Tensor]
) -> Tensor:
    """x W^T, `[R, in]` -> `[R, out]`, with W `[out, in]` dequantized one block of rows `[in, rows]` at a time."""
    out = x.new_empty(len(x), shape[0])
    for block in _row_blocks(shape):
        out[:, block] = x @ dequantize(block, x.dtype)
    return out


def _quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight `[rows, in]` -> q int8 `[rows, in]` and scale bfloat16 `[rows]`."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=_MIN_SCALE).bfloat16()
    return (weight / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _quantize_int4(weight: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Weight `[rows, in]` -> q uint8 `[rows, in / 2]`; scale and zero point bfloat16 `[in / GROUP, rows, 2]`.

    Example, a group of four weights:

        w                           -1.0   0.05   0.4   2.0
        scale = (2.0 - -1.0) / 15 = 0.2;  zero = -1.0 + 8 * 0.2 = 0.6
        q = round((w - zero) / scale + 8)      0      5     7    15
        w' = (q - 8) * scale + zero         -1.0    0.0   0.4   2.0
        bytes, first weight in the low bits    0x50        0xf7
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # [rows, in / GROUP, GROUP]
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    scale = ((high - low) / 15).clamp(min=_MIN_SCALE).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    q = (
        groups.sub(zero.float()[..., None])
        .div_(scale.float()[..., None])
        .add_(8)
        .round_()
        .clamp_(0, 15)
        .flatten(1)
    )
    scale_zero = torch.stack([scale, zero], dim=-1).transpose(0, 1)
    if packed and _PACK4 is not None:
        return _PACK4(q.to(torch.int32), 1), scale_zero
    q = q.to(torch.uint8)
    return q[:, ::2] | q[:, 1::2] << 4, scale_zero


def _unpack_int4(q: Tensor, row_group: int) -> Tensor:
    """Bytes, uint8 `[rows, in / 2]` -> weights 0..15, uint8 `[in, rows]`.

    Each byte holds two weights. In the plain layout (row_group 1) they are neighbors in a row; in the layout of torch's
    kernel they come from two rows of a group of `row_group`. Rows a, b, c, d of two columns (low bits + high bits):

        row_group 1             row_group 4
        a0+a1                   a0+c0  b0+d0    column 0
        b0+b1                   a1+c1  b1+d1    column 1
        c0+c1
        d0+d1
    """
    low, high = q & 15, q >> 4
    if row_group == 1:
        return torch.stack([low, high], dim=-1).flatten(1).t()
    # Per group: for each column, row_group / 2 bytes. -> 2 x [in, groups, row_group / 2]
    halves = [half.view(len(q) // row_group, -1, row_group // 2).transpose(0, 1) for half in (low, high)]
    return torch.stack(halves, dim=2).flatten(1)  # [in, groups, 2, row_group / 2] -> [in, rows]


@cache
def _kernel_row_group() -> int:
    """`row_group` of torch's int4 kernel on this processor, found by packing a pattern; 0 for an unknown layout."""
    assert _PACK4 is not None
    q = torch.arange(128 * GROUP).mul(40503).bitwise_right_shift(8).bitwise_and(15).view(128, GROUP)
    packed = _PACK4(q.int(), 1)
    return next((rows for rows in (64, 32) if torch.equal(_unpack_int4(packed, rows), q.t())), 0)


def quantize_hook(net: nn.Module, bits: Bits, device: torch.device) -> Callable[[str, Tensor], bool]:
    """Weight hook that quantizes the linear layers of a network one by one while they are read.

    Of a network with a `language` module, that module's weights; with int4, its head and layers whose width is no
    multiple of GROUP get 8 bits. Of others (CLIP, SigLIP, BLIP), int8 weights and activations of all blocks and of the
    LM head; the patch embedding and the projections to embeddings and scores keep their precision.

    A quantized layer multiplies with its `kernel` from then on; its parameter stays on the "meta" device. Embeddings,
    norms, biases and matrices that two modules share keep their precision (see `quantize_shared`).

    Returns:
        hook(parameter name, weight `[out, in]`) -> whether the weight was quantized, and so must not be kept.

    Raises:
        UsageError: the network has no language model for int4, or `bits` is unknown.
    """
    if bits not in ("int8", "int4"):
        raise UsageError(f"quantize={bits!r}: must be 'int8' or 'int4'")
    is_language = has_language_model(net)
    if bits == "int4" and not is_language:
        raise UsageError("quantize='int4': this model has no language model to quantize; use 'int8'")
    shared = _shared_weights(net)
    layers = {n: layer for n, layer in _quantized_layers(net).items() if id(layer.weight) not in shared}

    def hook(name: str, weight: Tensor) -> bool:
        layer = layers.get(name)
        if layer is None:
            return False
        four_bits = bits == "int4" and not name.endswith(".head.weight")
        if not is_language:
            layer.kernel = _int8_kernel(weight, device)
        elif four_bits and weight.shape[1] % GROUP == 0 and weight.shape[0] % 16 == 0:
            layer.kernel = Int4Weight(weight, packed=device.type == "cpu")
        else:
            layer.kernel = Int8Weight(weight)
        return True

    return hook


def quantize_shared(net: nn.Module, device: torch.device) -> None:
    """Give layers whose weight is also an embedding int8 weights beside it, in a quantized network without a language
    model.

    A quarter more memory for a vocabulary's matrix, which is a fifth of what a decoding step reads.
    """
    quantized = any(isinstance(module, Linear) and is_quantized(module) for module in net.modules())
    if quantized and not has_language_model(net):
        shared = _shared_weights(net)
        for layer in _quantized_layers(net).values():
            if layer.kernel is None and id(layer.weight) in shared:
                layer.kernel = _int8_kernel(layer.weight.detach(), device)


def quantized_names(net: nn.Module) -> set[str]:
    """Names of the weights that `quantize_hook` and `quantize_shared` quantize."""
    kept = _shared_weights(net) if has_language_model(net) else set[int]()
    return {name for name, layer in _quantized_layers(net).items() if id(layer.weight) not in kept}


def has_language_model(net: nn.Module) -> bool:
    """Whether a network has a `language` module: BLIP-2, Florence-2, PaliGemma, LLaVA."""
    return isinstance(getattr(net, "language", None), nn.Module)


def _quantized_layers(net: nn.Module) -> dict[str, Linear]:
    """Names of weights -> the layers that they belong to."""
    if has_language_model(net):
        language = net.get_submodule("language")
        named = {f"language.{name}": module for name, module in language.named_modules()}
    else:
        named = {
            name: module for name, module in net.named_modules() if _QUANTIZED_PARTS & set(name.split("."))
        }
    return {f"{name}.weight": module for name, module in named.items() if isinstance(module, Linear)}


def _shared_weights(net: nn.Module) -> set[int]:
    """ids of the parameters that several modules have."""
    owners = Counter(id(p) for module in net.modules() for p in module.parameters(recurse=False))
    return {key for key, count in owners.items() if count > 1}


def _int8_kernel(weight: Tensor, device: torch.device) -> nn.Module:
    """Weights and activations in 8 bits on a CPU that has kernels for it, else the weights alone."""
    if device.type == "cpu" and can_multiply_int8():
        return Int8Product(weight)
    return Int8Weight(weight)


def is_quantized(layer: Linear) -> bool:
    """Whether a layer multiplies with an 8-bit or 4-bit weight, its parameter being without memory."""
    return isinstance(layer.kernel, (Int8Weight, Int8Product, Int4Weight))


def _reshape_and_add_bias(out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """out `[R, out]` -> `[..., out]` in the dtype and leading shape of x `[..., in]`."""
    out = out.to(x.dtype).view(*x.shape[:-1], -1)
    return out if bias is None else out + bias
