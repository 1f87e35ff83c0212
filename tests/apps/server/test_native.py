"""The native verbs: what comes over HTTP is what Python returns, alone and beside others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sightloop
from tests.apps.server.running import Running, data_url, jpeg, running
from tests.tiny_checkpoints.florence import write_florence
from tests.tiny_checkpoints.llava import LLAVA_15, write_llava

IMAGES = [jpeg(i) for i in range(3)]
URLS = [data_url(image) for image in IMAGES]


def test_captions(server: Running, nano: Any) -> None:
    assert server.post("/api/caption", {"images": URLS}).json()["captions"] == nano.caption(IMAGES)
    options = {"num_beams": 3, "num_return": 2, "max_new_tokens": 9, "length_penalty": 0.1}
    answer = server.post("/api/caption", {"images": URLS, "prompt": "a photo of", **options}).json()
    assert answer["captions"] == nano.caption(IMAGES, "a photo of", **options)
    sampled = {"top_p": 0.9, "seed": 5, "num_return": 2}
    answer = server.post("/api/caption", {"images": URLS, **sampled}).json()
    assert answer["captions"] == nano.caption(IMAGES, **sampled)


def test_answers(server: Running, nano: Any) -> None:
    questions = ["what color is it?", "is it day?", "who is there?"]
    answer = server.post("/api/answer", {"images": URLS, "questions": questions}).json()
    assert answer["answers"] == nano.answer(IMAGES, questions)
    answer = server.post(
        "/api/answer", {"images": URLS[0], "questions": questions, "candidates": ["red", "no"]}
    )
    assert answer.json()["answers"] == nano.answer(IMAGES[0], questions, ["red", "no"])
    beams = {"num_beams": 2, "num_return": 2}
    answer = server.post("/api/answer", {"images": URLS, "questions": questions[0], **beams}).json()
    assert answer["answers"] == nano.answer(IMAGES, questions[0], **beams)


def test_probabilities(server: Running, nano: Any) -> None:
    body = {"images": URLS, "labels": ["a dog", "a wall"], "templates": ["a photo of {}.", "{}"]}
    answer = server.post("/api/classify", body).json()
    expected = nano.classify(IMAGES, body["labels"], body["templates"])
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-6)
    assert answer["activation"] == expected.activation
    texts = ["a dog", "a wall", "noise"]
    pairs = server.post("/api/match", {"images": URLS, "texts": texts}).json()["probabilities"]
    np.testing.assert_allclose(pairs, nano.match(IMAGES, texts), atol=1e-5)
    one = server.post("/api/match", {"images": URLS[1], "texts": texts}).json()["probabilities"]
    np.testing.assert_allclose(one, nano.match(IMAGES[1], texts), atol=1e-5)


def test_embeddings(server: Running, nano: Any) -> None:
    answer = server.post("/api/embed", {"images": URLS, "texts": "a dog"}).json()
    np.testing.assert_allclose(answer["images"], nano.embed_images(IMAGES), atol=1e-6)
    np.testing.assert_allclose(answer["texts"], nano.embed_texts("a dog"), atol=1e-6)


def test_requests_together_give_what_each_gives_alone(server: Running, nano: Any) -> None:
    """Ten clients at once: kinds mix in the queue, and some requests are wrong."""

    def ask(i: int) -> Any:
        image = URLS[i % 3]
        match i % 4:
            case 0:
                return server.post("/api/caption", {"images": image, "max_new_tokens": 8}).json()["captions"]
            case 1:
                return server.post("/api/answer", {"images": image, "questions": f"is it {i}?"}).json()[
                    "answers"
                ]
            case 2:
                return server.post("/api/match", {"images": image, "texts": f"text {i}"}).json()[
                    "probabilities"
                ]
            case _:
                return server.post("/api/caption", {"images": image, "max_new_tokens": 4000}).status_code

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(ask, range(20)))
    for i, answer in enumerate(answers):
        image = IMAGES[i % 3]
        match i % 4:
            case 0:
                assert answer == nano.caption(image, max_new_tokens=8)
            case 1:
                assert answer == nano.answer(image, f"is it {i}?")
            case 2:
                np.testing.assert_allclose(answer, nano.match(image, f"text {i}"), atol=1e-5)
            case _:
                assert answer == 400


def test_images_of_the_folder(server: Running, nano: Any, photos: Path) -> None:
    answer = server.post("/api/caption", {"images": [{"path": "a.jpg"}, {"path": "inner/c.jpg"}]}).json()
    assert answer["captions"] == nano.caption([photos / "a.jpg", photos / "inner" / "c.jpg"])


@pytest.mark.parametrize(
    "path",
    [
        "../outside/secret.jpg",
        "inner/../../x.jpg",
        "/etc/passwd",
        "link.jpg",
        "way/secret.jpg",
        "loop.jpg",
        "notes.txt",
        "inner",
        "absent.jpg",
        "a.jpg\0.jpg",
        "..\\a.jpg",
        "a.jpg/b.jpg",
        "//a.jpg",
        "%2e%2e/a.jpg",
        "~/a.jpg",
        "./../photos/a.jpg",
        "C:\\a.jpg",
        "\u2025/a.jpg",
    ],
)
def test_nothing_outside_the_folder_is_read(server: Running, photos: Path, path: str) -> None:
    answer = server.post("/api/embed", {"images": {"path": path}})
    assert answer.status_code == 404
    assert str(photos) not in answer.text
    assert str(photos.parent) not in answer.text


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("caption", {"images": []}, "images"),
        ("caption", {"images": URLS * 11}, "images"),
        ("caption", {"images": URLS[0], "prompt": "a", "length": "short"}, "exclude"),
        ("caption", {"images": URLS, "prompt": ["a", "b"]}, "2 prompts"),
        ("caption", {"images": URLS[0], "num_beams": 17}, "num_beams"),
        ("caption", {"images": URLS[0], "num_beams": 2, "top_p": 0.5}, "num_beams"),
        ("caption", {"images": URLS[0], "suppress_tokens": [1 << 19]}, "suppress_tokens"),
        ("caption", {"images": URLS[0], "forced_bos_id": 1 << 19}, "forced_bos_id"),
        ("caption", {"images": URLS[0], "max_new_tokens": 64}, "max_new_tokens"),
        ("caption", {"images": URLS[0], "region": [5, 5, 1, 9]}, "region"),
        ("caption", {"images": "file:///etc/passwd"}, "data URL"),
        ("caption", {"images": "http://127.0.0.1/a.jpg"}, "remote"),
        ("caption", {"images": "data:image/png,abc"}, "data URL"),
        ("caption", {"images": "!!!"}, "base64"),
        ("caption", {"images": {"image": URLS[0], "path": "a.jpg"}}, "images"),
        ("answer", {"images": URLS, "questions": ["a", "b"]}, "3 images and 2 questions"),
        ("answer", {"images": URLS[0], "questions": "  "}, "empty"),
        ("answer", {"images": URLS[0], "questions": ["q"] * 600}, "512"),
        ("classify", {"images": URLS[0]}, "labels"),
        ("classify", {"images": URLS[0], "labels": ["a"], "templates": "no place"}, "template"),
        ("classify", {"images": URLS[0], "labels": ["a"] * 2000, "templates": ["{}"] * 3}, "4096"),
        ("classify", {"images": URLS[0], "labels": ["a"], "activation": "sigmoid"}, "sigmoid"),
        ("detect", {"images": URLS[0]}, "cannot detect"),
        ("segment", {"images": URLS[0], "phrases": ["a", [0, 0, 1, 1]]}, "both"),
        ("embed", {}, "images"),
        ("embed", {"images": URLS[0], "model": "../nano"}, "no model"),
    ],
)
def test_wrong_requests_are_refused_with_the_reason(
    server: Running, path: str, body: dict[str, Any], word: str
) -> None:
    answer = server.post(f"/api/{path}", body)
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"]


def test_regions_and_several_models(tmp_path: Path) -> None:
    """Florence-2's verbs; the second model is loaded when it is asked for, and chats."""
    write_florence(tmp_path / "florence")
    write_llava(tmp_path / "llava", tiled=False, template=LLAVA_15)
    sources = {name: str(tmp_path / name) for name in ("florence", "llava")}
    with running(lambda source: sightloop.load(source, device="cpu"), models=sources) as server:
        model = sightloop.load(sources["florence"], device="cpu")
        short = {"max_new_tokens": 30}
        for verb, arguments, call in (
            ("detect", {}, lambda: model.detect(IMAGES, **short)),
            ("detect", {"describe": True}, lambda: model.detect(IMAGES, describe=True, **short)),
            ("detect", {"phrases": ["a dog"]}, lambda: model.detect(IMAGES, ["a dog"], **short)),
            (
                "detect",
                {"region": [1, 1, 20, 20]},
                lambda: model.detect(IMAGES, region=(1, 1, 20, 20), **short),
            ),
            ("locate", {"phrases": "a dog"}, lambda: model.locate(IMAGES, "a dog", **short)),
            ("segment", {"phrases": "a dog"}, lambda: model.segment(IMAGES, "a dog", **short)),
            ("segment", {"phrases": [[1, 1, 9, 9]]}, lambda: model.segment(IMAGES, [(1, 1, 9, 9)], **short)),
            ("read", {}, lambda: model.read_text(IMAGES, **short)),
        ):
            answer = server.post(f"/api/{verb}", {"images": URLS, **arguments, **short})
            assert answer.status_code == 200, answer.text
            rows = [[(r.label, list(r.box), [list(p) for p in r.polygons]) for r in own] for own in call()]
            shown = [[(r["label"], r["box"], r["polygons"]) for r in own] for own in answer.json()["regions"]]
            assert shown == rows, verb
        states = server.http.get("/v1/models").json()["data"]
        assert [state["loaded"] for state in states] == [True, False]
        body = {"model": "llava", "max_tokens": 6, "temperature": 0}
        content = [
            {"type": "text", "text": "what is it?"},
            {"type": "image_url", "image_url": {"url": URLS[0]}},
        ]
        body |= {"messages": [{"role": "user", "content": content}]}
        whole = server.post("/v1/chat/completions", body)
        assert whole.status_code == 200, whole.text
        text = whole.json()["choices"][0]["message"]["content"]
        llava = sightloop.load(sources["llava"], device="cpu")
        messages = [sightloop.Message("user", "what is it?", (IMAGES[0],))]
        assert text == llava.chat(messages, max_new_tokens=6)
        streamed = server.post("/v1/chat/completions", {**body, "stream": True}).text
        assert streamed.count('"role":"assistant"') == 1
        assert streamed.endswith("data: [DONE]\n\n")
        assert str(tmp_path) not in server.http.get("/v1/models").text
