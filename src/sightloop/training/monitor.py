"""Training monitor: warns about NaN, losses at chance level, collapsed embeddings and divergence; suggests a remedy.

Deterministic, with a JSON state, so that a resumed run warns like an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Final

from sightloop.training.events import StepDone, WarningRaised
from sightloop.types import JsonDict, JsonMapping

# A term is below chance if its mean over a window is lower by this many standard errors and this share of chance.
# The standard error is that of means of blocks, which are nearly independent, unlike single steps.
_ERRORS, _SHARE, _BLOCKS = 4.0, 0.005, 20
# No warning about a term at chance during the warm-up, for at most so many times the patience.
_MAX_WARMUP = 5
# The loss diverges if the mean of a block of steps exceeds the best such mean by half of it, by six standard deviations
# of single steps, and by a tenth of the progress so far.
_BLOCK = 20
_NO_SPREAD, _ONE_SIDED = 0.01, 0.01
_SCALES: Final = (1e-2, 1e4)

_AT_CHANCE: Final = (
    "Nothing is being learned from it yet. Try: check that each caption belongs to its image (shuffled pairs look "
    "like this), a learning rate 10 times lower or higher, a longer warm-up, a larger batch"
)
_REMEDIES: Final[dict[str, str]] = {
    "itm": _AT_CHANCE + "; ITM also waits for ITC, which draws its hard negatives",
    "lm": "The decoder has not learned which tokens are frequent. Try: a learning rate 10 times lower or higher, and "
    "check the tokenized captions (empty or truncated texts teach nothing)",
}


def patience_for(steps: int) -> int:
    """Steps after which a term at chance is worth a warning: a fifth of the run, within 20..200."""
    return max(20, min(200, steps // 5))


class TrainingMonitor:
    """Monitor of the steps of a run.

    Warns about NaN, terms at chance level, a diverging loss, zero gradients, temperatures that run away or stay at a
    bound, collapsed embeddings, and an ITM head with one answer for all pairs. A warning is repeated after twice the
    number of steps, and withdrawn when it no longer holds.

    It reads `StepDone.values` by the last part of the name; missing values are ignored:

        terms with a chance value
        gradient_norm
        temperature: logits are divided by it
        logit_scale: logits are multiplied by its exponential
        spread: 1 - mean cosine of different embeddings
        matched: share of pairs that ITM calls matching
    """

    def __init__(
        self,
        *,
        patience: int = 200,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        terms: Collection[str] = (),
        state: JsonMapping | None = None,
    ) -> None:
        """Creates a monitor.

        Args:
            patience: steps before a warning about a term at chance, at least 20.
            bounds: (least, greatest) value of clamped parameters, by the last part of their name.
            terms: of the loss; a step without one of them has a lower loss, and is no sign of progress.
            state: `state()` of a run to resume.

        Raises:
            TypeError, ValueError, AttributeError: a value of the state is of the wrong type.
        """
        self._patience = max(patience, 20)
        self._window = self._patience // 2
        self._bounds = dict(bounds or {})
        self._terms = set(terms)
        state = state or {}
        self._steps = int(state.get("seen", 0))  # steps
        self._steady = int(state.get("steady", 0))  # steps after the warm-up
        self._rate = float(state.get("rate", 0.0))
        self._last: float | None = _float_or_none(state.get("last"))
        self._first: float | None = _float_or_none(state.get("first"))
        # mean and deviation of the best block of losses
        self._best: list[float] = list(map(float, state.get("best", [])))
        if len(self._best) not in (0, 2):
            raise ValueError("best: not a mean and a deviation")
        self._windows: dict[str, list[float]] = {
            name: list(map(float, values)) for name, values in state.get("windows", {}).items()
        }
        # name -> step at which it is raised again
        self._alarms: dict[str, int] = {name: int(at) for name, at in state.get("alarms", {}).items()}
        # term -> windows at chance after it had left chance
        self._back: dict[str, int] = {name: int(count) for name, count in state.get("back", {}).items()}
        self._left: list[str] = list(state.get("left", []))
        self.fatal = bool(state.get("fatal", False))

    def state(self) -> JsonDict:
        """JSON values from which another `TrainingMonitor` continues."""
        return {
            "seen": self._steps,
            "steady": self._steady,
            "rate": self._rate,
            "last": self._last,
            "first": self._first,
            "best": list(self._best),
            "windows": {name: list(values) for name, values in self._windows.items()},
            "alarms": dict(self._alarms),
            "back": dict(self._back),
            "left": list(self._left),
            "fatal": self.fatal,
        }

    def update(self, event: StepDone) -> list[WarningRaised]:
        """The warnings after a step. Sets `fatal` if the loss or gradient is not finite and the run must stop."""
        if broken := self._check_finite(event):
            self.fatal = True
            return [broken]
        self._steps += 1
        self._steady += event.lr <= self._rate or self._steps == 1
        self._rate, self._last = event.lr, event.loss
        warnings = [self._check_explosion(event) if self._terms <= event.chances.keys() else None]
        warnings += [self._check_chance(event, term) for term in event.chances if term in event.values]
        warnings += [self._check_fact(event, name) for name in event.values if name not in event.chances]
        return [warning for warning in warnings if warning is not None]

    def _check_finite(self, event: StepDone) -> WarningRaised | None:
        facts = ("gradient_norm",) if "gradient_norm" in event.values else ()
        numbers = {name: event.values[name] for name in (*event.chances, *facts) if name in event.values}
        numbers["loss"] = event.loss
        for name, number in numbers.items():
            if math.isfinite(number):
                continue
            before = "from the first step" if self._last is None else f"the loss before was {self._last:.4g}"
            return WarningRaised(
                event.step,
                name,
                f"{name} is {number} ({before}, learning rate {event.lr:.3g}). The weights are unusable: "
                "the run stops. Try: resume from the last checkpoint with a lower learning rate, clip the gradient "
                "(optimizer.clip_norm=1), a longer warm-up, precision float32",
            )
        return None

    def _check_chance(self, event: StepDone, term: str) -> WarningRaised | None:
        chance = event.chances[term]
        window = self._full_window(term, event.values[term] - chance)
        if window is None:
            return None
        mean, error, again = fmean(window), _standard_error(window), term in self._left
        below = mean < -max(_ERRORS * error, _SHARE * abs(chance))
        there = not below
        if again:  # back at chance only after two windows within one standard error of it
            near = mean > -max(error, _SHARE * abs(chance))
            self._back[term] = self._back.get(term, 0) + 1 if near else 0
            there = self._back[term] > 1
        waited = self._steady >= self._patience or self._steps >= _MAX_WARMUP * self._patience
        change = self._raise_or_clear(f"{term} at chance", there and waited, over=below)
        if below and not again:
            self._left.append(term)
        if change is None:
            return None
        now = f"{term} is {chance + mean:.4g} and chance is {_format_chance(chance)}"
        if not change:
            return WarningRaised(event.step, term, f"{term} has left chance: {now}", over=True)
        if again:
            text = f"{term} has fallen back to chance: {now}. Try: a lower learning rate from the last good checkpoint"
        else:
            where = "is worse than chance" if mean > 0.05 * abs(chance) else "has not left chance"
            text = f"{term} {where} in {event.step} steps: {now}. {_REMEDIES.get(term, _AT_CHANCE)}"
        return WarningRaised(event.step, term, text)

    def _check_explosion(self, event: StepDone) -> WarningRaised | None:
        block = self._full_window("loss", event.loss, _BLOCK)
        if block is None:
            return None
        mean, deviation = fmean(block), _deviation(block)
        if not self._best or self._first is None:
            self._first, self._best = mean, [mean, deviation]
            return None
        best, noise = self._best
        risen = mean - best > max(0.5 * abs(best), 6 * noise, 0.1 * (self._first - best))
        if mean < best:
            self._best = [mean, deviation]
        change = self._raise_or_clear("loss explodes", risen)
        if change is None:
            return None
        text = f"the loss is back at {mean:.4g}"
        if change:
            text = (
                f"the loss has risen to {mean:.4g}; it has been {best:.4g}. Training diverges. Try: a lower learning "
                "rate, a longer warm-up, clip the gradient (optimizer.clip_norm=1)"
            )
        return WarningRaised(event.step, "loss", text, over=not change)

    def _check_fact(self, event: StepDone, name: str) -> WarningRaised | None:
        kind = name.rpartition(".")[2]
        check = {
            "gradient_norm": _zero_gradient,
            "spread": _collapsed,
            "matched": _one_sided,
            "temperature": self._temperature,
            "logit_scale": self._temperature,
        }.get(kind)
        number = event.values[name]
        window = self._full_window(name, number) if check and math.isfinite(number) else None
        if check is None or window is None:
            return None
        wrong = check(name, window) if self._steps >= self._patience else ""
        change = self._raise_or_clear(name, bool(wrong))
        if change is None:
            return None
        text = f"{name} {wrong}" if change else f"{name} is normal again: {fmean(window):.4g}"
        return WarningRaised(event.step, name, text, over=not change)

    def _temperature(self, name: str, window: Sequence[float]) -> str:
        kind = name.rpartition(".")[2]
        scales = [
            math.exp(min(v, 700)) if kind == "logit_scale" else 1 / v if v else math.inf for v in window
        ]
        if fmean(scales) > _SCALES[1] or fmean(scales) < _SCALES[0]:
            return (
                f"has run away to {fmean(window):.4g}: the softmax is uniform or one-hot. Try: a clamp, a "
                "lower learning rate for it (optimizer.multipliers), no weight decay on it"
            )
        for bound in self._bounds.get(kind, ()):
            if not all(math.isclose(v, bound, rel_tol=0.01, abs_tol=1e-6) for v in window):
                continue
            low, high = self._bounds[kind]
            sharp = bound == (high if kind == "logit_scale" else low)
            # A good contrast ends at its sharpest bound; that is wrong only if a term is at chance.
            if sharp and not any(alarm.endswith(" at chance") for alarm in self._alarms):
                return ""
            return (
                f"is stuck at its bound {bound:.4g} for {len(window)} steps: "
                + (
                    "the contrast is confident and wrong"
                    if sharp
                    else "the contrast does not tell pairs apart"
                )
                + ". Try: a lower learning rate, a larger batch, and check that each caption belongs to its image"
            )
        return ""

    def _full_window(self, name: str, value: float, size: int = 0) -> list[float] | None:
        """Adds a value to a window; returns the window and starts a new one when it is full, else None."""
        window = self._windows.setdefault(name, [])
        window.append(value)
        if len(window) < (size or self._window):
            return None
        return self._windows.pop(name)

    def _raise_or_clear(self, alarm: str, bad: bool, over: bool = True) -> bool | None:
        """True: raise the alarm (again); False: withdraw it; None: no change."""
        if bad:
            if self._steps < self._alarms.get(alarm, 0):
                return None
            self._alarms[alarm] = 2 * self._steps
            return True
        if over and self._alarms.pop(alarm, None) is not None:
            return False
        return None


def _float_or_none(value: object) -> float | None:
    if value is None or isinstance(value, int | float):
        return value
    raise TypeError(f"{value!r} is not a number")


def _deviation(values: Sequence[float]) -> float:
    mean = fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _standard_error(window: Sequence[float]) -> float:
    size = max(1, len(window) // _BLOCKS)
    means = [fmean(window[start : start + size]) for start in range(0, len(window) - size + 1, size)]
    return _deviation(means) / math.sqrt(len(means))


def _zero_gradient(_: str, window: Sequence[float]) -> str:
    if max(window) > 0:
        return ""
    return (
        f"is zero for {len(window)} steps: nothing is learned. Try: check which parameters are frozen, and whether the "
        "samples have the annotations that the terms need"
    )


def _collapsed(_: str, window: Sequence[float]) -> str:
    if fmean(window) >= _NO_SPREAD:
        return ""
    return (
        f"is {fmean(window):.2g}: all embeddings point the same way (collapse). Try: a lower learning rate, a longer "
        "warm-up, a larger batch, and check that images and captions differ"
    )


def _one_sided(_: str, window: Sequence[float]) -> str:
    share = fmean(window)
    if _ONE_SIDED <= share <= 1 - _ONE_SIDED:
        return ""
    answer = "matching" if share > 0.5 else "not matching"
    return (
        f"is {share:.3f}: ITM calls every pair {answer}. Try: a lower learning rate, and check that "
        "each caption belongs to its image; ITM waits for ITC, which draws its hard negatives"
    )


def _format_chance(chance: float) -> str:
    """A chance value with its number of choices: "4.852 = ln 128"."""
    choices = math.exp(chance) if 0 < chance < 20 else 0.0
    count = round(choices)
    of = f" = ln {count:,}" if count > 1 and abs(choices - count) < 1e-6 * choices else ""
    return f"{chance:.4g}{of}"
