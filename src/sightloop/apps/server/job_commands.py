"""Commands of jobs: `sightloop ...` as a child process that is paused, resumed and cancelled with its job."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.image_library import Library
from sightloop.apps.server.job_list import ServerJob
from sightloop.types import JsonDict

_STOP_SECONDS = 10.0


async def run_command(
    job: ServerJob, arguments: Sequence[str], library: Library, line: Callable[[JsonDict], None]
) -> None:
    """Runs `sightloop ARGUMENTS` as a child process; JSON lines of its output go to `line`.

    Raises:
        ApiError: it failed, with the last line of its messages.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sightloop",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 24,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None

    def pause(paused: bool) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    async def read_errors(stream: asyncio.StreamReader) -> str:
        last = ""
        async for raw in stream:
            last = raw.decode("utf-8", "replace").strip() or last
        return last

    job.on_pause = pause
    errors = asyncio.create_task(read_errors(process.stderr))
    try:
        async for raw in process.stdout:
            if (event := _json_object(raw)) is not None:
                line(event)
        status = await process.wait()
        message = await errors
    except asyncio.CancelledError:
        await _stop(process, pause)
        raise
    finally:
        job.on_pause = None
        errors.cancel()
    if status:
        cause = (
            message.replace(f"{library.home}", library.home.name)
            .replace(f"{library.folder}", library.folder.name)
            .removeprefix("sightloop: ")
        )
        raise ApiError(400, cause or f"the command ended with status {status}")


def _json_object(raw: bytes) -> JsonDict | None:
    """The JSON object of a line of output; None for a line that is none, such as a message."""
    try:
        event = json.loads(raw)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


async def _stop(process: asyncio.subprocess.Process, pause: Callable[[bool], None]) -> None:
    """Interrupts a command, so that it leaves a state to resume from; kills it if it does not end."""
    pause(False)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
