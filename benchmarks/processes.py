"""Start-up and memory, each measured in a process of its own: `python -m benchmarks.processes caption ...`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.cases import Job
from benchmarks.materials import Materials
from benchmarks.workers import NotRun

_IMPORT = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


class Processes:
    """Runs a job of work "process" as often as it is asked: the same interface as a worker."""

    def __init__(self, materials: Materials, threads: int) -> None:
        self.given = materials
        self.threads = threads
        self.jobs: list[Job] = []

    def prepare(self, job: Job) -> int:
        """Nothing to make ready, every run starts afresh; the job's number."""
        self.jobs.append(job)
        return len(self.jobs) - 1

    def run(self, number: int) -> tuple[float, Any]:
        """The figure that the job asks for (seconds or MB), and the texts that were written. Raises NotRun."""
        job = self.jobs[number]
        found = self._figures(job.side, dict(job.options))
        return found[job.options["figure"]], found.get("texts")

    def clear(self) -> None:
        """Forget the jobs."""
        self.jobs = []

    def close(self) -> None:
        """Nothing is left running."""

    def _figures(self, side: str, options: Mapping[str, Any]) -> Mapping[str, Any]:
        if options["probe"] == "import":
            return {"seconds": float(_run([sys.executable, "-c", _IMPORT.format(side)]))}
        if options["probe"] == "help":
            command = Path(sys.executable).with_name("sightloop")
            start = perf_counter()
            _run([str(command) if command.exists() else shutil.which("sightloop") or "sightloop", "--help"])
            return {"wall": perf_counter() - start}
        settings = {"threads": self.threads, "batch": options["batch"], "beams": options["beams"]}
        settings |= {"tokens": options.get("tokens", 0), "side": side}
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        return json.loads(
            _run([sys.executable, "-m", "benchmarks.processes", *arguments, json.dumps(_plain(self.given))])
        )


def _plain(materials: Materials) -> dict[str, Any]:
    return {name: getattr(materials, name) for name in materials.__dataclass_fields__}


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise NotRun(f"{Path(command[0]).name}: {lines[-1]}")
    return done.stdout


def main() -> None:
    """Import one side, load the captioner, caption `batch` images (none for 0); print what it took as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", required=True)
    for name in ("threads", "batch", "beams", "tokens"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("materials")
    given = parser.parse_args()
    materials = Materials(**json.loads(given.materials))
    start = perf_counter()
    if given.side == "sightloop":
        from benchmarks.ours import Sightloop as Kind
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        from benchmarks.peer_transformers import Transformers as Kind
    import torch

    torch.set_num_threads(given.threads)
    imported = perf_counter()
    call = Kind(materials).caption(max(given.batch, 1), given.beams, max(given.tokens, 1))
    ready = perf_counter()
    figures = {"import": imported - start, "load": ready - imported, "ready": ready - start}
    figures["loaded_mb"] = peak_mb()
    texts = call() if given.batch else []
    print(json.dumps({**figures, "peak_mb": peak_mb(), "texts": texts}))


def peak_mb() -> float:
    """The most memory that this process had resident so far, in 10^6 bytes; mapped files count."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss also knows what the parent had before this program began
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


if __name__ == "__main__":
    main()
