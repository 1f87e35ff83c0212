"""One engine for key maps: our parameter names <- checkpoint names, strict both ways, and its exact inverse.

A map is data. Keys are our names, values the names in the checkpoint, `{}` is a layer index (several are filled in
order), and a name without its last part means both `.weight` and `.bias`:

    {"vision.blocks.{}.mlp.fc1": "vision_model.encoder.layers.{}.mlp.fc1",
     "vision.blocks.{}.attn.qkv": cat("...q_proj", "...k_proj", "...v_proj")}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sightloop.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Rule:
    """How one of our tensors is read from, and written back to, one or more tensors of a checkpoint.

    first_row: where what is written begins in foreign, if that is put together from several of ours.
    """

    names: tuple[str, ...]
    read: Callable[[list[Tensor]], Tensor]
    write: Callable[[Tensor], list[Tensor]]
    first_part: int | None = None


KeyMap = Mapping[str, "str | Rule"]


class RenamedTensors(Mapping[str, Tensor]):
    """Tensors under other names (names: other name -> their own), each still read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class PartTensors(Mapping[str, Tensor]):
    """The tensors of several parts in one mapping, "unet.conv_in.weight" of the part "unet"; read when asked for."""

    def __init__(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> Tensor:
        part, _, rest = name.partition(".")
        return self._parts[part][rest]

    def __contains__(self, name: object) -> bool:
        part, _, rest = str(name).partition(".")
        return part in self._parts and rest in self._parts[part]

    def __iter__(self) -> Iterator[str]:
        return (f"{part}.{name}" for part, tensors in self._parts.items() for name in tensors)

    def __len__(self) -> int:
        return sum(map(len, self._parts.values()))


def cat(*names: str) -> Rule:
    """Our tensor is foreign, joined along the first dimension in equal parts (fused projections)."""
    return _concatenate(names, [1] * len(names))


def cat_grouped_query(heads: int, kv_heads: int, *names: str) -> Rule:
    """Queries, keys and values, joined; keys and values have `kv_heads` heads for the queries' `heads`."""
    return _concatenate(names, [heads, kv_heads, kv_heads])


def _concatenate(names: tuple[str, ...], shares: list[int]) -> Rule:
    def read(parts: list[Tensor]) -> Tensor:
        if any(
            len(part) * shares[0] != len(parts[0]) * share for part, share in zip(parts, shares, strict=True)
        ):
            raise ValueError("the parts are not of their shares")
        return torch.cat(parts)

    def write(ours: Tensor) -> list[Tensor]:
        one = len(ours) // sum(shares)
        return [part.contiguous() for part in ours.split([share * one for share in shares])]

    return Rule(names, read, write)


def transposed(name: str) -> Rule:
    """Our matrix is foreign, transposed."""
    return Rule((name,), lambda t: t[0].t().contiguous(), lambda ours: [ours.t().contiguous()])


def row_slice(name: str, start: int, stop: int, parts: int) -> Rule:
    """Ours is parts `start` to `stop` of foreign, cut along the first dimension into `parts` equal parts (a fused
    projection that we keep in two)."""

    def read(tensors: list[Tensor]) -> Tensor:
        each, left = divmod(len(tensors[0]), parts)
        if left:
            raise ValueError(f"{len(tensors[0])} rows cannot be cut into {parts}")
        return tensors[0][start * each : stop * each].clone()

    return Rule((name,), read, _write_unchanged, start)


def squeezed(name: str, dims: int) -> Rule:
    """Their tensor has `dims` more dimensions of size 1 in front."""
    return Rule(
        (name,),
        lambda t: t[0].reshape(t[0].shape[dims:]) if t[0].shape[:dims] == (1,) * dims else t[0],
        lambda ours: [ours.reshape((1,) * dims + tuple(ours.shape))],
    )


def rule_for(name: str, keys: KeyMap | None) -> Rule:
    """The rule of one of our parameter names, its layer index and suffix filled in; without a map, the name itself."""
    if keys is None:
        return Rule((name,), _read_first, _write_unchanged)
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
    stem, _, suffix = pattern.rpartition(".")
    value = keys.get(pattern)
    ending = ""
    if value is None:
        value, ending = keys[stem], f".{suffix}"
    rule = Rule((value,), _read_first, _write_unchanged) if isinstance(value, str) else value
    names = tuple(foreign.format(*numbers) + ending for foreign in rule.names)
    return Rule(names, rule.read, rule.write, rule.first_part)


def load_weights(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    keys: KeyMap | None,
    *,
    ignore: Sequence[str] = (),
    source: str = "",
    weight_hook: Callable[[str, Tensor], bool] | None = None,
) -> None:
    """Give `net` (built on the meta device) its weights, each read once and nothing kept of it but what `net` holds.

    ignore: patterns of names that may be left over. take: is asked for each of our names with its value, and says
    whether it has put it elsewhere (`nn.quantize`, `nn.prepack`); the parameter then stays without memory.

    Raises CheckpointError that lists every missing, misshapen and unknown tensor by name.
    """
    shared = tied_names(net)
    rules = {name: rule_for(name, keys) for name in net.state_dict()}
    used = {name for rule in rules.values() for name in rule.names}
    parameters = {k: v for k, v in net.state_dict(keep_vars=True).items() if k not in shared}
    missing = [name for ours in parameters for name in rules[ours].names if name not in tensors]
    misshapen: list[str] = []
    state: dict[str, Tensor] = {}
    # The largest first: what it takes beside a weight, to put it together or to pack it, is then needed while there is
    # room, and the process never holds much more than the weights. Of equals the last, as a head may become fewer bits.
    for ours in sorted(parameters, key=lambda name: parameters[name].numel())[::-1]:
        parameter = parameters[ours]
        if any(name not in tensors for name in rules[ours].names):
            continue
        value = _read_or_none(rules[ours], tensors)
        if value is None or not _matches_parameter(value, parameter):
            misshapen.append(_describe_misfit(ours, parameter, rules[ours], tensors))
            continue
        for alias in (alias for alias, first in shared.items() if first == ours):
            if _alias_differs(rules[alias], value, tensors):
                names = ", ".join(rules[alias].names)
                misshapen.append(f"{names} (differs from the tensor that it is shared with)")
        state[ours] = value.to("meta") if weight_hook is not None and weight_hook(ours, value) else value
        del value  # before the next one is read
    unknown = [name for name in tensors if name not in used and not any(re.search(p, name) for p in ignore)]
    _raise_for_misfits(source, missing, misshapen, unknown)
    for alias, ours in shared.items():
        state[alias] = state[ours]
    net.load_state_dict(state, strict=True, assign=True)
    for alias, ours in shared.items():  # assigning made one parameter a name; share them again
        parent, _, leaf = alias.rpartition(".")
        setattr(net.get_submodule(parent), leaf, net.get_parameter(ours))
    for parameter in net.parameters():
        parameter.requires_grad_(False)


def export_state_dict(net: nn.Module, keys: KeyMap) -> dict[str, Tensor]:
    """The checkpoint's tensors, sharing the network's memory where the numbers and their order are the same.

    Tied matrices (one parameter, two modules) are left out under their second name, as the reference does; tensors of
    shared modules are written under every name. Classes that were learned stay behind: no other layout has them.
    """
    tied = {name for name in tied_names(net) if name.endswith(("head.words.weight", ".head.weight"))}
    out: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for ours, value in net.state_dict().items():
        if ours not in tied and not ours.startswith("classes."):
            rule = rule_for(ours, keys)
            if rule.first_part is not None:
                pieces.setdefault(rule.names[0], {})[rule.first_part] = value
                continue
            out.update(zip(rule.names, rule.write(value), strict=True))
    return out | {name: torch.cat([parts[row] for row in sorted(parts)]) for name, parts in pieces.items()}


def native_state_dict(net: nn.Module) -> dict[str, Tensor]:
    """Our own layout: every parameter once, by its own name."""
    shared = tied_names(net)
    return {name: value.contiguous() for name, value in net.state_dict().items() if name not in shared}


def tied_names(net: nn.Module) -> dict[str, str]:
    """Names of shared parameters -> the first name of the same parameter."""
    first: dict[int, str] = {}
    out: dict[str, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            out[name] = owner
    return out


def count_layers(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group matches at the start of a name."""
    return 1 + max((int(m.group(1)) for name in names if (m := re.match(pattern, name))), default=-1)


def tensors_equal(tensors: Mapping[str, Tensor], pairs: Iterable[tuple[str, str]]) -> bool:
    """Whether the tensors of every pair of names are both there and equal, bit for bit."""
    return all(a in tensors and b in tensors and torch.equal(tensors[a], tensors[b]) for a, b in pairs)


def _read_first(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _write_unchanged(ours: Tensor) -> list[Tensor]:
    return [ours]


def _read_or_none(rule: Rule, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Our tensor; None where its parts do not fit together."""
    try:
        return rule.read([tensors[name] for name in rule.names])
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None


def _matches_parameter(value: Tensor, parameter: Tensor) -> bool:
    return value.shape == parameter.shape and value.is_floating_point() == parameter.is_floating_point()


def _describe_misfit(ours: str, parameter: Tensor, rule: Rule, tensors: Mapping[str, Tensor]) -> str:
    actual = ", ".join(f"{name} {_describe_tensor(tensors[name])}" for name in rule.names)
    return f"{actual} (expected {_describe_tensor(parameter)} for {ours})"


def _describe_tensor(tensor: Tensor) -> str:
    kind = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{kind}"


def _alias_differs(rule: Rule, value: Tensor, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has a tensor again that is shared, and not the same. It may be absent."""
    if any(name not in tensors for name in rule.names):
        return False
    foreign = _read_or_none(rule, tensors)
    return foreign is None or foreign.shape != value.shape or not torch.equal(foreign, value)


def _raise_for_misfits(source: str, missing: list[str], misshapen: list[str], unknown: list[str]) -> None:
    problems = [
        f"{len(names)} {what}: {_shorten(names)}"
        for what, names in (("missing", missing), ("misshapen", misshapen), ("unknown", unknown))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: the tensors do not fit the model that its config describes; put the config and the weights "
            f"of one checkpoint together. {'; '.join(problems)}"
        )


def _shorten(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
