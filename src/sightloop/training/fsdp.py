"""Networks too large to lie whole on every process: each keeps a part of the weights, moments and followers (FSDP2).

Sharded is what blocks are made of: every self-attention, cross-attention and MLP is a unit, gathered when it runs and
let go of afterwards. They are what BLIP's encoder and decoder share, so that a module of two blocks is one unit; the
keys and values of a memory are asked for on their own, and are a unit too. That is 90 % of BLIP base and 81 % of CLIP
B/32. All else (words, positions, norms, heads) lies whole on every process, its gradients summed by
`ranks.sum_gradients`.

All processes gather a unit together, so they must run the same units in the same order. In a step in which they would
not (one has no questions, or more chunks) all units are gathered before it, and their gradients summed after it.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)

from sightloop.nn.attention import Attention
from sightloop.nn.blocks import Block
from sightloop.training.dataloader import Batch
from sightloop.training.distributed import World, agree, any_of, full_tensor


class FSDP:
    """A network and its followers (teacher, average), sharded in place and alike, so that `follow` goes part by part.

    networks: the one that learns, then the others. bfloat16: for autocast; units are gathered in it, their gradients
    are summed in float32. All processes make one together, and all call each of its methods together.
    """

    def __init__(self, networks: Sequence[nn.Module], ranks: World, *, bfloat16: bool) -> None:
        # A unit's output is a view, which torch says may not be changed in place; blocks add to it out of place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
        network = networks[0]
        self._ranks = ranks
        self._units = _units(network)
        self._ran: set[nn.Module] = set()
        # The modules as they were, tied as they were, with nothing in them.
        self._empty = _with(network, {id(p): p.to("meta") for p in network.parameters()})
        self._autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=bfloat16)
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        self._policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None,
            reduce_dtype=torch.float32 if bfloat16 else None,
            cast_forward_inputs=False,
        )
        self._roots = [self._sharded(one) for one in networks]
        for unit in self._units:
            unit.register_forward_hook(self._note)

    def _sharded(self, network: nn.Module) -> FSDPModule:
        """Shard the units of a network; what they all belong to."""
        units = _units(network)
        inside = {parameter for unit in units for parameter in unit.parameters()}
        for unit in units:
            # Gradients are sums of shares, not means. Gloo has no sum with a factor, but a plain one.
            sharded = fully_shard(unit, mesh=self._mesh, reshard_after_forward=True, mp_policy=self._policy)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        root = fully_shard(_Root(network), mesh=self._mesh, ignored_params=set(network.parameters()) - inside)
        with torch.no_grad(), self._autocast:  # FSDP takes what runs first for the root
            cast(Any, root)(self._ranks.device)
        root.reset_iter_state()
        return root

    def _note(self, unit: nn.Module, inputs: object, output: object) -> None:
        if torch.is_grad_enabled():
            self._ran.add(unit)

    def runs_alike(self, batch: Batch, chunk: int) -> bool:
        """Whether all processes will run the same units, in as many parts, for their rows of this batch."""
        texts = (batch.captions, batch.lm_captions, batch.questions)
        rows = [len(batch.keys), int((batch.labels >= 0).sum())]
        rows += [0 if text is None else len(text.image_rows) for text in texts]
        return agree([math.ceil(count / chunk) if chunk else min(count, 1) for count in rows], self._ranks)

    @contextmanager
    def step(self, *, alike: bool) -> Generator[None]:
        """Around the forward and backward passes: afterwards each sharded parameter has its part of the gradient."""
        if not alike:
            self._gather(True)
        yield
        if not alike:
            self._gather(False)
            self._reduce()
        for root in self._roots:
            root.reset_iter_state()
        self._ran.clear()

    def _gather(self, on: bool) -> None:
        """Whether all units lie whole on all processes and a pass through them exchanges nothing."""
        for root in self._roots:
            root.set_reshard_after_forward(not on)
            root.set_reshard_after_backward(not on)
            root.set_requires_gradient_sync(not on)
            for unit in _units(cast(nn.Module, root)) if on else ():
                cast(FSDPModule, unit).unshard()

    def _reduce(self) -> None:
        """Sum the gradients that the processes have gathered up: all of them when the next backward pass ends."""
        ran = any_of([unit in self._ran for unit in self._units], self._ranks)
        self._roots[0].set_reduce_scatter_unused_params(True)
        unit = cast(Attention, self._units[0])
        zeros = torch.zeros(1, 1, unit.qkv.weight.shape[1], device=self._ranks.device, requires_grad=True)
        with self._autocast:
            zero = unit(zeros).sum() * 0
        zero.backward()
        self._roots[0].set_reduce_scatter_unused_params(False)
        for unit, was_used in zip(self._units, ran, strict=True):
            for parameter in () if was_used else unit.parameters():
                parameter.grad = None

    def full_copy(self, network: nn.Module) -> nn.Module:
        """A copy of the network (or of a follower) in one piece, on the first process; an empty one on the others."""
        filled: dict[int, Tensor] = {}
        for (_, empty), part in zip(self._empty.named_parameters(), network.parameters(), strict=True):
            tensor = full_tensor(part.detach())
            if self._ranks.first:
                filled[id(empty)] = tensor.clone()
        return _with(self._empty, filled)


class _Root(nn.Module):
    """A network with a forward pass, which FSDP asks for."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, device: torch.device) -> None:
        """Run some of it, for nothing."""
        side = self.network.config.vision.image_size
        self.network.encode_image(torch.zeros(1, 3, side, side, device=device))


def _units(network: nn.Module) -> list[nn.Module]:
    """What is sharded, each module once, inner ones first."""
    units: dict[nn.Module, None] = {}
    for block in network.modules():
        if isinstance(block, Block):
            inner = [block.cross.kv, block.cross] if hasattr(block, "cross") else []
            units |= dict.fromkeys([block.attn, *inner, block.mlp])
    return [*units]


def _with(network: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy of the modules, in which parameters are replaced by id; those that are one stay one."""
    return copy.deepcopy(network, {key: nn.Parameter(value, False) for key, value in tensors.items()})
