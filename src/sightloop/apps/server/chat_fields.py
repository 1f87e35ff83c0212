"""Fields of OpenAI's chat completions. Fields that are not named here are ignored, as clients send many."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, Field

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.fields import ImageText, Name, Text
from sightloop.apps.server.limits import MAX_CHOICES, MAX_TURNS
from sightloop.types import JsonDict


class TextPart(BaseModel):
    """Words of a message."""

    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    """Where an image is; `detail` is ignored."""

    url: ImageText
    detail: Annotated[str, Field(max_length=20)] | None = None


class ImagePart(BaseModel):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl | ImageText


ContentPart: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]
ContentParts: TypeAlias = Annotated[list[ContentPart], Field(max_length=MAX_TURNS)]


class ChatMessage(BaseModel):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | ContentParts | None = None

    @property
    def text(self) -> str:
        """Its words."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if isinstance(part, TextPart))
        return self.content or ""

    @property
    def images(self) -> list[str]:
        """Its images, as they were sent."""
        parts = self.content if isinstance(self.content, list) else []
        urls = [part.image_url for part in parts if isinstance(part, ImagePart)]
        return [url if isinstance(url, str) else url.url for url in urls]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None


Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=100)]
Loose: TypeAlias = dict[str, object]


class ChatRequest(BaseModel):
    """A conversation whose next message is wanted."""

    model: Name | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_TURNS)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    tools: Annotated[list[Loose], Field(max_length=128)] | None = None
    tool_choice: Annotated[str, Field(max_length=20)] | Loose | None = None
    response_format: Loose | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    logit_bias: Loose | None = None

    @property
    def stops(self) -> list[str]:
        """The texts at which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self) -> None:
        """Raises ApiError (400) for what these models cannot do, rather than ignoring it."""
        refused = {
            "tools": self.tools,
            "response_format": (self.response_format or {}).get("type", "text") != "text",
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "logit_bias": self.logit_bias,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        for name, value in refused.items():
            if value:
                raise ApiError(
                    400, f"{name}: not supported; leave it out", param=name, code="unsupported_parameter"
                )
        for i, message in enumerate(self.messages):
            if message.images and message.role != "user":
                raise ApiError(400, "images come with the user's messages", param=f"messages.{i}.content")
        if self.messages[-1].role != "user":
            raise ApiError(400, "the last message must be the user's", param="messages")


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Loose
    finish_reason: str


class ChatAnswer(BaseModel):
    """The next message; streamed as server-sent events if `stream` is set."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: dict[str, int]


def chunk(head: JsonDict, delta: JsonDict, finish: str | None = None, index: int = 0) -> JsonDict:
    """A chunk of a streamed answer."""
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**head, "choices": [choice]}
