"""Check that a network's numbers are finite before a result is made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from sightloop.errors import CheckpointError

_REMEDIES = {
    torch.float16: 'float16 overflows; load the model with dtype="bfloat16" or "float32" (--dtype float32)',
    torch.bfloat16: 'load the model with dtype="float32" (--dtype float32)',
}
_DAMAGED = "in float32 too, so its weights hold NaN or infinity; fetch or train the checkpoint again"


def require_finite(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """The values, if all are finite.

    Args:
        values: `[...]`, floats.
        what: their name in the message, plural ("image embeddings").
        dtype: of the network's weights, which the message names a remedy for.

    Raises:
        CheckpointError: NaN or infinity among them: NaN weights, or an overflow of float16.
    """
    if values.numel() and values.device.type == "cpu":
        # One pass without a mask of the same size, several times as fast: NaN and infinity survive both reductions.
        finite = bool(torch.isfinite(torch.stack(values.detach().aminmax())).all())
    else:
        finite = bool(torch.isfinite(values).all())
    if not finite:
        raise CheckpointError(f"the model's {what} are NaN or infinite: {_REMEDIES.get(dtype, _DAMAGED)}")
    return values


def require_finite_logits(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Next-token logits `[R, V]`, if each row has a finite greatest one; -inf bans a token. Raises CheckpointError."""
    require_finite(logits.amax(dim=-1), "next-token logits", dtype)
    return logits
