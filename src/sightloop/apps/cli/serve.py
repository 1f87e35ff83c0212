"""The command `sightloop serve`: models behind HTTP, as clients of OpenAI, Cohere, Jina and Infinity speak it."""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote

from cyclopts import Group, Parameter

from sightloop.apps.cli.checks import check_checkpoint
from sightloop.apps.cli.common import load
from sightloop.apps.cli.options import RUNTIME_GROUP, Dtype, check_at_least, integer
from sightloop.apps.cli.output import print_bundled_notice, print_message
from sightloop.checkpoints.catalog import BUNDLED
from sightloop.errors import UsageError, install_command, similar_path
from sightloop.types import Bits

if TYPE_CHECKING:
    from sightloop.apps.server.settings import ServerSettings

_SERVER_GROUP = Group("Server", sort_key=10)
_EPILOGUE = (
    "Examples:\n"
    "  sightloop serve photos/ --open\n"
    "  sightloop serve captions.json -m openai/clip-vit-base-patch32\n"
    "  sightloop serve -m openai/clip-vit-base-patch32 -m Salesforce/blip-image-captioning-base --max-memory 4G\n"
    "  sightloop serve -m M --host 0.0.0.0 --allow-host photos.example.org\n"
    "  curl http://127.0.0.1:8000/v1/embeddings -H 'Content-Type: application/json' -d '{\"input\": \"a dog\"}'"
)


@Parameter(name="*", group=_SERVER_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Where the server listens, and who may call it."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all of this machine's."""

    port: Annotated[int, Parameter(converter=integer)] = 8000
    """TCP port; 0 for a free one."""

    key: Annotated[list[str] | None, Parameter(negative=(), consume_multiple=False)] = None
    """Key that every request but that of /health must have (Authorization: Bearer KEY); repeat the option for several.
    Better in the variable SIGHTLOOP_SERVE_KEY, as other users see command lines. Default: none on 127.0.0.1; on other
    addresses one is made and printed."""

    allow_host: Annotated[
        list[str] | None, Parameter(negative=(), consume_multiple=False, metavar="NAME")
    ] = None
    """Name under which the server may be called, beside its address; repeat the option for several. Default: none."""

    allow_urls: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Fetch images that requests name by URL: from public addresses, on ports 80, 443, 8080 and 8443."""

    open: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Open the server's page in a browser."""

    no_index: Annotated[bool, Parameter(negative=(), show_default=False)] = False
    """Do not build the search index of SOURCE at the start. Default: it is built in the background where there is none
    (in .sightloop beside the images), if the extra search is installed."""


@Parameter(name="*", group=RUNTIME_GROUP)
@dataclass(frozen=True, slots=True, kw_only=True)
class ServedOptions:
    """The models, their device and precision."""

    model: Annotated[list[str] | None, Parameter(alias="-m", negative=(), consume_multiple=False)] = None
    """Hub id, folder or weights file; repeat the option for several. The first is loaded at once, stays loaded and
    serves requests that name no model; the others are loaded on demand. Default: nano, which comes with the package
    and is small and often wrong."""

    device: str = "auto"
    """cpu, cuda, cuda:N, xpu, mps, or auto: a GPU if there is one."""

    dtype: Dtype = "float32"
    """Precision of weights and activations."""

    quantize: Bits | None = None
    """Quantize the weights of language models: int8 or int4. Default: off."""

    max_memory: Annotated[str | None, Parameter(metavar="SIZE")] = None
    """Memory for the weights of loaded models, such as 800M or 6G: those not used for longest are unloaded for others.
    Default: no bound."""

    idle: Annotated[float, Parameter(metavar="SECONDS")] = 600.0
    """Unload a model, but the first, that was not used for this long; 0: never."""

    workers: Annotated[int, Parameter(converter=integer)] = 2
    """Processes that decode images, for each loaded model."""


_SERVER, _SERVED = ServerOptions(), ServedOptions()


def serve(
    source: Annotated[Path | None, Parameter(name="SOURCE")] = None,
    /,
    *,
    server: ServerOptions = _SERVER,
    served: ServedOptions = _SERVED,
) -> int:
    """Serve models over HTTP until Ctrl-C: OpenAI's, Cohere's, Jina's and Infinity's requests, and every verb.

    Requests of one kind are computed together. The requests and answers are in /openapi.json.

    Args:
        source: Folder of images, index of `sightloop index`, or dataset (COCO .json, .csv, .jsonl, .tar, .parquet). The
            page shows its images, and requests may name them by path; nothing else of this machine is read. Default:
            none.
    """
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise UsageError(f"serve needs more packages: {install_command('serve')}")
    settings = _settings(source, server, served)
    for checkpoint in settings.models.values():
        check_checkpoint(checkpoint)
    if served.model is None and BUNDLED in settings.models:
        print_bundled_notice("caption")
    from sightloop.apps.server.serve import serve as run

    def ready(address: str) -> None:
        _say_where(address, settings, server)

    loader = partial(load, device=served.device, dtype=served.dtype, quantize=served.quantize)
    run(settings, loader, ready)
    print_message("Stopped.")
    return 0


def _settings(source: Path | None, server: ServerOptions, served: ServedOptions) -> ServerSettings:
    """The settings, checked. Raises UsageError."""
    from sightloop.apps.server.settings import ServerSettings, is_loopback, model_ids, parse_bytes

    if source is not None and not source.exists():
        raise UsageError(f"{source}: no such folder or file{similar_path(os.fspath(source))}.")
    if not 0 <= server.port <= 65535:
        raise UsageError(f"--port {server.port}: must be from 0 to 65535.")
    check_at_least("--workers", served.workers, 1)
    if not 0 <= served.idle < float("inf"):
        raise UsageError(f"--idle {served.idle:g}: must be at least 0.")
    if not re.fullmatch(r"auto|cpu|(cuda|xpu)(:\d+)?|mps", served.device):
        raise UsageError(f"--device {served.device}: use auto, cpu, cuda, cuda:N, xpu or mps.")
    keys = tuple(server.key or ())
    if any(not re.fullmatch(r"[!-~]{8,200}", key) for key in keys):
        raise UsageError("--key: give 8 to 200 letters, digits and signs, without spaces.")
    if not keys and not is_loopback(server.host):
        keys = (secrets.token_urlsafe(24),)
    return ServerSettings(
        models=model_ids(served.model or [_default_model(source)]),
        host=server.host,
        port=server.port,
        keys=keys,
        folder=source,
        allow_urls=server.allow_urls,
        hosts=tuple(server.allow_host or ()),
        max_memory=None if served.max_memory is None else parse_bytes("--max-memory", served.max_memory),
        idle_seconds=served.idle,
        workers=served.workers,
        build_index=source is not None
        and not server.no_index
        and importlib.util.find_spec("lancedb") is not None,
    )


def _default_model(source: Path | None) -> str:
    """The model that made an index, as a search needs it; else the bundled one."""
    if source is None or importlib.util.find_spec("lancedb") is None:
        return BUNDLED
    from sightloop.search.opening import is_index, open_store

    return open_store(os.fspath(source)).info().space().model or BUNDLED if is_index(source) else BUNDLED


def _say_where(address: str, settings: ServerSettings, server: ServerOptions) -> None:
    """Prints the address, and a key that was made; opens the page if asked to."""
    shown = address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
    print_message(f"Serving {', '.join(settings.models)} at {address} (Ctrl-C stops it)")
    if settings.keys and not server.key:
        print_message(f"The key, made for this run: {settings.keys[0]}")
    if server.open:
        webbrowser.open(f"{shown}/session?key={quote(settings.keys[0])}" if settings.keys else f"{shown}/")


COMMANDS = {serve: _EPILOGUE}
