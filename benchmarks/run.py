"""Runs the cases and prints one table: `python -m benchmarks.run [--only NAME...] [--quick]`; `--list` names them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from benchmarks.cases import Case, Job, choose, every_case, quick_cases
from benchmarks.materials import Materials, prepare
from benchmarks.processes import Processes
from benchmarks.report import Row, compare, machine, table, worst, write_json
from benchmarks.workers import NotRun, Worker

ROUNDS = 5
SECONDS_A_CASE = 40.0  # after so long a case makes do with three rounds
LONG = 6.0  # seconds: with --quick, a first run that took so long is the only one


class Bench:
    """The processes of the sides, started when they are first needed."""

    def __init__(self, materials: Materials, threads: int, rounds: int, *, quick: bool = False) -> None:
        self.quick = quick
        self.materials = materials
        self.threads = threads
        self.rounds = rounds
        self.sides: dict[str, Worker | Processes] = {}

    def run(self, case: Case) -> list[Row]:
        """One case: a row for each peer, or one for a case without peers."""
        players = [_Player(job, self._side(job)) for job in (case.ours, *case.theirs)]
        for player in players:
            player.warm_up(counts=case.cold)
        if self.quick and any(player.first > LONG for player in players):
            for player in players:
                player.count_first()
        else:
            self._take_turns(case, [player for player in players if not player.failed])
        for side in self.sides.values():
            side.clear()
        ours, *peers = players
        if not peers:
            return [Row(case, ours=ours.figures, not_run=ours.failed)]
        return [_row(case, ours, peer, case.goal(i)) for i, peer in enumerate(peers)]

    def kernels(self) -> dict[str, dict[str, int]]:
        """By checkpoint, how many linear layers of sightloop's side have which kernel."""
        side = self.sides.get("sightloop")
        with suppress(NotRun):
            return side.kernels() if isinstance(side, Worker) else {}
        return {}

    def close(self) -> None:
        """End all processes."""
        for side in self.sides.values():
            side.close()

    def _take_turns(self, case: Case, players: list[_Player]) -> None:
        start = perf_counter()
        for done in range(case.cold, min(self.rounds, case.rounds or self.rounds)):
            if done >= 3 and perf_counter() - start > SECONDS_A_CASE:
                break
            for player in players:
                player.play()

    def _side(self, job: Job) -> Worker | Processes:
        key = "process" if job.work == "process" else job.side
        if key not in self.sides:
            self.sides[key] = (
                Processes(self.materials, self.threads)
                if key == "process"
                else Worker(job.side, self.materials, self.threads)
            )
        return self.sides[key]


class _Player:
    """One job on its side, its figures so far, and why it failed if it did."""

    def __init__(self, job: Job, side: Worker | Processes) -> None:
        self.job = job
        self.side = side
        self.number = 0
        self.output: Any = None
        self.figures: list[float] = []
        self.first = 0.0
        self.failed = ""

    def warm_up(self, *, counts: bool) -> None:
        """The first run, whose output is compared; its figure is kept only if it `counts`."""
        try:
            self.number = self.side.prepare(self.job)
            self.first, self.output = self.side.run(self.number)
            self.figures = [self.first] if counts else []
        except NotRun as error:
            self.failed = str(error)

    def count_first(self) -> None:
        """Make the first run the measured one."""
        if not self.failed:
            self.figures = [self.first]

    def play(self) -> None:
        """One measured run."""
        if not self.failed:
            try:
                self.figures.append(self.side.run(self.number)[0])
            except NotRun as error:
                self.failed = str(error)


def _row(case: Case, ours: _Player, peer: _Player, wanted: float | None) -> Row:
    row = Row(case, peer.job.called, ours.figures, peer.figures, wanted)
    row.not_run = (ours.failed and f"sightloop: {ours.failed}") or peer.failed
    if not row.not_run:
        row.agreement = compare(ours.output, peer.output, case.near)
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit status is 0 however the times come out, 2 for wrong usage."""
    given = _parser().parse_args(arguments)
    try:
        cases = choose(every_case(), given.only) if given.only or not given.quick else quick_cases()
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if given.list:
        for case in cases:
            print(f"{case.name:24} {case.title}")
        return 0
    say = Console(stderr=True, highlight=False, soft_wrap=True)
    if not given.out.absolute().parent.is_dir():
        print(f"benchmarks: --out {given.out}: there is no such folder", file=sys.stderr)
        return 2
    if given.data is not None and not given.data.is_dir():
        print(f"benchmarks: --data {given.data}: there is no such folder", file=sys.stderr)
        return 2
    materials = prepare(given.cache.expanduser(), "tiny" if given.tiny else "official", given.data)
    rounds = given.rounds or (2 if given.quick else ROUNDS)
    notes = [
        *materials.notes,
        *(["tiny networks, few images: these times mean nothing"] if given.tiny else []),
    ]
    about = machine() | {"kernels": {}}
    if about["load_at_start"] > about["cores"] / 2:
        notes.append(
            f"other programs were running (load {about['load_at_start']:.1f}): do not trust these times"
        )
    settings = {"threads": given.threads, "rounds": rounds, "precision": "float32", "size": materials.size}
    head = {"machine": about, "settings": settings, "notes": notes}
    rows: list[Row] = []
    bench = Bench(materials, given.threads, rounds, quick=given.quick)
    try:
        for i, case in enumerate(cases, 1):
            start = perf_counter()
            say.print(f"benchmarks: {i}/{len(cases)} {case.name}: {case.title} ...", end=" ")
            rows.extend(bench.run(case))
            say.print(f"{perf_counter() - start:.0f} s")
            about["kernels"] |= bench.kernels()
            write_json(given.out, head, rows)
    except KeyboardInterrupt:
        say.print("\nbenchmarks: stopped; what was done so far:")
    finally:
        bench.close()
    width = None if sys.stdout.isatty() else 150
    Console(width=width, highlight=False).print(table(head, rows))
    say.print(f"benchmarks: written to {given.out}")
    print(worst(rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        default=[],
        metavar="NAME",
        help="cases: a name, its beginning, or a shell pattern",
    )
    add("--list", action="store_true", help="name the cases and stop")
    add("--rounds", type=int, default=0, help=f"measured runs a side ({ROUNDS}; long cases make do with 3)")
    add(
        "--quick",
        action="store_true",
        help="few minutes: two rounds, one of what is long, without the longest cases",
    )
    add("--tiny", action="store_true", help="tiny networks, few images: to try the benchmark itself")
    add(
        "--data", type=Path, help="folder with photographs and captions (the photographs inside two packages)"
    )
    add("--threads", type=int, default=os.cpu_count() or 1, help="of both sides (all cores)")
    add("--out", type=Path, default=Path("bench.json"), help="where the figures go (bench.json)")
    add("--cache", type=Path, default=Path("~/.cache/sightloop-bench"), help="for 4 GB of random checkpoints")
    return parser


if __name__ == "__main__":
    sys.exit(main())
