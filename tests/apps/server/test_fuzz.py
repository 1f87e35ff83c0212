"""Requests that the OpenAPI document allows, and those that it forbids, drawn by schemathesis: never a 5xx.

One server has no folder; the other has one, whose captions are edited and whose jobs start, but run no command.

SIGHTLOOP_FUZZ=1000 draws as many for each route and mode (the default is 6).
"""

from __future__ import annotations

import base64
import os
import random
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from sightloop.apps.server import job_commands
from tests.apps.server.running import Running, jpeg, running
from tests.apps.server.test_gate import raw

EXAMPLES = int(os.environ.get("SIGHTLOOP_FUZZ", "6"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(nano: Any) -> Generator[Running]:
    """Without a folder: no drawn request starts a job or writes a caption."""
    with running(lambda _source: nano) as one:
        yield one


@pytest.fixture(scope="module")
def folder_server(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    """With a folder of images, of which two have captions."""
    folder = tmp_path_factory.mktemp("fuzzed")
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        if number < 2:
            (folder / f"{number}.txt").write_text("a cat\n")

    async def no_command(*_arguments: object) -> None: ...

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_commands, "run_command", no_command)
        with running(lambda _source: nano, folder=folder) as one:
            yield one


def test_schemathesis(server: Running) -> None:
    fuzz(server, {})


def test_schemathesis_with_a_folder(folder_server: Running) -> None:
    images = folder_server.http.get("/api/images").json()["images"]
    fuzz(folder_server, {"image_id": [row["id"] for row in images], "job_id": ["job-1"]})
    folder = folder_server.service.settings.folder
    assert folder is not None
    outside = {path.name for path in folder.parent.iterdir() if "fuzzed" in path.name}
    assert outside <= {folder.name, "fuzzedcurrent"}


def fuzz(server: Running, known: dict[str, list[str]]) -> None:
    """Draws requests for every route. known: values that parts of paths take in half of the requests."""
    schema = schemathesis.openapi.from_dict(server.http.get("/openapi.json").json())
    counts: Counter[int] = Counter()
    draw = random.Random(5)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 17
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and operation.method != "post":
                continue

            @settings(
                max_examples=EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
            )
            @given(operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                for name in case.path_parameters or {}:
                    if name in known and draw.random() < 0.5:
                        case.path_parameters[name] = draw.choice(known[name])
                answer = case.call(base_url=server.address, timeout=60)
                counts[answer.status_code] += 1
                if answer.status_code == 400 and "json" not in answer.headers.get("content-type", ""):
                    return  # bytes that are no HTTP, answered by the layer below
                case.validate_response(answer, checks=CHECKS)

            with suppress(Unsatisfiable):  # a route whose every request is allowed
                ask()
    print(f"{counts.total()} requests: {dict(sorted(counts.items()))}")
    assert set(counts) <= {200, 304, 400, 401, 403, 404, 405, 409, 412, 413, 428, 429}
    assert server.http.get("/health").status_code == 200


def test_mutated_requests(server: Running) -> None:
    """Good requests with bytes changed, cut, repeated, in head and body."""
    draw = random.Random(3)
    document = server.http.get("/openapi.json").json()
    bodies = [
        (path, example["value"])
        for path, operations in document["paths"].items()
        if "requestBody" in operations.get("post", {})
        for example in operations["post"]["requestBody"]["content"]["application/json"]
        .get("examples", {})
        .values()
    ]
    statuses: Counter[bytes] = Counter()
    for _ in range(10 * EXAMPLES):
        path, body = draw.choice(bodies)
        content = httpx.Request("POST", "http://127.0.0.1", json=body).read()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
        request = bytearray(head + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        for _ in range(draw.randint(1, 6)):
            at, kind = draw.randrange(len(request)), draw.randrange(4)
            if kind == 0:
                request[at] = draw.randrange(256)
            elif kind == 1:
                del request[at : at + draw.randint(1, 9)]
            elif kind == 2:
                request[at:at] = draw.randbytes(draw.randint(1, 9))
            else:
                request[at:at] = request[at : at + draw.randint(1, 50)]
        statuses[raw(server, bytes(request), seconds=60)[9:12]] += 1
    assert all(not status or status[:1] in (b"2", b"4") for status in statuses), statuses
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("seed", range(2))
def test_damaged_images(server: Running, seed: int) -> None:
    """JPEGs with bytes changed: read, or refused as images."""
    draw = random.Random(seed)
    whole = jpeg(seed, (80, 60))
    for _ in range(3 * EXAMPLES):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        body = {"input": [{"image": base64.b64encode(data).decode()}]}
        answer = server.post("/v1/embeddings", body)
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] == "invalid_image"
