"""What came out: rows of figures, one table for people, one JSON file for programs."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.cases import Case

# Instructions that decide which kernel and precision is quickest, as Linux calls them.
FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "bf16",
)


@dataclass(slots=True)
class Agreement:
    """How far two outputs are apart: texts that are equal among all; or the largest difference of numbers, and the
    share of numbers that differ by more than float32 arithmetic explains (1e-4).
    """

    equal: int | None = None
    total: int | None = None
    difference: float | None = None
    share: float = 0.0
    near: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether both sides said the same."""
        return self.equal == self.total and (self.difference or 0.0) <= self.near

    def __str__(self) -> str:
        if self.total is not None:
            return f"{self.equal}/{self.total} texts"
        if self.difference is None:
            return ""
        return f"{self.difference:.0e}" + (f" in {self.share:.3%}" if self.share else "")


@dataclass(slots=True)
class Row:
    """One case against one peer (or none). Figures are seconds or MB a call, in the order in which they were taken."""

    case: Case
    peer: str = ""
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    wanted: float | None = None
    agreement: Agreement = field(default_factory=Agreement)
    not_run: str = ""

    @property
    def ratio(self) -> float | None:
        """The peer's median over ours: above 1 where sightloop is faster or smaller."""
        return median(self.theirs) / median(self.ours) if self.ours and self.theirs else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """The least and the greatest ratio of runs that followed each other."""
        pairs = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=False)]
        return (min(pairs), max(pairs)) if len(pairs) > 1 else None

    def as_json(self) -> dict[str, Any]:
        """Everything that was measured."""
        return {
            "case": self.case.name,
            "title": self.case.title,
            "peer": self.peer or None,
            "unit": self.case.unit,
            "items": self.case.items,
            "ours": self.ours,
            "theirs": self.theirs,
            "ours_median": median(self.ours) if self.ours else None,
            "theirs_median": median(self.theirs) if self.theirs else None,
            "ratio": self.ratio,
            "ratio_range": self.spread,
            "wanted": self.wanted,
            "limit": self.case.limit,
            "difference": self.agreement.difference,
            "differing_share": self.agreement.share,
            "texts_equal": self.agreement.equal,
            "texts": self.agreement.total,
            "not_run": self.not_run or None,
        }


def compare(ours: Any, theirs: Any, near: float) -> Agreement:
    """Lists of texts, or arrays and lists of arrays of one shape. Nothing to compare: an empty Agreement."""
    if ours is None or theirs is None or len(ours) == 0:
        return Agreement()
    if isinstance(ours[0], str):
        return Agreement(sum(a == b for a, b in zip(ours, theirs, strict=True)), len(ours))
    import numpy as np

    apart = [np.abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    share = float(np.mean([np.mean(values > 1e-4) for values in apart]))
    return Agreement(difference=max(float(values.max()) for values in apart), share=share, near=near)


def machine() -> dict[str, Any]:
    """What ran: processor, cores, memory, versions, time."""
    names = ("sightloop", "torch", "transformers", "open_clip_torch", "tokenizers", "pillow", "numpy")
    return {
        "processor": _cpu_line("model name") or platform.processor() or platform.machine(),
        "features": [name for name in FEATURES if name in _cpu_line("flags").split()],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_at_start": os.getloadavg()[0],
    }


def _cpu_line(name: str) -> str:
    """The value of a line of /proc/cpuinfo, "" where there is none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _kernels(by_checkpoint: Mapping[str, Mapping[str, int]]) -> str:
    """How many linear layers have which kernel, over all checkpoints."""
    total = Counter[str]()
    for counts in by_checkpoint.values():
        total.update(counts)
    return ", ".join(f"{name} ({count} layers)" for name, count in total.most_common()) or "not known"


def worst(rows: Sequence[Row]) -> str:
    """A line about the row where sightloop does worst beside its peer, or beside what it wants."""
    known = [(row.ratio, row) for row in rows if row.ratio is not None]
    if not known:
        return "worst row: none, as nothing was compared"
    ratio, row = min(known, key=lambda pair: pair[0])
    missed = sum(row.wanted is not None and ratio < row.wanted for ratio, row in known)
    return f"worst row: {row.case.name}, {ratio:.2f}x of {row.peer}; {missed} of {len(known)} rows below what is wanted"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write_json(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """The whole run so far; the file is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps({**head, "results": [row.as_json() for row in rows]}, indent=1) + "\n", "utf-8"
    )
    os.replace(partial, path)


def table(head: dict[str, Any], rows: list[Row]) -> Table:
    """One line a row; the speed-up is red where it is less than wanted."""
    about, settings = head["machine"], head["settings"]
    out = Table(
        title="sightloop beside its peers: medians of runs that took turns",
        caption=f"{about['processor']} ({', '.join(about['features']) or 'features not known'}), "
        + f"{settings['threads']} threads, float32, kernels: {_kernels(about.get('kernels', {}))}, "
        + ", ".join(f"{name} {at or 'absent'}" for name, at in about["versions"].items())
        + "".join(f"\n{note}" for note in head["notes"]),
    )
    out.add_column("case", no_wrap=True)
    out.add_column("unit")
    out.add_column("sightloop", justify="right", no_wrap=True)
    out.add_column("peer")
    out.add_column("peer's", justify="right")  # wraps: it may say why a case was not run
    out.add_column("ratio", justify="right", no_wrap=True)
    out.add_column("range", justify="right", no_wrap=True)
    out.add_column("wanted", justify="right", no_wrap=True)
    out.add_column("difference", justify="right", no_wrap=True)
    before = ""
    for row in rows:
        again, before = row.case.name == before, row.case.name
        out.add_row("" if again else row.case.name, *_cells(row), end_section=False)
    return out


def _cells(row: Row) -> list[str]:
    case, ratio, spread = row.case, row.ratio, row.spread
    if row.not_run:
        return [
            case.unit,
            _figure(case, row.ours),
            row.peer,
            f"not run: {escape(row.not_run)}",
            "",
            "",
            "",
            "",
        ]
    if case.limit is not None:
        wanted, missed = f"< {case.limit:g} s", bool(row.ours) and median(row.ours) >= case.limit
    else:
        wanted = "" if row.wanted is None else f">= {row.wanted:g}x"
        missed = row.wanted is not None and ratio is not None and ratio < row.wanted
    colour = "red" if missed else "green" if wanted else "default"
    agreed = str(row.agreement)
    return [
        case.unit,
        _figure(case, row.ours),
        row.peer,
        _figure(case, row.theirs),
        "" if ratio is None else f"[{colour}]{ratio:.2f}x[/]",
        "" if spread is None else f"{spread[0]:.2f}-{spread[1]:.2f}",
        f"[{colour}]{wanted}[/]",
        agreed if row.agreement.holds else f"[yellow]{agreed}[/]",
    ]


def _figure(case: Case, values: list[float]) -> str:
    if not values:
        return ""
    value = median(values)
    if case.unit.endswith("/s"):
        value = case.items / value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
