"""Options from outside the command line: environment variables, and defaults in `sightloop.toml`.

The command line has precedence over environment variables, and these over the file.
"""

from __future__ import annotations

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts.config import Dict, Env

from sightloop.errors import UsageError, os_error_reason
from sightloop.types import JsonDict

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.argument import ArgumentCollection

CONFIG_FILE = "sightloop.toml"
CONFIG_VARIABLE = "SIGHTLOOP_CONFIG"
# Keys at the top of the file, for every command that has the option.
SHARED = (
    *("model", "device", "dtype", "quantize", "lora", "batch-size", "workers", "max-pixels"),
    *("json", "quiet", "verbose"),
)
HELP = (
    "Defaults of options, in order of precedence:\n"
    "  SIGHTLOOP_CAPTION_NUM_BEAMS=3    environment variable, for one command\n"
    "  SIGHTLOOP_DEVICE=cuda            environment variable, for all commands\n"
    "  sightloop.toml                   file in this folder or above it, or the file\n"
    "                                   that SIGHTLOOP_CONFIG names:\n"
    '    device = "cuda"\n'
    "    [caption]\n"
    '    model = "Salesforce/blip-image-captioning-base"\n'
    "    num-beams = 3"
)


def config_path() -> Path | None:
    """The file that SIGHTLOOP_CONFIG names, or the nearest `sightloop.toml` in the working folder and those above it.

    Raises:
        UsageError: SIGHTLOOP_CONFIG names no file.
    """
    if named := os.environ.get(CONFIG_VARIABLE):
        if not os.path.isfile(named):
            raise UsageError(f"{CONFIG_VARIABLE}={named}: no such file.")
        return Path(named)
    try:
        folder = Path.cwd()
    except OSError:  # the working folder was deleted
        return None
    return next(
        (path for parent in (folder, *folder.parents) if (path := parent / CONFIG_FILE).is_file()), None
    )


def from_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Config provider of cyclopts: gives options that are not set yet their values of the file.

    Raises:
        UsageError: The file cannot be read, or has an unknown table or key.
    """
    path = config_path()
    if path is None or not commands:
        return
    tables = dict(_read(path))
    shared = {key: tables.pop(key) for key in list(tables) if not isinstance(tables[key], dict)}
    if unknown := sorted(key for key in shared if key.replace("_", "-") not in SHARED):
        raise UsageError(
            f"{path}: {unknown[0]}: not an option of all commands ({', '.join(SHARED)}); put it into the table of its "
            f"command, such as [{commands[0]}]."
        )
    known = [name for name in app.app_stack.current_frame[0] if not name.startswith("-")]
    if unknown := sorted(set(tables) - set(known)):
        raise UsageError(f"{path}: [{unknown[0]}]: no such command; there are {', '.join(known)}.")
    own = tables.get(commands[0], {})
    Dict({commands[0]: own}, source=str(path))(app, commands, arguments)
    Dict({commands[0]: shared}, source=str(path), allow_unknown=True)(app, commands, arguments)


@cache
def _read(path: Path) -> JsonDict:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {os_error_reason(error)}.") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise UsageError(f"{path}: not a TOML file: {error}.") from error


PROVIDERS = (Env("SIGHTLOOP_", show=False), Env("SIGHTLOOP_", command=False, show=False), from_file)
