"""Memory is kept where the allocator can keep it. In a process of its own, as it is for good."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource, sys
import torch
from sightread.pipelines.memory import keep_freed_memory
print(keep_freed_memory())
for _ in range(8):
    torch.zeros(40 << 20)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.zeros(40 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""


def test_freed_memory_is_used_again() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    can, faults = run.stdout.split()
    if can == "True":  # a new map of 160 MB is 40,960 pages, or 80 huge ones
        assert int(faults) < 60
