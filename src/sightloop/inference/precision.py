"""`dtype="auto"`: the lowest precision that this machine multiplies natively and whose error is known.

On a GPU and on CPUs with AMX or AVX512-BF16: bfloat16; on a CPU only where its products are timed and quicker at the
checkpoint's shapes. On CPUs with VNNI alone: int8 weights and activations, for models without a language model. Else
float32, as on Apple's GPUs, where no error was measured. What each costs: docs/how-to/speed-and-memory.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sightloop.checkpoints.tensors import matrix_shapes
from sightloop.inference.kernel_cache import time_shapes
from sightloop.nn.attention import Linear
from sightloop.nn.prepack import MOST, ONE, Shape, best_seconds
from sightloop.nn.quantize import can_multiply_int8, has_language_model, has_vnni
from sightloop.types import Bits

_MIN_GAIN = 1.15  # of bfloat16 over float32: below, exactness is worth more
_TOKENS = 20  # of a caption
_SHAPES = 3  # distinct shapes that are timed, those with the most weights


def auto_dtype(device: torch.device, weights: Sequence[Path]) -> torch.dtype:
    """The dtype that "auto" stands for.

    Args:
        device: of the network.
        weights: the checkpoint's files.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    if device.type != "cpu" or not has_native_bfloat16():
        return torch.float32
    return torch.bfloat16 if bfloat16_gain(matrix_shapes(weights)) >= _MIN_GAIN else torch.float32


def auto_quantize(net: nn.Module, device: torch.device) -> Bits | None:
    """ "int8" where "auto" quantizes a network that stays in float32."""
    quantizes = device.type == "cpu" and has_vnni() and not has_native_bfloat16() and can_multiply_int8()
    return "int8" if quantizes and not has_language_model(net) else None


def auto_gain(net: nn.Module, device: torch.device) -> str:
    """What "auto" would gain over float32 for a loaded network, in words; "" for nothing."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else ""
    if device.type != "cpu":
        return ""
    if auto_quantize(net, device) is not None:
        return "int8 weights and activations"
    if has_native_bfloat16():
        layers = [m.weight.shape for m in net.modules() if isinstance(m, Linear)]
        gain = bfloat16_gain(Counter((shape[0], shape[1]) for shape in layers))
        if gain >= _MIN_GAIN:
            return f"bfloat16, whose products take 1/{gain:.1f} of the time on this processor"
    return ""


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself: AVX512-BF16 or AMX."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    checks = [getattr(torch.cpu, name, None) for name in names]
    return any(check is not None and bool(check()) for check in checks)


def bfloat16_gain(shapes: Counter[tuple[int, int]]) -> float:
    """How many times as long the products of a network's largest matrices take in float32 as in bfloat16.

    For one image and the `_TOKENS` tokens of a caption together: with AMX an image's products take a fifth of the time
    and a token's, of weights that are still in the caches, as much as before. 0 without times.

    Args:
        shapes: `[out, in]` -> how many weights have it.
    """
    most = sorted(shapes, key=lambda shape: -shape[0] * shape[1] * shapes[shape])[:_SHAPES]
    kinds = (torch.float32, torch.bfloat16)
    time_shapes({Shape(*shape, kind): {ONE, MOST} for shape in most for kind in kinds})
    single, half = (
        sum(
            shapes[shape] * (best_seconds(own, MOST) + _TOKENS * best_seconds(own, ONE))
            for shape in most
            for own in (Shape(*shape, kind),)
        )
        for kind in kinds
    )
    return single / half if half else 0.0
