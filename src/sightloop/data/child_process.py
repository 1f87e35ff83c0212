"""Child processes of `multiprocessing`: started without the main script, ended with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing.connection import wait


@contextmanager
def without_main_script() -> Generator[None]:
    """Hides the main script from multiprocessing, which would run it again in the new process.

    The workers need nothing of it, and a script without `if __name__ == "__main__":` would start workers of its own.
    """
    main = vars(sys.modules["__main__"])
    hidden = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main.pop("__file__", None)
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(hidden)


def end_with_parent() -> None:
    """From now on, end this process when its parent ends, even by SIGKILL; and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
