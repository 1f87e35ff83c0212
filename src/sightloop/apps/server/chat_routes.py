"""POST /v1/chat/completions, as OpenAI's clients speak it.

Models with a chat template converse. A model that writes captions or answers questions takes the last message of the
user with its one image: a request for a description is captioned, another text is answered as a question. It reads no
earlier message and no system message.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from sightloop.apps.server import work
from sightloop.apps.server.chat_fields import ChatAnswer, ChatMessage, ChatRequest, chunk
from sightloop.apps.server.errors import ApiError, JsonResponse, as_api_error, error_body
from sightloop.apps.server.examples import CHAT
from sightloop.apps.server.limits import MAX_CHAT_IMAGES, MAX_NEW_TOKENS
from sightloop.apps.server.model_pool import LoadedModel
from sightloop.apps.server.routing import new_router
from sightloop.apps.server.scheduler import log_unforeseen
from sightloop.apps.server.service import Service, client_of, service_of
from sightloop.protocols import DecoderNetwork
from sightloop.types import JsonDict, Message, Pixels

router = new_router("/v1", "openai")

_DESCRIBE = re.compile(
    r"\b(descri\w*|caption\w*|what(?:.s| is| do you see) (?:in|on) (?:this|the) (?:image|photo\w*|pict\w*))",
    re.IGNORECASE,
)
_DETAIL = re.compile(r"\b(detail\w*|paragraph|long|thorough\w*)\b", re.IGNORECASE)
_SEEDS = 1 << 53


@dataclass(frozen=True)
class _Plan:
    """How a request is answered.

    Args:
        verb: "chat", or the verb that stands in for it.
        text: the question, or a task of Florence-2 ("<OD>"); "" for none.
        length: of a caption, for models that know lengths.
        texts: what is read, for the count of tokens.
        pixels: the images, in order.
        messages: the conversation; () without a chat template.
        decoding: options, the seed aside.
        seed: of the first choice; None if nothing is sampled.
    """

    verb: Literal["chat", "answer", "caption"]
    text: str
    length: str | None
    texts: list[str]
    pixels: list[Pixels]
    messages: tuple[Message, ...]
    decoding: JsonDict
    seed: int | None

    def options(self, choice: int) -> JsonDict:
        """Decoding options of a choice; those of one request differ in their seeds."""
        return (
            self.decoding if self.seed is None else {**self.decoding, "seed": (self.seed + choice) % _SEEDS}
        )


@router.post(
    "/chat/completions",
    response_model=ChatAnswer,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def chat_completions(request: Request, body: Annotated[ChatRequest, CHAT]) -> Response:
    """The next message of a conversation about images."""
    body.check()
    service = service_of(request)
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(service.pool.lease(body.model))
        plan = await _plan(service, served, body)
        head: JsonDict = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": served.id,
        }
        texts = [_pieces(request, served, plan, body, i) for i in range(body.n or 1)]
        if body.stream:
            # The first piece comes before the answer begins, so that a refusal still has its status.
            first = await anext(texts[0], None)
            events = _events(texts, first, served, plan, body, head | {"object": "chat.completion.chunk"})
            return StreamingResponse(_closing(events, stack.pop_all()), media_type="text/event-stream")
        written = ["".join([piece async for piece in pieces]) for pieces in texts]
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": _finish(served, plan, body, text),
            }
            for i, text in enumerate(written)
        ]
        usage = _usage(served, plan, written)
        return JsonResponse({**head, "choices": choices, "usage": usage, "system_fingerprint": None})


async def _closing(events: AsyncGenerator[bytes], stack: AsyncExitStack) -> AsyncGenerator[bytes]:
    """The events, with the model leased until their end."""
    async with stack:
        async for event in events:
            yield event


async def _events(
    texts: list[AsyncGenerator[str]],
    first: str | None,
    served: LoadedModel,
    plan: _Plan,
    body: ChatRequest,
    head: JsonDict,
) -> AsyncGenerator[bytes]:
    """Server-sent events: role, pieces and end of each choice, usage if asked for, [DONE]; or an error."""
    wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    if wants_usage:
        head = {**head, "usage": None}
    written: list[str] = []
    try:
        for i, pieces in enumerate(texts):
            yield _event(chunk(head, {"role": "assistant", "content": ""}, index=i))
            text = first or "" if i == 0 else ""
            if text:
                yield _event(chunk(head, {"content": text}, index=i))
            async for piece in pieces:
                text += piece
                yield _event(chunk(head, {"content": piece}, index=i))
            written.append(text)
            yield _event(chunk(head, {}, _finish(served, plan, body, text), index=i))
        if wants_usage:
            yield _event({**head, "choices": [], "usage": _usage(served, plan, written)})
        yield b"data: [DONE]\n\n"
    except Exception as error:
        log_unforeseen(error)
        known = as_api_error(error)
        yield _event(error_body(known.status_code, known.detail, known.param, known.code))


def _event(content: object) -> bytes:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"


# What is to be written.


async def _plan(service: Service, served: LoadedModel, body: ChatRequest) -> _Plan:
    """How a request is answered by a model. Raises ApiError."""
    last = body.messages[-1]
    converses = "chat" in served.model.capabilities
    turns = body.messages if converses else [last]
    urls = [url for turn in turns for url in turn.images]
    if len(urls) > MAX_CHAT_IMAGES:
        raise ApiError(
            400, f"{len(urls)} images: at most {MAX_CHAT_IMAGES} in a conversation", param="messages"
        )
    if not converses and not urls:
        urls = next((turn.images for turn in reversed(body.messages) if turn.images), [])
    verb, text, length = ("chat", "", None) if converses else _stand_in(served, last.text.strip(), len(urls))
    data = [await service.images.text(url, "messages") for url in urls]
    pixels = await service.decode(served, data, "messages")
    decoding, seed = _decoding(served, body)
    messages = _messages(turns, pixels) if converses else ()
    texts = [turn.text for turn in turns] if converses else [text]
    return _Plan(verb, text, length, texts, pixels, messages, decoding, seed)


def _stand_in(
    served: LoadedModel, text: str, images: int
) -> tuple[Literal["answer", "caption"], str, str | None]:
    """The verb for a message to a model without a chat template, with its text and length."""
    own = served.model.capabilities
    if not own & {"answer", "caption"}:
        message = f"{served.id} writes no text; it can: {', '.join(sorted(own))}"
        raise ApiError(400, message, param="model", code="unsupported")
    if images != 1:
        raise ApiError(
            400, f"{served.id} takes one image with a message, and {images} are there", param="messages"
        )
    describes = not text or _DESCRIBE.search(text) is not None
    if "caption" in own and text.startswith("<"):
        return "caption", text, None
    if "caption" in own and describes:
        return "caption", "", "detailed" if _knows_lengths(served) and _DETAIL.search(text) else None
    if "answer" in own and text:
        return "answer", text, None
    remedy = "ask it to describe the image" if "caption" in own else "ask it a question"
    raise ApiError(400, f"{served.id} cannot do this: {remedy}", param="messages", code="unsupported")


def _knows_lengths(served: LoadedModel) -> bool:
    return "detailed" in getattr(served.model.network, "prompts", ())


def _messages(turns: list[ChatMessage], pixels: list[Pixels]) -> tuple[Message, ...]:
    messages: list[Message] = []
    rest = iter(pixels)
    for turn in turns:
        role = "system" if turn.role == "developer" else turn.role
        messages.append(Message(role, turn.text, tuple(next(rest) for _ in turn.images)))
    return tuple(messages)


def _decoding(served: LoadedModel, body: ChatRequest) -> tuple[JsonDict, int | None]:
    """Decoding options, and the seed of the first choice, None if nothing is sampled.

    Without a temperature the checkpoint's own way of writing holds, which may be beam search. Temperature 0 forbids
    sampling. A seed that is left out is drawn, as clients expect to get another answer when they ask again.
    """
    options: JsonDict = {}
    limit = body.max_completion_tokens or body.max_tokens
    if limit is not None:
        options["max_new_tokens"] = min(limit, _room(served))
    if served.model.options({}).min_new_tokens > options.get("max_new_tokens", MAX_NEW_TOKENS):
        options["min_new_tokens"] = 0
    if body.temperature == 0:
        if served.model.options({}).samples:
            options |= {"num_beams": 1, "top_k": 1}
        return options, None
    if body.temperature is not None or body.top_p is not None:
        options |= {
            "num_beams": 1,
            "temperature": max(body.temperature or 1.0, 0.01),
            "top_p": body.top_p or 1.0,
        }
    if not served.model.options(options).samples:
        return options, None
    return options, secrets.randbelow(_SEEDS) if body.seed is None else body.seed % _SEEDS


def _room(served: LoadedModel) -> int:
    """Tokens that a text of this model may have, as far as is known before the prompt is read."""
    network = served.model.network
    positions = network.config.text.positions
    return (
        min(MAX_NEW_TOKENS, positions - 1)
        if positions and isinstance(network, DecoderNetwork)
        else MAX_NEW_TOKENS
    )


# The writing.


async def _pieces(
    request: Request, served: LoadedModel, plan: _Plan, body: ChatRequest, choice: int
) -> AsyncGenerator[str]:
    """A text, piece by piece, up to the first of the texts that end it."""
    pieces = _written(request, served, plan, choice)
    if not body.stops:
        async for piece in pieces:
            yield piece
        return
    longest, text, shown = max(map(len, body.stops)), "", 0
    try:
        async for piece in pieces:
            text += piece
            ends = [end for stop in body.stops if (end := text.find(stop, max(0, shown - longest))) >= 0]
            # What may be the beginning of such a text is held back.
            safe = min(ends) if ends else max(shown, len(text) - longest + 1)
            if safe > shown:
                yield text[shown:safe]
                shown = safe
            if ends:
                return
        if text[shown:]:
            yield text[shown:]
    finally:
        await pieces.aclose()


async def _written(request: Request, served: LoadedModel, plan: _Plan, choice: int) -> AsyncGenerator[str]:
    service, client, options = service_of(request), client_of(request), plan.options(choice)
    if plan.verb == "chat":

        def start() -> Iterator[str]:
            return served.model.chat(list(plan.messages), stream=True, **options)

        pieces = service.stream(client, start)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()
    elif plan.verb == "answer":
        kind = work.answer_kind(served, candidates=None, top_candidates=128, decoding=options)
        results = await service.run(client, kind, [(plan.pixels[0], (plan.text,))])
        yield results[0][0]
    else:
        kind = work.caption_kind(
            served, prompted=bool(plan.text), length=plan.length, region=None, decoding=options
        )
        results = await service.run(client, kind, [(plan.pixels[0], plan.text or None)])
        yield results[0][0]


def _finish(served: LoadedModel, plan: _Plan, body: ChatRequest, text: str) -> str:
    """Why a text ended: "length" if it has as many tokens as it may."""
    default = {} if plan.verb != "chat" else {"max_new_tokens": 512}
    limit = served.model.options(plan.decoding, default).max_new_tokens
    return "length" if not body.stops and work.count_tokens(served, [text]) >= limit else "stop"


def _usage(served: LoadedModel, plan: _Plan, written: list[str]) -> dict[str, int]:
    """Tokens of the words that were read, images not counted, and of those that were written."""
    read, wrote = work.count_tokens(served, plan.texts), work.count_tokens(served, written)
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
