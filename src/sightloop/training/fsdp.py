"""Fully sharded training (FSDP2): each process keeps a part of the weights, moments and EMAs.

The units of sharding are the parts of blocks: each self-attention, cross-attention and MLP is gathered when it runs,
and freed afterwards. BLIP's encoder and decoder share these modules, so that a shared module is one unit. The
projection of a memory's keys and values runs on its own and is a unit too. Units have 90 % of the weights of BLIP base
and 81 % of CLIP B/32. All other parameters (embeddings, norms, heads) are replicated, and
`distributed.reduce_gradients` sums their gradients.

Gathering is collective, so all processes must run the same units in the same order. In a step in which they would not
(one process has no questions, or more micro-batches) all units are gathered before, and their gradients summed after.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager

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
from sightloop.protocols import ImageNetwork, require
from sightloop.training.dataloader import Batch
from sightloop.training.distributed import World, agree, any_of, full_tensor


class FSDP:
    """A network and its EMAs (teacher, average), sharded in place in the same way, so that `update_ema` is local.

    All methods are collective.

    Args:
        networks: the network in training, then its EMAs.
        ranks: the processes.
        bfloat16: gather units in bfloat16 for autocast, and sum their gradients in float32.
    """

    def __init__(self, networks: Sequence[nn.Module], ranks: World, *, bfloat16: bool) -> None:
        # torch warns that a unit's output, a view, must not be changed in place; blocks add to it out of place.
        warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view", UserWarning)
        network = networks[0]
        self._ranks = ranks
        self._units = _units(network)
        self._ran: set[nn.Module] = set()
        # The modules before sharding, with their tied parameters, on the meta device.
        self._empty = _with(network, {id(p): p.to("meta") for p in network.parameters()})
        self._autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=bfloat16)
        self._mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        self._policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bfloat16 else None,
            reduce_dtype=torch.float32 if bfloat16 else None,
            cast_forward_inputs=False,
        )
        self._roots = [self._shard(module) for module in networks]
        for unit in self._units:
            unit.register_forward_hook(self._record)

    def _shard(self, network: nn.Module) -> FSDPModule:
        """Shards the units of a network; returns its FSDP root."""
        units = _units(network)
        inside = {parameter for unit in units for parameter in unit.parameters()}
        for unit in units:
            # Sums of gradients, not means; without a factor, which Gloo lacks.
            sharded = fully_shard(unit, mesh=self._mesh, reshard_after_forward=True, mp_policy=self._policy)
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        root = fully_shard(_Root(network), mesh=self._mesh, ignored_params=set(network.parameters()) - inside)
        with torch.no_grad(), self._autocast:  # FSDP takes the module that runs first for the root
            require(root, nn.Module)(self._ranks.device)
        root.reset_iter_state()
        return root

    def _record(self, unit: nn.Module, inputs: object, output: object) -> None:
        if torch.is_grad_enabled():
            self._ran.add(unit)

    def runs_alike(self, batch: Batch, micro_batch: int) -> bool:
        """Whether all processes run the same units, in as many micro-batches, for their rows of a batch."""
        texts = (batch.captions, batch.lm_captions, batch.questions)
        rows = [len(batch.keys), int((batch.labels >= 0).sum())]
        rows += [0 if text is None else len(text.image_rows) for text in texts]
        size = micro_batch
        return agree([math.ceil(count / size) if size else min(count, 1) for count in rows], self._ranks)

    @contextmanager
    def step(self, *, alike: bool) -> Generator[None]:
        """Context of the forward and backward passes; after it each sharded parameter has its part of the gradient.

        Args:
            alike: result of `runs_alike`.
        """
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
        """Gathers all units, so that passes through them are not collective; or returns to gathering each unit."""
        for root in self._roots:
            root.set_reshard_after_forward(not on)
            root.set_reshard_after_backward(not on)
            root.set_requires_gradient_sync(not on)
            for unit in _units(require(root, nn.Module)) if on else ():
                require(unit, FSDPModule).unshard()

    def _reduce(self) -> None:
        """Sums the accumulated gradients, in the backward pass of one more unit."""
        ran = any_of([unit in self._ran for unit in self._units], self._ranks)
        self._roots[0].set_reduce_scatter_unused_params(True)
        unit = require(self._units[0], Attention)
        zeros = torch.zeros(1, 1, unit.qkv.weight.shape[1], device=self._ranks.device, requires_grad=True)
        with self._autocast:
            zero = unit(zeros).sum() * 0
        zero.backward()
        self._roots[0].set_reduce_scatter_unused_params(False)
        for unit, was_used in zip(self._units, ran, strict=True):
            for parameter in () if was_used else unit.parameters():
                parameter.grad = None

    def full_copy(self, network: nn.Module) -> nn.Module:
        """A copy of the network or an EMA with full parameters on the first process; on others, on the meta device."""
        filled: dict[int, Tensor] = {}
        for (_, empty), part in zip(self._empty.named_parameters(), network.parameters(), strict=True):
            tensor = full_tensor(part.detach())
            if self._ranks.first:
                filled[id(empty)] = tensor.clone()
        return _with(self._empty, filled)


class _Root(nn.Module):
    """A network with the forward pass that FSDP needs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, device: torch.device) -> None:
        """Encodes an empty image, so that FSDP initializes its units."""
        network = require(self.network, ImageNetwork)
        side = network.config.vision.image_size
        network.encode_image(torch.zeros(1, 3, side, side, device=device))


def _units(network: nn.Module) -> list[nn.Module]:
    """The modules to shard, each once, inner ones first."""
    units: dict[nn.Module, None] = {}
    for block in network.modules():
        if isinstance(block, Block):
            inner = [block.cross.kv, block.cross] if hasattr(block, "cross") else []
            units |= dict.fromkeys([block.attn, *inner, block.mlp])
    return [*units]


def _with(network: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """A copy of the modules with parameters replaced by id; tied parameters stay tied."""
    return copy.deepcopy(network, {key: nn.Parameter(value, False) for key, value in tensors.items()})
