"""The one linear layer, and its packed form for fast inference on a CPU.

Packing copies a float32 weight into the blocked layout of oneDNN and multiplies with oneDNN's kernels. Measured on one
2-core AVX-512 machine against the default kernel: 1.6-4x from 1 to 24 rows (a decoding step), 2.1x at 577 rows (a
picture); the sums are the same up to float32 rounding. The op has no gradient, so only inference packs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


class Linear(nn.Module):
    """y = x W^T + b. weight `[out, in]`, bias `[out]` or None; x `[..., in]` -> `[..., out]`."""

    def __init__(self, width_in: int, width_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.bias = nn.Parameter(torch.empty(width_out)) if bias else None
        self.packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is not None:
            return _POINTWISE(x, self.packed, self.bias, "none", [], "")  # pyright: ignore[reportOptionalCall]
        return nn.functional.linear(x, self.weight, self.bias)


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed linear layers."""
    return _POINTWISE is not None and _REORDER is not None and torch.backends.mkldnn.is_available()


def pack(net: nn.Module) -> None:
    """Pack every float32 `Linear` on the CPU in place; the plain weight is dropped unless another module shares it."""
    if not can_pack():
        return
    uses: dict[int, int] = {}
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for module in net.modules():
        if isinstance(module, Linear) and module.packed is None and _packable(module.weight):
            module.packed = _REORDER(module.weight.detach(), None)  # pyright: ignore[reportOptionalCall]
            if uses[id(module.weight)] == 1:
                # The bytes now live in `packed`; `unpack` brings them back exactly.
                module.weight = nn.Parameter(
                    torch.empty_like(module.weight, device="meta"), requires_grad=False
                )


def unpack(net: nn.Module) -> None:
    """Undo `pack`, bit for bit: saving and training need the plain weights."""
    for module in net.modules():
        if isinstance(module, Linear) and module.packed is not None:
            if module.weight.is_meta:
                module.weight = nn.Parameter(module.packed.to_dense().reshape(module.weight.shape))
            module.packed = None


def _packable(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.device.type == "cpu"
