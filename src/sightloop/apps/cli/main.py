"""The command `sightloop`: its commands, and the exit status of every error."""

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
from sightloop.apps.cli.help_format import WrappingFormatter
from sightloop.apps.cli.output import print_error, print_message
from sightloop.errors import (
    CheckpointError,
    SightloopError,
    TokenizerError,
    UnsupportedError,
    UsageError,
    is_out_of_memory,
)

_INTERRUPTED = 130  # 128 + SIGINT
_PIPE_CLOSED = 141  # 128 + SIGPIPE

app = App(
    name="sightloop",
    help="Vision-language models on your own images: caption, ask, classify, match, embed, detect; train, evaluate.",
    version=lambda: sightloop.__version__,
    help_format="plaintext",
    help_formatter=WrappingFormatter(),
    suppress_keyboard_interrupt=False,
    help_epilogue=(
        "Exit status: 0 success, 1 some inputs failed, 2 wrong usage, 130 interrupted, 141 closed output.\n"
        "Options of a command: sightloop caption --help"
    ),
    group_parameters=Group("Options", sort_key=0),
)


for _module in (caption, verbs, regions, chat, bootstrap, convert, evaluate, models, synthetic, train):
    for _command, _epilogue in _module.COMMANDS.items():
        app.command(_command, help_epilogue=_epilogue)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after `sightloop`. Default: those of the process.

    Returns:
        The exit status: 0 success, 1 some inputs failed, 2 wrong usage, 130 interrupted by Ctrl-C, 141 the reader of
        standard output closed it.
    """
    try:
        status = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )  # None after --help and --version
        sys.stdout.flush()
        return status or 0
    except CycloptsError as error:
        print_error("sightloop", " ".join(str(error).split()))
        print_message("`sightloop --help` lists the commands, `sightloop COMMAND --help` the options of one.")
        return 2
    except (UsageError, CheckpointError, TokenizerError, UnsupportedError) as error:
        print_error("sightloop", error)
        return 2
    except SightloopError as error:
        print_error("sightloop", error)
        return 1
    except KeyboardInterrupt:
        print_message("Interrupted. No file is left incomplete.")
        return _INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more at exit: let it write to /dev/null without a complaint.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:  # of the run as a whole, such as a full disk; errors of single images are events
        print_error("sightloop", error)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        print_error(
            "sightloop", f"out of memory: use a smaller --batch-size, or --dtype bfloat16. ({reason})"
        )
        return 1
