"""Examples of requests, for the OpenAPI document and whoever reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Body

# A red dot on white, 5 x 5.
PNG = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4//8/w38GIAXDIBKE0DHxgljNBAAO"
    "9TXL0Y4OHwAAAABJRU5ErkJggg=="
)
_IMAGE = {"type": "image_url", "image_url": {"url": PNG}}


def _body(**examples: Mapping[str, object]) -> Any:
    return Body(openapi_examples={name: {"value": value} for name, value in examples.items()})


NATIVE: Mapping[str, Any] = {
    "caption": _body(
        one={"images": PNG},
        prompted={"images": [PNG], "prompt": "a photo of", "num_beams": 3, "max_new_tokens": 20},
    ),
    "answer": _body(
        free={"images": PNG, "questions": "what color is the dot?"},
        chosen={"images": PNG, "questions": ["is it red?"], "candidates": ["yes", "no"]},
    ),
    "classify": _body(
        zero_shot={"images": PNG, "labels": ["a dot", "a square"], "templates": "a drawing of {}."}
    ),
    "match": _body(texts={"images": PNG, "texts": ["a red dot", "a dog"]}),
    "explain": _body(word={"images": PNG, "texts": "a red dot", "word": "dot"}),
    "detect": _body(all={"images": PNG}, named={"images": PNG, "phrases": ["dot"]}),
    "locate": _body(phrase={"images": PNG, "phrases": "the red dot"}),
    "segment": _body(
        phrase={"images": PNG, "phrases": "the red dot"}, box={"images": PNG, "phrases": [[0, 0, 5, 5]]}
    ),
    "read": _body(all={"images": PNG}),
    "embed": _body(both={"images": [PNG], "texts": ["a red dot"]}),
}

CHAT: Any = _body(
    image={
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What color is the dot?"}, _IMAGE]}
        ]
    },
    stream={
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Describe this image."}, _IMAGE]}],
        "stream": True,
        "stream_options": {"include_usage": True},
    },
)

EMBEDDINGS: Any = _body(
    texts={"input": ["a red dot", "a dog"]},
    images={"input": [PNG], "modality": "image"},
    mixed={"input": [{"image": PNG}, {"text": "a red dot"}]},
    messages={"messages": [{"role": "user", "content": [_IMAGE]}]},
)

EMBED_V2: Any = _body(
    texts={"texts": ["a red dot"], "input_type": "search_query", "embedding_types": ["float"]},
    images={"images": [PNG], "input_type": "image", "embedding_types": ["float"]},
    inputs={"inputs": [{"content": [_IMAGE]}], "input_type": "search_document"},
)

RERANK: Any = _body(
    images={"query": "a red dot", "documents": [{"image": PNG}]},
    texts={"query": "a red dot", "documents": ["a circle in red", "a dog"], "top_n": 1},
)
