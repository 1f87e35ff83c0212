"""Answers in a dialogue by sample and rank: signals are those of `judge_answers`, unsafe ones are dropped."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sightloop
from sightloop.errors import UsageError
from sightloop.inference.dialogue import judge_rounds
from sightloop.inference.model import Model
from sightloop.inference.sample_rank import rank_texts
from sightloop.inference.text_generation import WrittenText
from sightloop.protocols import require
from sightloop.ranking.dialogue_network import DialogueNetwork
from sightloop.ranking.dialogue_text import dialogue_of
from sightloop.ranking.options import ABSTENTION, SIGNALS, RankedText, Ranking, RankWeights
from sightloop.ranking.policy import Policy, read_policy
from sightloop.types import Dialogue, Encoded, Message, Round
from tests.checkpoints.test_against_reference import pictures
from tests.tiny_checkpoints.clip_and_blip import write_blip
from tests.tiny_checkpoints.dialogue import dialogue_model

QUESTIONS = ["what is at the top?", "how many?"]
ATTRIBUTES = {"grounded", "safe", "sensible", "specific"}
ANYTHING = Policy(safe=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return dialogue_model(tmp_path_factory.mktemp("dialogue"))


def ranked(texts: list[str]) -> list[RankedText]:
    assert all(isinstance(text, RankedText) for text in texts)
    return [text for text in texts if isinstance(text, RankedText)]


def test_signals_of_answers_are_those_of_the_judge(model: Model) -> None:
    images = pictures(2)
    answers = ranked(model.answer(images, QUESTIONS, samples=6, policy=ANYTHING, details=True))
    for image, question, best in zip(images, QUESTIONS, answers, strict=True):
        kept = [one for one in best.candidates if not one.dropped]
        assert kept
        asked = Dialogue((Round(question, None, tuple(one.text for one in kept)),))
        (scores,) = model.judge_answers(image, asked)
        cosines = model.similarity(image, [one.statement for one in kept])[0]
        for i, one in enumerate(kept):
            assert one.signals.keys() == {"log_prob", "votes", "match", "itc", *ATTRIBUTES}
            assert one.signals["match"] == pytest.approx(float(scores.match[i]), abs=1e-4)
            assert one.signals["itc"] == pytest.approx(float(cosines[i]), abs=1e-4)
            for name in ATTRIBUTES:
                assert one.signals[name] == pytest.approx(float(scores.attributes[name][i]), abs=1e-4)
            # LaMDA's sum beside likelihood and ITM.
            s = one.signals
            by_hand = s["log_prob"] + s["match"] + 3 * s["sensible"] + s["specific"] + s["grounded"]
            assert one.score == pytest.approx(by_hand)
        assert [one.score for one in kept] == sorted((one.score for one in kept), reverse=True)
    only = {**dict.fromkeys(SIGNALS, 0.0), "specific": 1.0}
    other = ranked(model.answer(images, QUESTIONS, samples=6, policy=ANYTHING, weights=only, details=True))
    for best in other:
        scores = [one.signals["specific"] for one in best.candidates if not one.dropped]
        assert scores == sorted(scores, reverse=True)


def test_captions_are_judged_as_statements(model: Model) -> None:
    (best,) = ranked(model.caption(pictures(1), samples=4, details=True))
    kept = [one for one in best.candidates if not one.dropped]
    assert kept
    assert all(one.signals.keys() == {"log_prob", "votes", "itm", "itc"} for one in kept)


def test_history_is_read_with_the_question(model: Model) -> None:
    """A dialogue's candidates are scored after its rounds and its caption, those of two images apart."""
    images = pictures(2)
    turns = [
        Dialogue((Round("what is there?", "circle"), Round("what color is it?")), "a red circle"),
        Dialogue((Round("how many?"),)),
    ]
    texts = [["red", "blue", "red"], ["two", "maybe"]]
    written = [[WrittenText(text, -1.0) for text in own] for own in texts]
    encoded = model.encode(model.preprocessor.read_distinct(images))
    ranking = Ranking(samples=3, policy=ANYTHING)
    results = rank_texts(ranking, model, encoded, written, texts, turns=turns)
    network = require(model.network, DialogueNetwork)
    for image, turn, best in zip(images, turns, results, strict=True):
        last = replace(turn.rounds[-1], candidates=tuple(one.text for one in best.candidates))
        asked = replace(turn, rounds=(*turn.rounds[:-1], last))
        own = model.encode(model.preprocessor.read_distinct([image]))
        scores = judge_rounds(network, model.tokenizer, own, [asked])[0][-1]
        judged = [one.signals["match"] for one in best.candidates]
        assert judged == pytest.approx(scores.match.tolist(), abs=1e-4)
    alone = rank_texts(
        ranking, model, encoded, written, texts, turns=[Dialogue(t.rounds[-1:]) for t in turns]
    )
    match = [{one.text: one.signals["match"] for one in best.candidates} for best in (results[0], alone[0])]
    assert any(not math.isclose(match[0][text], match[1][text], abs_tol=1e-4) for text in match[0])


def test_what_the_judge_calls_unsafe_is_dropped_with_its_reason(model: Model) -> None:
    image = pictures(1)[0]
    options = {"samples": 12, "details": True, "temperature": 2.0}
    (free,) = ranked(model.answer(image, QUESTIONS[0], policy=ANYTHING, **options))
    safe = sorted(one.signals["safe"] for one in free.candidates if not one.dropped)
    assert safe[0] < safe[-1]
    cut = (safe[0] + safe[-1]) / 2
    (best,) = ranked(model.answer(image, QUESTIONS[0], policy=Policy(safe=cut), **options))
    before = {one.text: one for one in free.candidates}
    for one in best.candidates:
        if before[one.text].dropped:
            assert one.dropped == before[one.text].dropped
        else:
            assert bool(one.dropped) == (one.signals["safe"] < cut)
            assert not one.dropped or f"{one.signals['safe']:.2f}, below {cut:g}" in one.dropped
    assert not best.candidates[0].dropped
    assert str(best) == best.candidates[0].text
    (none,) = ranked(model.answer(image, QUESTIONS[0], policy=Policy(safe=1.0), **options))
    assert none.abstained
    json.dumps(none.as_json(), allow_nan=False)


def test_a_policy_file_has_the_threshold(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text("safe = 0.8\n")
    assert read_policy(path) == Policy(safe=0.8)
    path.write_text("")
    assert read_policy(path) == Policy()
    for text in ("safe = 2", "safe = -0.1", "safe = true", 'safe = "0.5"'):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"safe=.* must be a probability"):
            read_policy(path)


def test_fitted_weights_that_are_left_out_are_0() -> None:
    """A file from before a signal existed ranks as it was fitted to."""
    weights = RankWeights.read({"log_prob": 0.5, "itm": 2.0, "bias": -1.0})
    assert {name: value for name, value in asdict(weights).items() if value} == {
        "log_prob": 0.5,
        "itm": 2.0,
        "bias": -1.0,
    }
    assert RankWeights.read({"itm": 2.0}) == RankWeights(itm=2.0)


def test_a_conversation_as_a_dialogue() -> None:
    messages = [
        Message("system", "be brief"),
        Message("user", "what is it?", (np.zeros((8, 8, 3), np.uint8),)),
        Message("assistant", "a circle"),
        Message("user", "what color?"),
    ]
    expected = Dialogue((Round("what is it?", "a circle"), Round("what color?")))
    assert dialogue_of(messages) == expected
    assert sightloop.Message("user", "x").images == ()


@torch.inference_mode()
def greedy(model: Model, image: np.ndarray, caption: str, text: str, words: int) -> str:
    """The decoder's likeliest words, one by one, after a text that is read beside image and caption."""
    network: Any = model.network
    image_tokens = model.encode(model.preprocessor.read_distinct([image])).tokens
    said = network.encoder(torch.from_numpy(model.tokenizer.encode([caption]).ids)).tokens
    ids = torch.from_numpy(model.tokenizer.encode([text]).ids)
    memory = Encoded(torch.cat([image_tokens, said], 1))
    states = network.encode_text(memory, ids, torch.tensor([ids.shape[1]])).tokens
    written = [network.config.start_id]
    for _ in range(words):
        logits = network.lm_logits(network.decoder_states(Encoded(states), torch.tensor([written])))
        written.append(int(logits[0, -1].argmax()))
        if written[-1] == network.config.end_id:
            break
    return model.tokenizer.decode([written[1:]])[0].strip()


def test_a_turn_is_answered_after_caption_and_history(model: Model) -> None:
    image = pictures(1)[0]
    first = [Message("user", "what is at the top?", (image,))]
    more = [*first, Message("assistant", "a circle"), Message("user", "how many?")]
    told = [Message("system", "circles and squares"), *more]
    for messages, caption, text in (
        (first, "", "what is at the top?"),
        (more, "", "what is at the top? a circle. how many?"),
        (told, "circles and squares", "what is at the top? a circle. how many?"),
    ):
        expected = greedy(model, image, caption, text, 5)
        assert model.chat(messages, max_new_tokens=5) == expected
        assert list(model.chat(messages, stream=True, max_new_tokens=5)) == [expected]


def test_another_model_answers_each_question_alone(tmp_path: Path) -> None:
    write_blip(tmp_path / "answer", head="answer")
    writer = sightloop.load(tmp_path / "answer", device="cpu")
    assert "chat" not in writer.capabilities
    first, second = pictures(2)
    talk = [Message("user", "what?", (first,)), Message("assistant", "a"), Message("user", "how?", (second,))]
    assert writer.chat(talk, max_new_tokens=5) == writer.answer(second, "how?", max_new_tokens=5)[0]
    with pytest.raises(UsageError, match="follows no instructions"):
        writer.chat([Message("system", "be brief"), *talk])


def test_a_conversation_by_sample_and_rank_abstains(model: Model) -> None:
    image = pictures(1)[0]
    talk = [
        Message("system", "a circle"),
        Message("user", "what is there?", (image,)),
        Message("assistant", "circle"),
        Message("user", "how many?"),
    ]
    options = {"samples": 6, "policy": ANYTHING, "max_new_tokens": 5, "details": True}
    best = model.chat(talk, **options)
    assert isinstance(best, RankedText)
    kept = [one for one in best.candidates if not one.dropped]
    asked = replace(dialogue_of(talk), caption="a circle")
    last = Round("how many?", None, tuple(one.text for one in kept))
    scores = model.judge_answers(image, replace(asked, rounds=(asked.rounds[0], last)))[-1]
    assert [one.signals["match"] for one in kept] == pytest.approx(scores.match.tolist(), abs=1e-4)
    for bias, abstains in ((-60.0, True), (60.0, False)):
        weights = {"match": 0.01, "bias": bias}
        answer = model.chat(talk, weights=weights, abstain=0.5, stream=True, **{**options, "details": None})
        assert (list(answer) == [ABSTENTION]) == abstains


def test_a_conversation_that_is_out_of_order(model: Model) -> None:
    image = pictures(1)[0]
    for messages, words in (
        ([], "must be the user's question"),
        ([Message("user", "what?", (image,)), Message("assistant", "a")], "must be the user's question"),
        ([Message("user", " ", (image,))], "must be the user's question"),
        ([Message("user", "what?")], "no image"),
        ([Message("robot", "x"), Message("user", "what?", (image,))], "role 'robot'"),
        ([Message("user", "a", (image,)), Message("system", "x"), Message("user", "b")], "role 'system'"),
        ([Message("assistant", "x", (image,)), Message("user", "what?")], "only the user's"),
    ):
        for options in ({}, {"samples": 2}):
            with pytest.raises(UsageError, match=words):
                model.chat(messages, **options)
