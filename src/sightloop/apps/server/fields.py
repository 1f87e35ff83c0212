"""Fields that requests share, with their bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from sightloop.apps.server.errors import ApiError
from sightloop.apps.server.image_sources import ImageSources
from sightloop.apps.server.limits import (
    MAX_BEAMS,
    MAX_BODY,
    MAX_CHOICES,
    MAX_IMAGES,
    MAX_NEW_TOKENS,
    MAX_TEXT,
)
from sightloop.types import Box, JsonDict

Text: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT)]
Words: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Name: TypeAlias = Annotated[str, Field(max_length=200)]
ImageText: TypeAlias = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_BODY,
        description="A data URL, base64, or, where the server allows it, an http(s) URL.",
    ),
]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 20)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(max_length=256)]
Pixel: TypeAlias = Annotated[float, Field(ge=-1e6, le=1e6)]
BoxField: TypeAlias = Annotated[
    list[Pixel], Field(min_length=4, max_length=4, description="Left, top, right, bottom in pixels.")
]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer but 200."""

    error: ErrorDetail


class FolderImage(BaseModel):
    """An image of the server's folder."""

    model_config = ConfigDict(extra="forbid")
    path: Annotated[str, Field(min_length=1, max_length=1024, description="Path within the folder.")]


class SentImage(BaseModel):
    """An image in the request."""

    model_config = ConfigDict(extra="forbid")
    image: ImageText


ImageField: TypeAlias = ImageText | FolderImage | SentImage
ImagesField: TypeAlias = ImageField | Annotated[list[ImageField], Field(min_length=1, max_length=MAX_IMAGES)]


class DecodingFields(BaseModel):
    """Decoding options, as in Python; those that are left out are the checkpoint's own."""

    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0.001, le=100)] | None = None
    min_new_tokens: Annotated[int, Field(ge=0, le=MAX_NEW_TOKENS)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    num_return: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=0, le=(1 << 53) - 1)] | None = None
    no_repeat_ngram: Annotated[int, Field(ge=0, le=64)] | None = None
    early_stopping: bool | Literal["never"] | None = None
    forced_bos_id: TokenId | None = None
    force_eos: bool | None = None
    end_ids: TokenIds | None = None
    suppress_tokens: TokenIds | None = None
    begin_suppress_tokens: TokenIds | None = None

    def decoding(self) -> JsonDict:
        """The options that the request has, by name."""
        return {
            name: value for name in DecodingFields.model_fields if (value := getattr(self, name)) is not None
        }


async def read_images(images: ImageSources, sources: Sequence[ImageField], param: str) -> list[bytes]:
    """The bytes of images, in order. Raises ApiError."""

    async def read(i: int, source: ImageField) -> bytes:
        name = f"{param}.{i}"
        match source:
            case FolderImage():
                return await images.path(source.path, name)
            case SentImage():
                return await images.text(source.image, name)
            case _:
                return await images.text(source, name)

    return list(await asyncio.gather(*(read(i, source) for i, source in enumerate(sources))))


def as_box(values: Sequence[float] | None, param: str) -> Box | None:
    """A box of a request. Raises ApiError if it holds nothing."""
    if values is None:
        return None
    left, top, right, bottom = values
    if not (left < right and top < bottom):
        raise ApiError(400, f"{param}: left must be below right, and top below bottom", param=param)
    return left, top, right, bottom


def check_texts(texts: Sequence[str], param: str) -> None:
    """Raises ApiError for a text that is blank."""
    for i, text in enumerate(texts):
        if not text.strip():
            raise ApiError(400, f"{param}: text {i + 1} is empty", param=param)
