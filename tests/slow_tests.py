"""The test files that `make quick` leaves out: they train, start many processes, or compare whole networks.

conftest.py marks their tests `slow`; `make test` runs them all. `make quick` ends with the tests that took it more than
two seconds: the file of such a test belongs here, or the test into a file of its own that does.
"""

from __future__ import annotations

# Relative to tests/.
SLOW_FILES = frozenset(
    {
        "capfilt/test_bootstrap.py",
        "training/test_calibration.py",
        "training/test_fsdp.py",
        "training/test_trainer.py",
    }
)
