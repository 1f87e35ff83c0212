"""Linear layers on oneDNN: weights packed for inference on a CPU and unpacked again; plain weights in training.

Packing copies a weight into oneDNN's blocked layout and multiplies with oneDNN's kernels. Measured on one 2-core
AVX-512 machine against torch's default kernel: in float32 1.6 to 4 times as fast for 1 to 24 rows (a decoding step)
and 2.1 times for 577 rows (an image); in bfloat16 2 times for 1 row, 1.6 for 4, equal for 128. The sums are the same
up to rounding. A packed weight has no gradient, so training unpacks; the gradient of a layer's input, for explanations,
unpacks a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightloop.nn.attention import Linear

_REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_HAS_ONEDNN = _POINTWISE is not None and torch.backends.mkldnn.is_available()
# Multiplications (rows * in * out) from which oneDNN is faster in training; below, its call costs more than it saves.
_MIN_ONEDNN_PRODUCTS = 1 << 22


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed linear layers."""
    return _HAS_ONEDNN and _REORDER is not None


def pack(net: nn.Module) -> None:
    """Pack every `Linear` on the CPU in place: in float32, and in bfloat16 where the processor supports it.

    The plain weight is dropped unless another module shares it (tied embeddings). A shared weight of more than a tenth
    of the network is not packed, since both copies would be kept; in float32 oneDNN multiplies with the plain weight.
    Measured at 50,304 x 1024: 9.4 ms for 1 row and 12 ms for 3; torch takes 10.3 and 39, packed weights 7.3 and 8.8.
    """
    max_copied = sum(p.numel() for p in net.parameters()) / 10
    owner_counts = _owner_counts(net)
    for module in net.modules():
        if isinstance(module, Linear) and module.packed is None and _can_pack_weight(module.weight):
            unshared = owner_counts[id(module.weight)] == 1
            if unshared or module.weight.numel() <= max_copied:
                _pack_layer(module, module.weight.detach())
            elif module.weight.dtype == torch.float32:
                module.kernel = _inference_linear
            if unshared:  # its values are in `packed` alone; `unpack` restores them exactly
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)


def pack_hook(net: nn.Module) -> Callable[[str, Tensor], bool]:
    """Weight hook that packs the weights of a network one by one while they are read.

    Packing during loading avoids holding a plain and a packed copy of the network at once. Weights that several modules
    share are left to `pack`.

    Returns:
        hook(parameter name, weight `[out, in]`) -> whether the weight was packed, and so must not be kept.
    """
    owner_counts = _owner_counts(net)
    layers = {
        f"{name}.weight": module
        for name, module in net.named_modules()
        if isinstance(module, Linear) and owner_counts[id(module.weight)] == 1
    }

    def hook(name: str, weight: Tensor) -> bool:
        packable = name in layers and _can_pack_weight(weight)
        if packable:
            _pack_layer(layers[name], weight)
        return packable

    return hook


def unpack(net: nn.Module) -> None:
    """Undo `pack`, bit for bit: saving and training need the plain weights."""
    for module in net.modules():
        if isinstance(module, Linear) and module.kernel is _inference_linear:
            if module.packed is not None and module.weight.is_meta:
                module.weight = nn.Parameter(module.packed.to_dense().reshape(module.weight.shape))
            module.packed = module.kernel = None


def use_training_kernels(net: nn.Module) -> None:
    """Multiply with oneDNN in every `Linear` in training, where that is faster; weights stay as they are."""
    if _HAS_ONEDNN:
        for module in net.modules():
            if isinstance(module, Linear) and module.packed is None:
                module.kernel = _trainable_linear


def _owner_counts(net: nn.Module) -> dict[int, int]:
    """id of each parameter -> number of modules that hold it."""
    return Counter(
        id(parameter) for module in net.modules() for parameter in module.parameters(recurse=False)
    )


def _can_pack_weight(weight: Tensor) -> bool:
    if not can_pack() or weight.device.type != "cpu":
        return False
    half = weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return half or weight.dtype == torch.float32


def _pack_layer(layer: Linear, weight: Tensor) -> None:
    layer.packed = _REORDER(weight, None)  # pyright: ignore[reportOptionalCall]
    layer.kernel = _inference_linear


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN: x `[..., in]`, weight `[out, in]` with any strides, or packed -> `[..., out]`."""
    return _POINTWISE(x, weight, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]


def _inference_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_onednn_linear`, differentiable in x where x asks for it."""
    if x.requires_grad:
        return _OnednnLinearFunction.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _onednn_linear(x, weight, bias)


def _trainable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with a gradient, by oneDNN where that is faster: x `[..., in]` -> `[..., out]`."""
    if _is_faster_with_onednn(x, weight):
        return _OnednnLinearFunction.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return nn.functional.linear(x, weight, bias)


def _is_faster_with_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is in float32 on a CPU and large enough: x `[..., in]`, weight `[out, in]`, unpacked."""
    return (
        _HAS_ONEDNN
        and weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * weight.shape[0] >= _MIN_ONEDNN_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _LinearContext(Protocol):
    """The part of autograd's context object that `_OnednnLinearFunction` uses."""

    saved_tensors: tuple[Tensor | None, Tensor | None]
    needs_input_grad: tuple[bool, bool, bool]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _OnednnLinearFunction(torch.autograd.Function):
    """`nn.functional.linear` on a CPU, with all three products by oneDNN; a packed weight has no gradient of its own.

    torch's own float32 products are MKL's there, which are slow on non-Intel processors: measured on one Zen 5 core,
    115 GFLOP/s against oneDNN's 250 forward and 200 backward. The sums are the same up to float32 rounding.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def setup_context(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _LinearContext, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        x, weight, _ = inputs
        x_needs_grad, weight_needs_grad, _ = ctx.needs_input_grad
        # The gradient of x needs the weight, and that of the weight needs x.
        ctx.save_for_backward(x if weight_needs_grad else None, weight if x_needs_grad else None)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _LinearContext, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # [rows, out]
        if weight is not None and weight.is_mkldnn:
            weight = weight.to_dense().reshape(rows.shape[1], -1)  # [out, in]
        # dx = dy W [..., in];  dW = dy^T x [out, in];  db = sum of dy over the rows [out]
        grad_x = None if weight is None else _onednn_linear(rows, weight.t(), None).view(*grad.shape[:-1], -1)
        grad_weight = None if x is None else _onednn_linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
