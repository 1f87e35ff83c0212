"""The command `sightloop`: its commands, and the exit status of every error."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Group, Parameter, UnusedCliTokensError

import sightloop
from sightloop.apps.cli import (
    bootstrap,
    caption,
    chat,
    convert,
    draw,
    duplicates,
    evaluate,
    index,
    judge,
    models,
    regions,
    search,
    serve,
    synthetic,
    train,
    verbs,
)
from sightloop.apps.cli import settings as cli_settings
from sightloop.apps.cli.help_format import WrappingFormatter
from sightloop.apps.cli.output import (
    is_verbose,
    print_error,
    print_message,
    print_warnings_as_messages,
    set_verbosity,
)
from sightloop.apps.cli.streams import discard_stdout, open_standard_streams
from sightloop.errors import (
    CheckpointError,
    SightloopError,
    TokenizerError,
    UnsupportedError,
    UsageError,
    describe_os_error,
    is_out_of_memory,
)

_INTERRUPTED = 130  # 128 + SIGINT
_PIPE_CLOSED = 141  # 128 + SIGPIPE

app = App(
    name="sightloop",
    help="Vision-language models on your own images: caption, ask, classify, match, detect, search; train, evaluate.",
    version=lambda: sightloop.__version__,
    help_format="plaintext",
    help_formatter=WrappingFormatter(),
    suppress_keyboard_interrupt=False,
    config=cli_settings.PROVIDERS,
    help_epilogue=(
        "Exit status: 0 success, 1 some inputs failed, 2 wrong usage, 130 interrupted, 141 closed output.\n"
        "Options of a command: sightloop caption --help\n\n" + cli_settings.HELP
    ),
    group_parameters=Group("Options", sort_key=0),
)


@Parameter(name="*", group=Group("Messages", sort_key=50))
@dataclass(frozen=True, slots=True, kw_only=True)
class MessageOptions:
    """What is printed on standard error."""

    quiet: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Print errors, failures and warnings alone: no progress, notes and counts."""

    verbose: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Also print every skipped image with the reason, times, and the traceback of an error."""


_MESSAGES = MessageOptions()


def _with_message_options(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with the options of `MessageOptions`."""

    def run(*args: object, messages: MessageOptions = _MESSAGES, **kwargs: object) -> int:
        if messages.quiet and messages.verbose:
            raise UsageError("--quiet and --verbose: give only one of them.")
        set_verbosity(messages.verbose - messages.quiet)
        return command(*args, **kwargs)

    own = inspect.Parameter(
        "messages", inspect.Parameter.KEYWORD_ONLY, default=_MESSAGES, annotation=MessageOptions
    )
    signature = inspect.signature(command, eval_str=True)
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # pyright: ignore
    run.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()}
    run.__annotations__ |= {"messages": MessageOptions, "return": int}
    return run


def completion(shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(name="SHELL")], /) -> int:
    """Print the completion script of a shell.

    Args:
        shell: bash, zsh or fish.
    """
    print(app.generate_completion(shell=shell))
    return 0


_COMPLETION_EPILOGUE = (
    "Examples:\n"
    "  sightloop completion bash > ~/.local/share/bash-completion/completions/sightloop\n"
    "  sightloop completion zsh > ~/.zfunc/_sightloop     # with fpath+=~/.zfunc before compinit in ~/.zshrc\n"
    "  sightloop completion fish > ~/.config/fish/completions/sightloop.fish"
)

_MODULES = (
    caption,
    verbs,
    judge,
    regions,
    chat,
    draw,
    index,
    search,
    duplicates,
    bootstrap,
    convert,
    evaluate,
    models,
    serve,
    synthetic,
    train,
)
for _module in _MODULES:
    for _command, _epilogue in _module.COMMANDS.items():
        app.command(_with_message_options(_command), help_epilogue=_epilogue)
app.command(completion, help_epilogue=_COMPLETION_EPILOGUE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after `sightloop`. Default: those of the process.

    Returns:
        The exit status: 0 success, 1 some inputs failed, 2 wrong usage, 130 interrupted by Ctrl-C, 141 the reader of
        standard output closed it.
    """
    set_verbosity(0)
    open_standard_streams()
    print_warnings_as_messages()
    try:
        status = app(
            arguments, exit_on_error=False, print_error=False, result_action="return_value"
        )  # None after --help and --version
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        discard_stdout()
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        print_message("Interrupted. No file is left incomplete.")
        return _INTERRUPTED
    except Exception as error:
        if is_verbose():
            traceback.print_exc()
        return _report(error)
    finally:
        if reader := sys.modules.get("sightloop.data.images.reader"):
            reader.stop_early()


def _without_far_suggestion(message: str) -> str:
    """A message about an unknown option, without "Did you mean" an option that shares little more than the dashes."""
    typed = re.search(r"Unknown option: \W*([\w-]+)", message)
    meant = re.search(r" Did you mean \W*([\w-]+)\W*$", message)
    if typed and meant:
        close = difflib.SequenceMatcher(None, typed[1].strip("-"), meant[1].strip("-")).ratio() >= 0.6
        return message if close else message[: meant.start()]
    return message


def _report(error: Exception) -> int:
    """Prints an error in one line; returns the exit status. Raises it again if it is a fault of this program."""
    if isinstance(error, CycloptsError):
        message = _without_far_suggestion(" ".join(str(error).split()))
        if isinstance(error, UnusedCliTokensError):
            message = f"{' '.join(error.unused_tokens or ())}: this command takes no such argument."
        print_error("sightloop", message)
        print_message("`sightloop --help` lists the commands, `sightloop COMMAND --help` the options of one.")
        return 2
    if isinstance(error, SightloopError):
        print_error("sightloop", error)
        usage = (UsageError, CheckpointError, TokenizerError, UnsupportedError)
        return 2 if isinstance(error, usage) else 1
    if isinstance(
        error, OSError
    ):  # of the run as a whole, such as a full disk; errors of single images are events
        print_error("sightloop", describe_os_error(error))
        discard_stdout()
        return 1
    if not is_out_of_memory(error):
        raise error
    cause = " ".join(str(error).split())[:200]
    print_error(
        "sightloop",
        "out of memory: use a smaller --batch-size (of `train`: --set data.batch=N), or --dtype bfloat16."
        + (f" ({cause})" if cause else ""),
    )
    return 1
