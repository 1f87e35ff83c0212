"""Linear layers packed for fast inference on a CPU, and back.

Packing copies a float32 weight into the blocked layout of oneDNN and multiplies with oneDNN's kernels. Measured on one
2-core AVX-512 machine against the default kernel: 1.6-4x from 1 to 24 rows (a decoding step), 2.1x at 577 rows (a
picture); the sums are the same up to float32 rounding. The op has no gradient, so only inference packs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sightread.nn.attention import Linear

_REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)


def can_pack() -> bool:
    """Whether this build of torch has oneDNN's packed linear layers."""
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _REORDER is not None
        and torch.backends.mkldnn.is_available()
    )


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
