"""The command `sightloop`, also as `python -m sightloop`. Ctrl-C ends it in one line, also while it is still starting.

The command line itself is imported by `main`, after the handler of SIGINT is in place. What Python does before it runs
this file (its `site` module) is out of reach.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as `typing.TYPE_CHECKING`, without the import
if TYPE_CHECKING:
    import signal as signals
else:  # built into Python: `signal` imports `enum` first, and an interrupt in between would print a traceback
    import _signal as signals


def main() -> int:
    """Runs the command line; returns the exit status."""
    is_default = signals.getsignal(signals.SIGINT) is signals.default_int_handler
    if is_default:  # a background job ignores SIGINT
        signals.signal(signals.SIGINT, _end_at_once)
    from sightloop.apps.cli.main import main as run

    if is_default:
        signals.signal(signals.SIGINT, signals.default_int_handler)
    # Unwinds, so that temporary files are removed. A process of torchrun may wait for others: it ends at once.
    if "LOCAL_RANK" not in os.environ and signals.getsignal(signals.SIGTERM) == signals.SIG_DFL:
        signals.signal(signals.SIGTERM, _end)
    try:
        return run()
    except KeyboardInterrupt:  # between two lines of this function
        return 130


def _end_at_once(_signal: int, _frame: object) -> None:
    """Ends the process while its modules are imported: no file has been opened yet."""
    os._exit(130)


def _end(_signal: int, _frame: object) -> None:
    raise SystemExit(143)  # 128 + SIGTERM


if __name__ == "__main__":
    raise SystemExit(main())
