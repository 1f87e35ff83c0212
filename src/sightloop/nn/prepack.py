"""Linear layers that oneDNN multiplies: packed for inference on a CPU, and back; as they are for training.

Packing copies a weight into the blocked layout of oneDNN and multiplies with oneDNN's kernels. Measured on one 2-core
AVX-512 machine against the default kernel, in float32: 1.6-4x from 1 to 24 rows (a decoding step), 2.1x at 577 rows (a
image); in bfloat16 2x at 1 row, 1.6x at 4, the same at 128. The sums
are the same up to rounding. The op has no gradient, so only inference packs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightloop.nn.attention import Linear

_REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = _POINTWISE is not None and torch.backends.mkldnn.is_available()
# Multiplications from which oneDNN's kernels pay for their call: below it is dearer than the product.
_WORTH_ONEDNN = 1 << 22


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed linear layers."""
    return _HAS_ONEDNN and _REORDER is not None


def pack(net: nn.Module) -> None:
    """Pack every `Linear` on the CPU in place, in float32, and in bfloat16 where the processor has it.

    The plain weight is dropped unless another module shares it (tied words); one that is more than a tenth of the
    network then stays as it is, rather than there twice. oneDNN multiplies with it in float32 all the same: measured
    at 50,304 x 1024, 9.4 ms for 1 row and 12 for 3, where torch takes 10.3 and 39, and packed weights 7.3 and 8.8.
    """
    most = sum(p.numel() for p in net.parameters()) / 10
    uses = _uses(net)
    for module in net.modules():
        if isinstance(module, Linear) and module.packed is None and _packable(module.weight):
            alone = uses[id(module.weight)] == 1
            if alone or module.weight.numel() <= most:
                _pack(module, module.weight.detach())
            elif module.weight.dtype == torch.float32:
                module.kernel = _product
            if alone:  # the bytes now live in `packed`; `unpack` brings them back exactly
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)


def pack_hook(net: nn.Module) -> Callable[[str, Tensor], bool]:
    """What packs the weights of a network one by one as they are read, so that none is ever there twice: (name,
    weight) -> taken. It leaves to `pack` what modules share."""
    uses = _uses(net)
    layers = {
        f"{name}.weight": module
        for name, module in net.named_modules()
        if isinstance(module, Linear) and uses[id(module.weight)] == 1
    }

    def take(name: str, weight: Tensor) -> bool:
        taken = name in layers and _packable(weight)
        if taken:
            _pack(layers[name], weight)
        return taken

    return take


def unpack(net: nn.Module) -> None:
    """Undo `pack`, bit for bit: saving and training need the plain weights."""
    for module in net.modules():
        if isinstance(module, Linear) and module.kernel is _product:
            if module.packed is not None and module.weight.is_meta:
                module.weight = nn.Parameter(module.packed.to_dense().reshape(module.weight.shape))
            module.packed = module.kernel = None


def use_training_kernels(net: nn.Module) -> None:
    """Let oneDNN multiply every `Linear` of a network that is trained, where it gains by that; no weight changes."""
    if _HAS_ONEDNN:
        for module in net.modules():
            if isinstance(module, Linear) and module.packed is None:
                module.kernel = _trained_product


def _uses(net: nn.Module) -> dict[int, int]:
    """id of each parameter -> how many modules have it."""
    return Counter(
        id(parameter) for module in net.modules() for parameter in module.parameters(recurse=False)
    )


def _packable(weight: Tensor) -> bool:
    if not can_pack() or weight.device.type != "cpu":
        return False
    half = weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return half or weight.dtype == torch.float32


def _pack(layer: Linear, weight: Tensor) -> None:
    layer.packed = _REORDER(weight, None)  # pyright: ignore[reportOptionalCall]
    layer.kernel = _product


def _trained_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _gains_by_onednn(x, weight):
        return _OnednnLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return nn.functional.linear(x, weight, bias)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN, in float32; weight `[out, in]` with any strides, or packed."""
    return _POINTWISE(x, weight, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]


def _gains_by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether an unpacked product is float32 on a CPU, and large enough."""
    return (
        _HAS_ONEDNN
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _WORTH_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _OnednnLinear(torch.autograd.Function):
    """`nn.functional.linear` for training on a CPU: all three products by oneDNN.

    torch's own float32 products are MKL's there, which is slow on processors of other makers: measured on one Zen 5
    core, 115 GFLOP/s against 250 forward and 200 backward. The sums are the same up to float32 rounding.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _ = inputs
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [rows, out]
        of_x = None if weight is None else _product(rows, weight.t(), None).view(*grad.shape[:-1], -1)
        of_weight = None if x is None else _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
        return of_x, of_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
