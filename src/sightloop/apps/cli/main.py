"""The command `sightloop`: its table of commands, and the exit status of what goes wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError, Group

import sightloop
from sightloop.apps.cli import (
    bootstrap,
    caption,
    chat,
    convert,
    evaluate,
    models,
    regions,
    synthetic,
    train,
    verbs,
)
from sightloop.apps.cli.output import complain, say
from sightloop.errors import CheckpointError, SightloopError, TokenizerError, UnsupportedError, UsageError

_INTERRUPTED = 130
_PIPE_CLOSED = 141

app = App(
    name="sightloop",
    help="Read images at sight: caption, ask, classify, match and embed them, and find what is in them.",
    version=lambda: sightloop.__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
    help_epilogue=(
        "Exit status: 0 all went well, 1 some inputs failed, 2 wrong usage.\n"
        "Each command has its own help: sightloop caption --help"
    ),
    group_parameters=Group("Options", sort_key=0),
)


for _module in (caption, verbs, regions, chat, bootstrap, convert, evaluate, models, synthetic, train):
    for _command, _epilogue in _module.COMMANDS.items():
        app.command(_command, help_epilogue=_epilogue)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, 1 (some inputs failed), 2 (wrong usage), 130 (Ctrl-C)."""
    try:
        status = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )  # None after --help and --version
        sys.stdout.flush()
        return status or 0
    except CycloptsError as error:
        complain("sightloop", " ".join(str(error).split()))
        say("`sightloop --help` lists the commands, `sightloop COMMAND --help` the options of one.")
        return 2
    except (UsageError, CheckpointError, TokenizerError, UnsupportedError) as error:
        complain("sightloop", error)
        return 2
    except SightloopError as error:
        complain("sightloop", error)
        return 1
    except KeyboardInterrupt:
        say("Interrupted; nothing is half written.")
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our rows has gone: no complaint, and none from the interpreter's last flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:  # a full disk, say: of the run itself, for an image's own are events
        complain("sightloop", error)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        complain("sightloop", f"out of memory: use a smaller --batch-size, or --dtype bfloat16. ({error})")
        return 1
