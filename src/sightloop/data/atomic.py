"""Atomic file writes: a temporary file in the same folder, fsync, then rename or hard link.

Readers see the old file or the new one, never a part of it. A killed writer leaves at most one `.sightloop-*.tmp`;
`remove_stale_temporaries` removes those whose writer has ended. While a temporary is written, its writer holds a
`flock` on it, which the kernel releases when the process ends.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from sightloop.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows has no flock; the age of a temporary decides there
    fcntl = None

TEMP_PREFIX = ".sightloop-"
TEMP_SUFFIX = ".tmp"
# Of renameat2 (Linux) and renamex_np (macOS).
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
_STALE_SECONDS = 24 * 3600.0
# Errors of os.link on a file system without hard links (exFAT, some network file systems).
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL}

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def atomic_write(path: str | os.PathLike[str], data: bytes | str, *, exclusive: bool = False) -> None:
    """Write a file atomically.

    Args:
        path: Destination. A symbolic link is followed, and the permissions of a replaced file are kept.
        data: Content; text is encoded as UTF-8 with its line ends unchanged.
        exclusive: Never replace a file, not even one that appears during the write.

    Raises:
        FileExistsError: `exclusive`, and something exists at `path`.
        UsageError: `path` is a folder, a named pipe, a device or a socket.
        OSError: No such folder, no space, no permission; it names `path`, which is unchanged.
    """
    with atomic_path(path, exclusive=exclusive) as temporary, temporary.open("r+b") as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, exclusive: bool = False) -> Generator[Path]:
    """Context manager for writers that need a path: an empty temporary file that becomes `path` at the end.

    If the block raises, the temporary is deleted and `path` is unchanged. Arguments and errors are those of
    `atomic_write`.

    Yields:
        Path of the temporary, in the folder of `path`.
    """
    target = Path(path)
    if exclusive and os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    if not exclusive and target.is_symlink():
        target = Path(os.path.realpath(target))
    check_regular(target)
    try:
        temporary, descriptor = _create_temporary(target.parent)
    except OSError as error:
        error.filename = str(target)
        raise
    try:
        mode = stat.S_IMODE(os.stat(temporary).st_mode)
        with name_disk_errors(target, temporary):
            yield temporary
            with suppress(OSError):
                os.chmod(temporary, mode)  # safetensors replaces the file by one of mode 0600
            _sync_file(temporary)
        check_regular(target)  # again: the writing may have taken hours
        if exclusive:
            _rename_exclusive(temporary, target)
        else:
            _copy_permissions(target, temporary)
            os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if descriptor is not None:
            os.close(descriptor)
    sync_folder(target.parent)


def check_regular(target: Path) -> None:
    """Raises `UsageError` if something exists at `target` that is not a regular file: it would be replaced by one."""
    try:
        mode = os.stat(target).st_mode
    except OSError:
        return  # absent; the write itself reports anything else
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "not a regular file")
        raise UsageError(f"{target}: it is {kind}, which is not replaced; name a regular file, or a new one")


@contextmanager
def name_disk_errors(target: Path, temporary: Path | None = None) -> Generator[None]:
    """Context manager that gives errors of the disk the name of the file that is written.

    A write to an open file fails without a name. Libraries (safetensors, Arrow) raise their own errors, with the
    number in the text, "No space left on device (os error 28)"; they become an `OSError`.

    Args:
        target: The file.
        temporary: Its temporary, whose name in an error is replaced.
    """
    try:
        yield
    except OSError as error:
        is_unnamed = error.filename is None and error.errno in _DISK_ERRORS
        if is_unnamed or (temporary is not None and error.filename == str(temporary)):
            error.filename = str(target)
        if error.errno is None and (number := _disk_error_number(error)):
            raise OSError(number, os.strerror(number), str(target)) from error
        raise
    except Exception as error:
        if number := _disk_error_number(error):
            raise OSError(number, os.strerror(number), str(target)) from error
        raise


def _disk_error_number(error: Exception) -> int | None:
    """The errno in an error's text, if it is one of the disk."""
    match = re.search(r"\b(?:os error|errno) (\d+)", str(error), re.IGNORECASE)
    return int(match[1]) if match and int(match[1]) in _DISK_ERRORS else None


def try_lock(file: int | IO[bytes]) -> bool:
    """Take an exclusive `flock` on an open file without waiting; closing the file releases it.

    Returns:
        False where another process holds the lock. True also where locks do not exist: on Windows and some network
        file systems.
    """
    return _flock(file) is not False


@contextmanager
def lock_folder(folder: Path, file: str | None = None) -> Generator[None]:
    """Context manager that locks a folder against other processes of sightloop.

    Args:
        folder: An existing folder.
        file: Name of a lock file in it, created if absent; a lock file works over NFS too. None locks the folder
            itself.

    Raises:
        UsageError: Another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    descriptor = (
        os.open(folder / file, os.O_RDWR | os.O_CREAT, 0o666) if file else os.open(folder, os.O_RDONLY)
    )
    try:
        if not try_lock(descriptor):
            raise UsageError(f"{folder}: another process is working on it now; wait for its end")
        yield
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: str | os.PathLike[str]) -> int:
    """Remove the temporaries of killed writers from a folder, not from its subfolders.

    Temporaries of running writers on this machine stay. Files and folders that are gone or not writable are skipped.

    Returns:
        Number of removed files.
    """
    removed = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(TEMP_PREFIX) and entry.name.endswith(TEMP_SUFFIX):
                removed += _remove_if_stale(entry.path)
    return removed


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, so that a rename survives a power cut; skipped where not supported."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange_paths(first: Path, second: Path) -> bool:
    """Exchange two files or folders in one step.

    Returns:
        False where the system or the file system cannot; then nothing has changed.
    """
    names = os.fsencode(first), os.fsencode(second)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            return library.renamex_np(*names, _RENAME_SWAP) == 0
        return library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
    except (AttributeError, OSError, TypeError):  # no such call; TypeError: CDLL(None) on Windows
        return False


def write_json(obj: object, path: str | os.PathLike[str]) -> None:
    """Write an object as indented JSON in UTF-8, atomically. Raises ValueError for NaN and infinities."""
    atomic_write(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _flock(file: int | IO[bytes]) -> bool | None:
    """Whether the lock was taken; None where locks do not exist."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _create_temporary(folder: Path) -> tuple[Path, int | None]:
    """A new empty temporary and the descriptor that holds its lock; None where locks do not exist."""
    while True:
        path = folder / f"{TEMP_PREFIX}{secrets.token_hex(8)}{TEMP_SUFFIX}"
        try:
            # 0o666: the umask gives the file the permissions of any other new file.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        if fcntl is None:
            os.close(descriptor)
            return path, None
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # remove_stale_temporaries of another process may have removed the file between open and flock.
        if os.path.lexists(path):
            return path, descriptor
        os.close(descriptor)


def _remove_if_stale(path: str) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return False
    try:
        if not _is_stale(descriptor):
            return False
        os.unlink(path)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_stale(descriptor: int) -> bool:
    """Whether a temporary's writer has ended: its lock is free or, without locks, the file is a day old."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        return False
    locked = _flock(descriptor)
    return time.time() - status.st_mtime > _STALE_SECONDS if locked is None else locked


def _rename_exclusive(temporary: Path, target: Path) -> None:
    """Give the temporary its final name. Raises FileExistsError where the name is taken."""
    try:
        os.link(temporary, target)  # fails if target exists, in one step
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Without hard links, a race of microseconds remains between this check and the rename.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.rename(temporary, target)


def _copy_permissions(source: Path, target: Path) -> None:
    with suppress(OSError):
        os.chmod(target, stat.S_IMODE(os.stat(source).st_mode))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
