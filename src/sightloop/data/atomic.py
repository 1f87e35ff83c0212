"""Files that are there whole or not at all: written beside their place, synced, then put there in one step.

Whoever is killed in between leaves at most a `.sightloop-*.tmp` beside the file, which `remove_stale_temporaries`
tells from one that another process is still writing.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sightloop.errors import UsageError

if TYPE_CHECKING:
    pass

try:
    import fcntl
except ImportError:  # Windows has no flock: there the age of a temporary decides
    fcntl = None

PREFIX = ".sightloop-"
SUFFIX = ".tmp"
STALE_SECONDS = 24 * 3600.0
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}


def atomic_write(path: str | os.PathLike[str], data: bytes | str, *, exclusive: bool = False) -> None:
    """Write `data` (text as UTF-8, line ends as they are) to `path`: every reader sees the old file or the new one.

    exclusive: never replace; raises FileExistsError if something is at `path`, also if it came meanwhile.
    Without it the replaced file's permissions are kept, and a symbolic link is written through.
    Raises OSError (no such folder, no room, no permission); then nothing has changed.
    """
    with atomic_path(path, exclusive=exclusive) as temporary, temporary.open("r+b") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, exclusive: bool = False) -> Generator[Path]:
    """An empty temporary file to write to; when the block ends well it becomes `path`, otherwise it goes away.

    For writers that want a path of their own. The rules are those of `atomic_write`.
    """
    target = Path(path)
    if exclusive and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if not exclusive and target.is_symlink():
        target = Path(os.path.realpath(target))
    temporary, lock = _create(target.parent)
    try:
        yield temporary
        _sync(temporary)
        if exclusive:
            _put_new(temporary, target)
        else:
            _keep_permissions(target, temporary)
            os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if lock is not None:
            os.close(lock)
    sync_folder(target.parent)


def lock(file: int | IO[bytes]) -> bool:
    """Whether no other process has locked this open file; then this one has, until it is closed.

    True also where there are no locks: on Windows and some network file systems.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks on this file system
    return True


@contextmanager
def lock_folder(folder: Path, file: str | None = None) -> Generator[None]:
    """Holds a folder while it lasts: by a file in it, which holds on NFS too, or by the folder itself. Raises
    `UsageError` where another process works in it."""
    if fcntl is None:
        yield
        return
    held = os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666) if file else os.open(folder, os.O_RDONLY)
    try:
        if not lock(held):
            raise UsageError(f"{folder}: another process is working on it now; wait for its end")
        yield
    finally:
        os.close(held)


def remove_stale_temporaries(folder: str | os.PathLike[str]) -> int:
    """Remove what killed writers left in `folder` (not below it) and return how many files that were.

    A temporary that a living process is writing, on this machine, is left alone. Never raises for a file or folder
    that has gone or may not be touched.
    """
    removed = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                removed += _remove_if_stale(entry.path)
    return removed


def _create(folder: Path) -> tuple[Path, int | None]:
    """A new temporary and, where there are locks, a descriptor whose lock says that its writer lives."""
    while True:
        path = folder / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        try:
            # 0o666: the umask gives the file the permissions of any other new file.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        if fcntl is None:
            os.close(descriptor)
            return path, None
        with suppress(OSError):  # a file system without locks: the age decides there too
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Between its birth and its lock, a cleaner may have taken it for an orphan.
        if os.path.lexists(path):
            return path, descriptor
        os.close(descriptor)


def _remove_if_stale(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        if not _is_orphan(descriptor):
            return False
        os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_orphan(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return False
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks on this file system
    return time.time() - status.st_mtime > STALE_SECONDS


def _put_new(temporary: Path, target: Path) -> None:
    """Give the finished file its name unless the name is taken. A hard link decides that in one step."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links (exFAT, some network ones): all but a race of microseconds.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(temporary, target)


def _keep_permissions(target: Path, temporary: Path) -> None:
    with suppress(OSError):
        os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))


def _sync(path: Path) -> None:
    """Onto the disk, whichever way the writer wrote."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """The new name, too, must survive a power cut. Not every system can sync a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(obj: object, path: str | os.PathLike[str]) -> None:
    """Write `obj` as indented JSON in UTF-8, whole or not at all. Raises ValueError for NaN and infinities."""
    atomic_write(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
