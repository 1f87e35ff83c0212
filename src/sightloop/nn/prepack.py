"""Linear layers with their quickest kernel: weights packed for inference on a CPU and unpacked again; plain weights in
training.

Which layers are packed, `nn.kernels` chooses. Packing copies a weight into oneDNN's blocked layout; the sums are the
same up to rounding. A packed weight has no gradient, so training unpacks; the gradient of a layer's input, for
explanations, unpacks a copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightloop.nn.attention import Linear, use_products_where
from sightloop.nn.blocks import Convolution, UpConvolution
from sightloop.nn.kernels import (
    HAS_ONEDNN,
    MOST,
    ONE,
    ROW_COUNTS,
    LinearByRows,
    Shape,
    Times,
    add_times,
    best_seconds,
    can_pack,
    choose,
    is_known,
    kernel_of,
    measure,
    onednn_linear,
    pack_weight,
    pin,
    pinned,
    prefers_products,
    row_classes,
)
from sightloop.nn.quantize import is_quantized

__all__ = [
    "MOST", "ONE", "ROW_COUNTS", "Shape", "Times", "add_times", "best_seconds", "is_known", "measure", "pack",
    "pack_hook", "pin", "pinned", "timed_shapes", "unpack", "use_training_kernels",
]  # fmt: skip

# Multiplications (rows * in * out) from which oneDNN is faster in training; below, its call costs more than it saves.
_MIN_ONEDNN_PRODUCTS = 1 << 22
_MIN_TIMED = 1 << 12  # weights of a layer that is worth timing


def timed_shapes(net: nn.Module, dtype: torch.dtype, leave_out: Container[str] = ()) -> dict[Shape, set[int]]:
    """The weights of a network's linear layers that are to be timed, and the row counts that those layers see.

    Args:
        net: with weights or, on the meta device, without.
        dtype: that the weights have or will have.
        leave_out: names of parameters that are not multiplied in that dtype, being quantized.
    """
    shapes: dict[Shape, set[int]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, Linear) and f"{name}.weight" not in leave_out:
            rows, columns = module.weight.shape
            if rows * columns >= _MIN_TIMED:
                shapes.setdefault(Shape(rows, columns, dtype), set()).update(row_classes(name))
    return shapes


def pack(net: nn.Module) -> None:
    """Give every `Linear` on the CPU its kernel, and pack its weight where that is the choice, in place.

    The plain weight is dropped unless another module shares it (tied embeddings). A shared weight of more than a tenth
    of the network is not packed, since both copies would be kept; in float32 oneDNN then multiplies with the plain one.
    Measured at 50,304 x 1024: 9.4 ms for 1 row and 12 ms for 3; torch takes 10.3 and 39, packed weights 7.3 and 8.8.
    """
    use_products_where(prefers_products)
    max_copied = sum(p.numel() for p in net.parameters()) / 10
    owner_counts, classes = _owner_counts(net), _classes(net)
    doubling = _doubling(net)
    for module in net.modules():
        if isinstance(module, Convolution) and module.packed is None and _packs(module.weight):
            pack_convolution(module, module.weight.detach(), doubles=module in doubling)
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
        if not isinstance(module, Linear) or module.packed is not None or is_quantized(module):
            continue
        if not _is_packable(module.weight):
            continue
        unshared = owner_counts[id(module.weight)] == 1
        packable = unshared or module.weight.numel() <= max_copied
        choice = choose(_shape(module.weight), classes[id(module)], packable=packable)
        if choice.packed:
            _pack_layer(module, module.weight.detach())
            if unshared:  # its values are in `packed` alone; `unpack` restores them exactly
                module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
        else:
            module.kernel = kernel_of(choice, _inference_linear)


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
    classes, doubling = _classes(net), _doubling(net)
    convolutions = {f"{n}.weight": m for n, m in net.named_modules() if isinstance(m, Convolution)}

    def hook(name: str, weight: Tensor) -> bool:
        convolution = convolutions.get(name)
        if convolution is not None and _packs(weight):
            pack_convolution(convolution, weight, doubles=convolution in doubling)
            return True
        layer = layers.get(name)
        if layer is None or not _is_packable(weight):
            return False
        packed = choose(_shape(weight), classes[id(layer)]).packed
        if packed:
            _pack_layer(layer, weight)
        return packed

    return hook


def pack_convolution(layer: Convolution, weight: Tensor, *, doubles: bool) -> None:
    """Give a convolution oneDNN's kernel and layout, of its weight `[out, in, k, k]`.

    With `doubles` it does the doubling of resolution before it too: of the pixels that share a nearest neighbor each
    sees two rows and two columns of the smaller map, so that four 2 x 2 convolutions there do the work of one of 3 x 3
    at twice the resolution, with 16 products for 36.
    """
    stride, padding = layer.stride, layer.padding
    if doubles:
        seen = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # by even and odd pixels
        phases = torch.einsum("apk,bql,oikl->aboipq", seen, seen, weight)
        weight = phases.reshape(-1, weight.shape[1], 2, 2)  # [4 * out, in, 2, 2]
    layer.packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
        weight.to_mkldnn(), [padding] * 2, [stride] * 2, [1, 1], 1
    )

    def convolve(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, bias, [padding] * 2, [stride] * 2, [1, 1], 1, "none", [], ""
        )

    def convolve_doubled(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        phases = convolve(x, packed, bias.repeat(4)).chunk(4, dim=1)  # [B, C, H + 1, W + 1] each
        out = torch.empty(
            (rows, len(bias), 2 * height, 2 * width), dtype=x.dtype, memory_format=torch.channels_last
        )
        for i, phase in enumerate(phases):
            row, column = divmod(i, 2)
            out[:, :, row::2, column::2] = phase[:, :, row : row + height, column : column + width]
        return out

    layer.kernel = convolve_doubled if doubles else convolve


def _doubling(net: nn.Module) -> set[nn.Module]:
    """Convolutions that see their input at twice its resolution."""
    return {module.conv for module in net.modules() if isinstance(module, UpConvolution)}


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN's layout is used for a convolution: float32 on a CPU."""
    return (
        HAS_ONEDNN and weight.device.type == "cpu" and weight.dtype == torch.float32 and pinned() != "plain"
    )


def unpack(net: nn.Module) -> None:
    """Undo `pack`, bit for bit: saving and training need the plain weights."""
    for module in net.modules():
        if isinstance(module, Linear) and (
            module.kernel is _inference_linear or isinstance(module.kernel, LinearByRows)
        ):
            if module.packed is not None and module.weight.is_meta:
                module.weight = nn.Parameter(module.packed.to_dense().reshape(module.weight.shape))
            module.packed = module.kernel = None


def use_training_kernels(net: nn.Module) -> None:
    """Multiply with oneDNN in every `Linear` in training, where that is faster; weights stay as they are."""
    if HAS_ONEDNN:
        for module in net.modules():
            if isinstance(module, Linear) and module.packed is None:
                module.kernel = _trainable_linear


def _owner_counts(net: nn.Module) -> dict[int, int]:
    """id of each parameter -> number of modules that hold it."""
    return Counter(
        id(parameter) for module in net.modules() for parameter in module.parameters(recurse=False)
    )


def _classes(net: nn.Module) -> dict[int, set[int]]:
    """id of each linear layer -> the row counts that it sees, under any of its names."""
    classes: dict[int, set[int]] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        if isinstance(module, Linear):
            classes.setdefault(id(module), set()).update(row_classes(name))
    return classes


def _shape(weight: Tensor) -> Shape:
    return Shape(weight.shape[0], weight.shape[1], weight.dtype)


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and can_pack(weight.dtype)


def _pack_layer(layer: Linear, weight: Tensor) -> None:
    layer.packed, layer.kernel = pack_weight(weight), _inference_linear


def _inference_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`onednn_linear`, differentiable in x where x asks for it."""
    if x.requires_grad:
        return _OnednnLinearFunction.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return onednn_linear(x, weight, bias)


def _trainable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with a gradient, by oneDNN where that is faster: x `[..., in]` -> `[..., out]`."""
    if _is_faster_with_onednn(x, weight):
        return _OnednnLinearFunction.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return nn.functional.linear(x, weight, bias)


def _is_faster_with_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether the product is in float32 on a CPU and large enough: x `[..., in]`, weight `[out, in]`, unpacked."""
    return (
        HAS_ONEDNN
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
        return onednn_linear(x, weight, bias)

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
        grad_x = None if weight is None else onednn_linear(rows, weight.t(), None).view(*grad.shape[:-1], -1)
        grad_weight = None if x is None else onednn_linear(rows.t(), x.reshape(-1, x.shape[-1]).t(), None)
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
