"""Kernels of linear layers and of attention on a CPU: timed once for each shape, and the quickest is used.

A linear layer keeps one copy of its weight: plain, multiplied by torch (`plain`, MKL where torch has it) or by oneDNN
(`onednn`), or in oneDNN's blocked layout (`packed`). Which is quickest depends on the processor and on the number of
rows, so `measure` times every shape of a network for the row counts that its layers see. Measured, float32, 768 x 2304,
one core of an AMD Zen 4 (GFLOP/s at 3, 24 and 577 rows): plain 31, 84, 96; packed 82, 112, 108. On an Intel Sapphire
Rapids the order of the last is the opposite.

The sums of all kernels are the same up to rounding. `pin` fixes one of them ("plain" or "packed"), and so does
`torch.use_deterministic_algorithms(True)` ("plain"): two processes then have the same numbers without shared times.

MKL's own packed layout is no candidate: it holds for one row count (another count's differs in 30 % of its bytes), and
the plain weight cannot be had back from it.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

# Row counts that are timed, and the least one that each stands for: a token, beams, beams of a batch, a small image, an
# image of 384 pixels or a batch. On an Intel with AMX, float32, packed against plain: .93 of the time at 144 rows, 1.08
# to 1.17 at 577.
ROW_COUNTS = (1, 3, 24, 144, 577)
_FIRST_ROWS = (1, 2, 9, 97, 385)
ONE, FEW, SOME, MANY, MOST = range(5)
# Rounds of timing, and processor seconds of a thread after which no further one begins. The products of an image take
# most of the time and vary least.
_BUDGET = 0.7
_MIN_ROUNDS, _MAX_ROUNDS, _MANY_ROUNDS, _MOST_ROUNDS = 2, 8, 3, 2
_MAX_WEIGHTS = 1 << 23  # of the matrix that is timed; a larger one, such as a vocabulary's, is cut
_MAX_PRODUCTS = 1 << 28
_MIN_GAIN = 0.97  # share of torch's time below which another kernel counts as quicker
_MAX_LOSS = 1.02  # of a packed weight, over torch's time at any row count
_ATTENTION = "bfloat16 attention"
_MIN_SCORES = 1024  # of attention, from which products can be quicker

KernelName: TypeAlias = Literal["plain", "onednn", "packed"]
Kernel: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Times: TypeAlias = dict[str, list[float]]
"""Kernel -> seconds at each of `ROW_COUNTS`, 0 where it was not timed."""

_REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
HAS_ONEDNN = _POINTWISE is not None and torch.backends.mkldnn.is_available()

_pin: list[KernelName] = []
_timed: dict[str, Times] = {}  # of this process: one choice for a shape as long as it runs


class Shape(NamedTuple):
    """A weight `[out, in]` of a dtype."""

    out_features: int
    in_features: int
    dtype: torch.dtype

    @property
    def key(self) -> str:
        """Its name among the times."""
        return f"{_short(self.dtype)} {self.out_features}x{self.in_features}"


class Choice(NamedTuple):
    """What a layer multiplies with: its weight packed, or plain with a kernel for each of `ROW_COUNTS`."""

    packed: bool
    by_rows: tuple[KernelName, ...] = ("plain",) * len(ROW_COUNTS)


def can_pack(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this torch has oneDNN's packed linear layers, and this processor the dtype."""
    if not HAS_ONEDNN or _REORDER is None:
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pin(name: Literal["auto", "plain", "packed"]) -> None:
    """Fix the kernel of layers that are loaded from now on; "auto": the quickest."""
    _pin[:] = [] if name == "auto" else [name]


def pinned() -> KernelName | None:
    """The kernel that `pin` or torch's deterministic mode fixes, None: the quickest is used."""
    if _pin or not HAS_ONEDNN:
        return _pin[0] if _pin else "plain"
    return "plain" if torch.are_deterministic_algorithms_enabled() else None


def pack_weight(weight: Tensor) -> Tensor:
    """A weight `[out, in]` in oneDNN's layout."""
    return _REORDER(weight, None)  # pyright: ignore[reportOptionalCall]


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN: x `[..., in]`, weight `[out, in]` with any strides, or packed -> `[..., out]`."""
    return _POINTWISE(x, weight, bias, "none", [], "")  # pyright: ignore[reportOptionalCall]


class LinearByRows:
    """x W^T + b with a plain weight, by the kernel that is quickest for the number of rows."""

    def __init__(self, names: Sequence[KernelName], onednn: Kernel) -> None:
        self.kernels = [nn.functional.linear if name == "plain" else onednn for name in names]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.kernels[row_class(x.numel() // x.shape[-1])](x, weight, bias)


def kernel_of(choice: Choice, onednn: Kernel) -> Kernel | None:
    """The function that a choice stands for, of which `onednn` is a part; None for torch's own."""
    if choice.packed:
        return onednn
    if len(set(choice.by_rows)) == 1:
        return onednn if choice.by_rows[0] == "onednn" else None
    return LinearByRows(choice.by_rows, onednn)


def row_class(rows: int) -> int:
    """Which of `ROW_COUNTS` stands for a number of rows: ONE, FEW (2 to 8), SOME (9 to 96), MANY (97 to 384), MOST."""
    return max(ONE, bisect_right(_FIRST_ROWS, rows) - 1)


def row_classes(name: str) -> frozenset[int]:
    """The row counts that a layer sees, by its name in its network: those of images, of texts, or of decoding."""
    parts = name.split(".")
    if parts[0] == "vision" or parts[-1] == "kv":
        return frozenset({MANY, MOST})
    if parts[0] in ("decoder", "language"):
        return frozenset({ONE, FEW, SOME} if "head" in parts else {ONE, FEW, SOME, MANY})
    return frozenset({SOME, MANY})


def prefers_products(query: Tensor, key: Tensor) -> bool:
    """Whether attention without a gradient is quicker as plain products than by torch's kernel: bfloat16 on CPUs.

    Measured on one Zen 4 core, 12 heads, torch's kernel against products: over 577 keys 0.75 against 0.13 ms for one
    query and 16 against 11 ms for 577, but 0.02 against 0.05 ms over ten keys. In float32 they take 0.5 to 1.35 times
    as long as each other and torch's kernel is kept.

    Args:
        query: `[B, H, Q, head]`.
        key: `[B, H, N, head]`.
    """
    if query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return False
    if query.shape[:3].numel() * key.shape[2] < _MIN_SCORES or pinned() is not None:
        return False
    times, row_class_ = _timed.get(_ATTENTION), row_class(query.shape[2])
    return times is not None and times["onednn"][row_class_] < _MIN_GAIN * times["plain"][row_class_]


def attention_by_products(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v by two products, all of `[B, H, N, head]`."""
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)
    return scores.softmax(-1, dtype=scores.dtype) @ value


def add_times(times: Mapping[str, Times]) -> None:
    """Times of an earlier process. Shapes that this one has timed keep theirs."""
    for key, own in times.items():
        _timed.setdefault(key, own)


def forget_times() -> None:
    """Forget all times: for tests."""
    _timed.clear()


def times_of(keys: Iterable[str]) -> dict[str, Times]:
    """What is known of shapes."""
    return {key: _timed[key] for key in keys if key in _timed}


def best_seconds(shape: Shape, row_class: int) -> float:
    """The least time of a kernel with a shape, 0 where none was timed."""
    seconds = [own[row_class] for own in _timed.get(shape.key, {}).values() if own[row_class]]
    return min(seconds, default=0.0)


def choose(shape: Shape, classes: Iterable[int], *, packable: bool = True) -> Choice:
    """The layout and kernels of a layer.

    The weight is packed if that is nowhere slower than torch's kernel (by 2 %) and quicker than the best kernels with
    the plain weight, each row count weighing the same: an image tower sees one, a decoder several. Ties go to torch's
    kernel.

    Args:
        shape: of its weight.
        classes: indices of the row counts that it sees.
        packable: whether it may be packed; False for a large weight that must also stay plain.

    Returns:
        What was timed, else the layout that is pinned or, without times, packed.
    """
    pin = pinned()
    times = _timed.get(shape.key)
    if pin is not None or times is None:
        if pin == "plain" or not can_pack(shape.dtype):
            return Choice(False)
        # Times are unknown: oneDNN, whose loss is at most a third where it loses, and its gain up to threefold.
        return Choice(packable, ("onednn" if shape.dtype == torch.float32 else "plain",) * len(ROW_COUNTS))
    seen = [c for c in classes if times["plain"][c]]
    onednn, packed = times.get("onednn"), times.get("packed")
    by_rows: tuple[KernelName, ...] = tuple(
        "onednn" if onednn and 0 < onednn[c] < _MIN_GAIN * plain else "plain"
        for c, plain in enumerate(times["plain"])
    )
    if packed and packable and seen:
        ratios = [packed[c] / times["plain"][c] for c in seen]
        best = [times[by_rows[c]][c] / times["plain"][c] for c in seen]
        if max(ratios) <= _MAX_LOSS and sum(ratios) < _MIN_GAIN * sum(best):
            return Choice(True)
    return Choice(False, by_rows)


def measure(
    wanted: Mapping[Shape, Iterable[int]],
    *,
    clock: Callable[[], float] | None = None,
    budget: float = _BUDGET,
) -> dict[str, Times]:
    """Times of shapes that are not known yet, kept for this process.

    Kernel after kernel goes through all shapes, as a decoding step goes through its layers: the weights are then no
    more in the caches than they are in use. The least of several rounds counts.

    Args:
        wanted: shape -> row counts that its layers see.
        clock: seconds; default the thread's own processor time with one thread, else the time that passes.
        budget: processor seconds of a thread after which no further round begins.

    Returns:
        The new times, {} where nothing is timed because a kernel is pinned.
    """
    if pinned() is not None:
        return {}
    clock = clock or (time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)
    missing = _missing(wanted)
    kernels: tuple[KernelName, ...] = ("plain", "onednn", "packed")
    trials = [
        trial
        for name in kernels
        for shape in missing
        for trial in _linear_trials(shape, name, missing[shape])
    ]
    trials.sort(key=lambda trial: (kernels.index(trial.kernel), trial.row_class))
    if _needs_attention(missing):
        trials += _attention_trials()
    return _time(trials, clock, budget) if trials else {}


def is_known(wanted: Mapping[Shape, Iterable[int]]) -> bool:
    """Whether `measure` has nothing to time for these shapes and row counts."""
    missing = _missing(wanted)
    return not any(missing.values()) and not _needs_attention(missing)


def _missing(wanted: Mapping[Shape, Iterable[int]]) -> dict[Shape, list[int]]:
    """The row counts of each shape that are not timed yet, of shapes with several kernels."""
    return {
        shape: sorted(c for c in classes if not _is_timed(shape.key, c))
        for shape, classes in wanted.items()
        if can_pack(shape.dtype)
    }


def _needs_attention(shapes: Iterable[Shape]) -> bool:
    return any(shape.dtype == torch.bfloat16 for shape in shapes) and not _is_timed(_ATTENTION, MANY)


def _time(trials: Sequence[_Trial], clock: Callable[[], float], budget: float) -> dict[str, Times]:
    """The least seconds of every trial, kept for this process."""
    keys = {trial.key for trial in trials}
    start, threads = time.process_time(), torch.get_num_threads()
    with torch.inference_mode():
        for trial in trials:
            trial.run()  # the first call prepares the kernel
        for done in range(_MAX_ROUNDS):
            if done >= _MIN_ROUNDS and (time.process_time() - start) / threads > budget:
                break
            if done in (_MOST_ROUNDS, _MANY_ROUNDS):
                dropped = MOST if done == _MOST_ROUNDS else MANY
                trials = [trial for trial in trials if trial.row_class != dropped]
            for key, kernel, row_class, run in trials:
                begin = clock()
                run()
                seconds = max(clock() - begin, 1e-9)
                own = _timed.setdefault(key, {}).setdefault(kernel, [0.0] * len(ROW_COUNTS))
                own[row_class] = min(own[row_class] or seconds, seconds)
    return times_of(keys)


class _Trial(NamedTuple):
    """A product that is timed."""

    key: str
    kernel: KernelName
    row_class: int
    run: Callable[[], Tensor]


def _linear_trials(shape: Shape, name: KernelName, classes: Sequence[int]) -> list[_Trial]:
    """The products of one kernel with one weight, which is cut to `_MAX_WEIGHTS`."""
    width = min(shape.out_features, max(256, _MAX_WEIGHTS // shape.in_features))
    weight = torch.full((width, shape.in_features), 0.01, dtype=shape.dtype)
    bias = torch.zeros(width, dtype=shape.dtype)
    if name == "packed":
        weight = pack_weight(weight)
    linear = nn.functional.linear if name == "plain" else onednn_linear
    trials: list[_Trial] = []
    for row_class in classes:
        rows = ROW_COUNTS[row_class]
        if row_class == MOST and name == "onednn":
            continue  # it packs the weight in each call and is never the quickest there; the time is better spent on a
            # second round, without which noise decided
        if row_class != MOST:
            rows = min(rows, _MAX_PRODUCTS // (width * shape.in_features))
        x = torch.full((max(rows, _FIRST_ROWS[row_class]), shape.in_features), 0.5, dtype=shape.dtype)
        trials.append(_Trial(shape.key, name, row_class, partial(linear, x, weight, bias)))
    return trials


def _attention_trials() -> list[_Trial]:
    """Attention over an image's keys by torch's kernel ("plain") and by products, which are oneDNN's ("onednn")."""
    trials: list[_Trial] = []
    key = torch.full((2, 12, ROW_COUNTS[MOST], 64), 0.5, dtype=torch.bfloat16)
    for row_class in (ONE, FEW, SOME, MANY, MOST):
        query = key[:, :, : ROW_COUNTS[row_class]]
        trials.append(_Trial(_ATTENTION, "plain", row_class, partial(_fused_attention, query, key, key)))
        trials.append(
            _Trial(_ATTENTION, "onednn", row_class, partial(attention_by_products, query, key, key))
        )
    return trials


def _fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value)


def _is_timed(key: str, row_class: int) -> bool:
    times = _timed.get(key)
    return times is not None and times["plain"][row_class] > 0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
