"""The clients of OpenAI and Cohere against a running server: what they send is understood, what they get they read."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Generator
from pathlib import Path
from typing import Any

import cohere
import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from tests.apps.server.running import Running, data_url, jpeg


@pytest.fixture(scope="module")
def client(server: Running) -> Generator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as one:
        yield one


def ask(text: str, *images: bytes) -> list[Any]:
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(image), "detail": "low"}} for image in images
    ]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


# OpenAI.


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["nano"]
    assert "caption" in client.models.retrieve("nano").model_dump()["capabilities"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


def test_a_request_for_a_description_is_captioned(client: openai.OpenAI, nano: Any) -> None:
    for text in (
        "Describe this image in one short sentence.",
        "What is in this image?",
        "",
        "caption please",
    ):
        answer = client.chat.completions.create(model="nano", messages=ask(text, jpeg()))
        assert answer.choices[0].message.content == nano.caption(jpeg())[0]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 0


def test_a_question_is_answered_and_unknown_fields_are_ignored(client: openai.OpenAI, nano: Any) -> None:
    question = "what color is the wall?"
    extra = {"user": "u", "stop": None, "promptPrefix": "x", "presence_penalty": 0, "top_k": 3}
    answer = client.chat.completions.create(model="nano", messages=ask(question, jpeg(1)), extra_body=extra)
    assert answer.choices[0].message.content == nano.answer(jpeg(1), question)[0]


def test_an_earlier_image_serves_a_later_question(client: openai.OpenAI, nano: Any) -> None:
    turns = [
        *ask("what is it?", jpeg(2)),
        {"role": "assistant", "content": "a wall"},
        *ask("what color is it?"),
    ]
    answer = client.chat.completions.create(model="nano", messages=turns)
    assert answer.choices[0].message.content == nano.answer(jpeg(2), "what color is it?")[0]


def test_a_streamed_answer_is_the_whole_one(client: openai.OpenAI) -> None:
    messages = ask("describe it", jpeg(3))
    whole = client.chat.completions.create(model="nano", messages=messages).choices[0].message.content
    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="nano", messages=messages, stream=True, stream_options=options)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(server: Running) -> None:
    body = {"messages": ask("describe it", jpeg()), "stream": True}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_choices_differ_when_sampled_and_repeat_with_the_seed(client: openai.OpenAI) -> None:
    def texts(**options: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            model="nano", messages=ask("describe", jpeg()), max_tokens=12, **options
        )
        return [choice.message.content for choice in answer.choices]

    first = texts(n=3, temperature=1.5, seed=7)
    assert len(set(first)) > 1
    assert first == texts(n=3, temperature=1.5, seed=7)
    assert len(set(texts(n=2, temperature=0))) == 1


def test_length_and_stop(client: openai.OpenAI) -> None:
    messages = ask("describe", jpeg())
    short = client.chat.completions.create(model="nano", messages=messages, max_tokens=2, temperature=0)
    assert short.choices[0].finish_reason == "length"
    whole = client.chat.completions.create(model="nano", messages=messages).choices[0].message.content or ""
    word = whole.split()[2]
    cut = client.chat.completions.create(model="nano", messages=messages, stop=word)
    assert cut.choices[0].message.content == whole.partition(word)[0]
    # A client's own default may be far more than a model has room for.
    long = client.chat.completions.create(model="nano", messages=messages, max_tokens=4096)
    assert long.choices[0].message.content == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("presence_penalty", 1.0),
        ("n", 5),
        ("temperature", 3),
        ("max_tokens", 0),
    ],
)
def test_what_the_models_cannot_do_is_refused(client: openai.OpenAI, name: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="nano", messages=ask("x", jpeg()), **{name: value})
    assert caught.value.param == name


def test_the_number_of_images_is_checked(client: openai.OpenAI) -> None:
    for images in ([], [jpeg()] * 2, [jpeg()] * 17):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="nano", messages=ask("what?", *images))


def test_text_embeddings_in_the_clients_default_and_as_numbers(client: openai.OpenAI, nano: Any) -> None:
    texts = ["a dog", "a red wall"]
    packed = client.embeddings.create(model="nano", input=texts)  # asks for base64
    plain = client.embeddings.create(model="nano", input=texts, encoding_format="float")
    expected = nano.embed_texts(texts)
    for answer in (packed, plain):
        assert [each.index for each in answer.data] == [0, 1]
        np.testing.assert_allclose([each.embedding for each in answer.data], expected, atol=1e-6)
    assert packed.usage.prompt_tokens == 5


def test_base64_is_little_endian_float32(server: Running, nano: Any) -> None:
    body = {"input": "a dog", "encoding_format": "base64"}
    text = server.post("/v1/embeddings", body).json()["data"][0]["embedding"]
    values = struct.unpack(f"<{nano.network.embed_dim}f", base64.b64decode(text))
    np.testing.assert_allclose(values, nano.embed_texts("a dog")[0], atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [
        lambda url: {"input": [url], "modality": "image"},  # Infinity
        lambda url: {"input": url, "modality": "image"},
        lambda url: {"input": [{"image": url}]},  # Jina
        lambda url: {"input": [{"image": url.partition(",")[2]}]},
        lambda url: {  # vLLM
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
        },
    ],
)
def test_every_form_of_an_image_embeds_it(server: Running, nano: Any, form: Any) -> None:
    answer = server.post("/v1/embeddings", form(data_url(jpeg(4))))
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(
        answer.json()["data"][0]["embedding"], nano.embed_images(jpeg(4))[0], atol=1e-6
    )


def test_an_image_may_be_larger_than_a_text(server: Running, nano: Any) -> None:
    """A photograph in base64 is longer than the longest text; in `input` both are strings."""
    noise = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    url = data_url(file.getvalue())
    assert len(url) > 200_000
    forms: list[Any] = [
        {"input": url, "modality": "image"},
        {"input": [url], "modality": "image"},
        {"input": [{"image": url}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]},
    ]
    for form in forms:
        assert server.post("/v1/embeddings", form).status_code == 200
    assert server.post("/v2/embed", {"images": [url]}).status_code == 200
    assert server.post("/v1/rerank", {"query": "noise", "documents": [{"image": url}]}).status_code == 200
    assert server.post("/api/caption", {"images": url, "max_new_tokens": 3}).status_code == 200
    assert server.post("/v1/chat/completions", {"messages": ask("what?", file.getvalue())}).status_code == 200
    refused = server.post("/v1/embeddings", {"input": url})
    assert refused.status_code == 400
    assert "modality" in refused.json()["error"]["message"]


def test_images_and_texts_keep_their_order(server: Running, nano: Any) -> None:
    inputs = [{"text": "a"}, {"image": data_url(jpeg(1))}, {"text": "b"}, {"image": data_url(jpeg(2))}]
    rows = [each["embedding"] for each in server.post("/v1/embeddings", {"input": inputs}).json()["data"]]
    texts, images = nano.embed_texts(["a", "b"]), nano.embed_images([jpeg(1), jpeg(2)])
    np.testing.assert_allclose(rows, [texts[0], images[0], texts[1], images[1]], atol=1e-6)


def test_wrong_dimensions_token_ids_and_unknown_models(client: openai.OpenAI) -> None:
    client.embeddings.create(model="nano", input="x", dimensions=128)
    for options in (
        {"dimensions": 64},
        {"input": [1, 2]},
        {"input": [[1, 2], [3]]},
        {"input": ""},
        {"input": []},
    ):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(**{"model": "nano", "input": "x", **options})
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="x")


# Cohere.


@pytest.fixture(scope="module")
def cohere_client(server: Running) -> Generator[cohere.ClientV2]:
    with httpx.Client(timeout=60) as http:
        yield cohere.ClientV2(api_key="none", base_url=server.address, httpx_client=http)


def test_cohere_embeds(cohere_client: cohere.ClientV2, nano: Any) -> None:
    texts = cohere_client.embed(
        model="nano", texts=["a", "b"], input_type="search_document", embedding_types=["float"]
    )
    np.testing.assert_allclose(texts.embeddings.float_, nano.embed_texts(["a", "b"]), atol=1e-6)
    images = cohere_client.embed(
        model="nano", images=[data_url(jpeg())], input_type="image", embedding_types=["float"]
    )
    np.testing.assert_allclose(images.embeddings.float_, nano.embed_images(jpeg()), atol=1e-6)
    inputs: Any = [{"content": [{"type": "image_url", "image_url": {"url": data_url(jpeg())}}]}]
    mixed = cohere_client.embed(
        model="nano", inputs=inputs, input_type="search_document", embedding_types=["float"]
    )
    assert mixed.embeddings.float_ == images.embeddings.float_
    with pytest.raises(cohere.BadRequestError):
        cohere_client.embed(model="nano", texts=["a"], input_type="x", embedding_types=["int8"])


def test_cohere_reranks(cohere_client: cohere.ClientV2, nano: Any) -> None:
    documents = ["a puppy", "a car", "a dog"]
    answer = cohere_client.rerank(model="nano", query="a dog", documents=documents, top_n=2)
    cosines = nano.embed_texts(documents) @ nano.embed_texts("a dog")[0]
    assert [result.index for result in answer.results] == list(np.argsort(-cosines)[:2])
    np.testing.assert_allclose(answer.results[0].relevance_score, 0.5 + 0.5 * cosines[2], atol=1e-6)


def test_images_are_reranked_by_their_match(server: Running, nano: Any) -> None:
    images = [jpeg(i) for i in range(3)]
    expected = nano.match(images, "a wall")
    forms = [
        [{"image": data_url(image)} for image in images],
        [{"content": [{"type": "image_url", "image_url": {"url": data_url(image)}}]} for image in images],
    ]
    for path in ("/v1/rerank", "/v2/rerank"):
        for documents in forms:
            answer = server.post(path, {"query": "a wall", "documents": documents}).json()
            assert [each["index"] for each in answer["results"]] == list(np.argsort(-expected, kind="stable"))
            scores = [each["relevance_score"] for each in answer["results"]]
            np.testing.assert_allclose(scores, np.sort(expected)[::-1], atol=1e-6)


# Gradio, whose chat loader goes through OpenAI's client.


@pytest.mark.parametrize("streaming", [True, False])
def test_chat_loader_of_gradio(server: Running, nano: Any, tmp_path: Path, streaming: bool) -> None:
    gradio = pytest.importorskip("gradio")
    (tmp_path / "a.jpg").write_bytes(jpeg())
    chat = gradio.load_chat(
        f"{server.address}/v1/",
        model="nano",
        token="none",
        streaming=streaming,
        file_types=["image"],
    )
    message = {"text": "what is it?", "files": [str(tmp_path / "a.jpg")]}
    answer = chat.fn(message, [])
    assert (list(answer)[-1] if streaming else answer) == nano.answer(jpeg(), "what is it?")[0]
