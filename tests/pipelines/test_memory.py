"""Memory is kept where the allocator can keep it. In a process of its own, as it is for good."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource, sys
import torch
from sightread.pipelines.memory import keep_freed_memory
print(sys.argv[1] == "keep" and keep_freed_memory())
for _ in range(8):
    torch.zeros(40 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.zeros(40 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def faults(what: str) -> tuple[bool, int]:
    """Whether memory is kept, and how many pages were mapped anew by three allocations after eight."""
    run = subprocess.run([sys.executable, "-c", CODE, what], capture_output=True, text=True, check=True)
    kept, count = run.stdout.split()
    return kept == "True", int(count)


def test_freed_memory_is_used_again() -> None:
    can, kept = faults("keep")
    if can:
        assert kept < faults("as it is")[1] / 2
