"""Compare-and-swap of small files: replace a file only if its content is the one that was seen last.

A check followed by a rename loses what another program writes in between. Here the new file and the old one change
places in one step (`exchange_paths`), and what came out is compared afterwards:

    target  A                   target  B                   out is A: done, A is deleted
    new     B    -- exchange -> out     A or X  -- compare -> out is X: exchange back, report a conflict
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from sightloop.data.atomic import atomic_path, atomic_write, exchange_paths, name_disk_errors, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SETTLE_SECONDS = 0.05  # longest wait for a writer that opened the old file before the exchange
_SETTLE_STEP_SECONDS = 0.002


SWAP_PREFIX = "swap-"


def replace_if_unchanged(
    path: str | os.PathLike[str], expected: bytes | None, new: bytes | None, scratch: Path | None = None
) -> bool:
    """Replace, create or delete a file if its content is still `expected`.

    Args:
        path: The file, a regular one. A symbolic link is followed.
        expected: Its content when it was read; None: it did not exist.
        new: Its new content; None deletes it.
        scratch: Folder of the file that changes places with it, which no other program cleans; the file's own by
            default. A kill may leave one `SWAP_PREFIX` file there.

    Returns:
        False if the content has changed meanwhile; then the file has the content that the other program wrote.

    Raises:
        OSError: No such folder, no space, no permission; it names `path`, which is unchanged.
    """
    target = Path(os.path.realpath(path))
    if expected is None:
        return (new is None and not os.path.lexists(target)) or (new is not None and _create(target, new))
    if read_or_none(target) != expected:
        return False
    if new == expected:
        return True
    swapped_out = (scratch or target.parent) / f"{SWAP_PREFIX}{os.getpid()}-{time.monotonic_ns():x}"
    try:
        with name_disk_errors(target, swapped_out):
            unchanged = _swap(target, swapped_out, expected, new)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(swapped_out)
    sync_folder(target.parent)
    return unchanged


def read_or_none(path: str | os.PathLike[str]) -> bytes | None:
    """Content of a file; None if it does not exist."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


def _create(target: Path, new: bytes) -> bool:
    try:
        with atomic_path(target, exclusive=True) as temporary:
            temporary.write_bytes(new)
    except FileExistsError:
        return False
    return True


def _swap(target: Path, swapped_out: Path, expected: bytes, new: bytes | None) -> bool:
    """Puts `new` in the place of the target, and the target's file at `swapped_out`. False: undone, a conflict."""
    if new is None:
        try:
            os.rename(target, swapped_out)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return _replace_after_check(target, None, expected)
    else:
        with swapped_out.open("xb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            shutil.copymode(target, swapped_out)
        if not exchange_paths(swapped_out, target):
            return _replace_after_check(target, new, expected)
    _wait_for_writers(swapped_out)
    if swapped_out.read_bytes() == expected:
        return True
    _put_back(target, swapped_out, new)
    return False


def _put_back(target: Path, swapped_out: Path, new: bytes | None) -> None:
    """Undoes `_swap`. What a program wrote to the new file in the meantime stays: it is the latest."""
    if new is None:
        with suppress(FileExistsError):
            os.link(swapped_out, target)
    elif exchange_paths(swapped_out, target) and swapped_out.read_bytes() != new:
        exchange_paths(swapped_out, target)


def _replace_after_check(target: Path, new: bytes | None, expected: bytes) -> bool:
    """The same where files cannot be exchanged; a race of microseconds remains between check and rename."""
    if read_or_none(target) != expected:
        return False
    if new is None:
        target.unlink()
    else:
        atomic_write(target, new)
    return True


def _wait_for_writers(path: Path) -> None:
    """Returns when no other program has the file open, or after a moment: a shell's `>` opens, then writes.

    A lease for writing is granted only while nobody else has the file open (Linux, one's own files).
    """
    if fcntl is None or not hasattr(fcntl, "F_SETLEASE"):
        return
    deadline = time.monotonic() + _SETTLE_SECONDS
    with path.open("rb") as file:
        while True:
            try:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                return
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return
                time.sleep(_SETTLE_STEP_SECONDS)
            except OSError:  # a file system without leases, or another user's file
                return
