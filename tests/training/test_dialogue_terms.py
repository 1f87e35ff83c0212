"""Dialogues in training: rows of a batch, the losses against slow loops, the checkpoint with its attribute head."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UsageError
from sightloop.objectives.attributes import attribute_chance, attribute_loss
from sightloop.ranking.dialogue_text import Reading, context_text
from sightloop.training.build import TrainableModel, build_model
from sightloop.training.config import ModelSettings, Recipe, apply_settings
from sightloop.training.dataloader import Batch, BatchLoader, on_device
from sightloop.training.dialogue_rows import DialogueRows, draw_rounds
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_context import LossContext
from sightloop.training.loss_terms import LOSS_TERMS
from sightloop.training.recipes import RECIPES
from sightloop.training.trainer import train
from sightloop.types import Dialogue, Encoded, Round, Sample

NAMES = ("grounded", "safe", "sensible", "specific")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dialogue") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 6, seed=0, dialogues=True))
    return path


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    world = RECIPES["world_dialogue"]
    data = replace(world.data, batch=4, rounds=2, dialogue_captions=0.5)
    return replace(world, data=data, model=ModelSettings(size="world-32", vocab_size=300))


@pytest.fixture(scope="module")
def trainee(recipe: Recipe, shard: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainableModel:
    """The smallest size, with positions for a whole dialogue."""
    from sightloop.training import model_sizes

    family, config = model_sizes.SIZES["world-32"]
    longer = replace(config, text=replace(config.text, positions=64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_sizes.SIZES, "world-32", (family, longer))
        return build_model(recipe, sightloop.open_dataset(shard), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def batch(recipe: Recipe, shard: Path, trainee: TrainableModel) -> Batch:
    loader = BatchLoader(
        sightloop.open_dataset(shard),
        recipe.data,
        trainee.tokenizer,
        trainee.image_spec,
        0,
        {},
        attributes=trainee.attributes,
    )
    return next(iter(loader.batches(0, 1)))


def rows_of(batch: Batch) -> DialogueRows:
    assert batch.dialogue is not None
    return batch.dialogue


def test_rows_are_rounds_of_the_images(batch: Batch, shard: Path, trainee: TrainableModel) -> None:
    """Every row is a dialogue of its image up to one of its candidates, the first one the true answer."""
    rows, samples = rows_of(batch), list(sightloop.open_dataset(shard))
    assert trainee.attributes == NAMES
    assert (rows.answers, len(rows.ids), len(rows.context_ids)) == (4, 4 * 2 * 4, 8)
    captions = 0
    for image in range(4):
        sample = samples[int(batch.sample_indices[image])]
        assert isinstance(sample, Sample)
        (dialogue,) = sample.dialogues
        text = trainee.tokenizer.decode(
            [rows.caption_ids[image, : int(rows.caption_lengths[image])].tolist()]
        )[0]
        assert text in ("", dialogue.caption)
        captions += bool(text)
        for number in range(2):
            at = image * 2 + number
            context = trainee.tokenizer.decode(
                [rows.context_ids[at, : int(rows.context_lengths[at])].tolist()]
            )[0]
            asked = [
                one
                for index, one in enumerate(dialogue.rounds)
                if squeezed(context_text(dialogue, index, Reading(0, False))) == squeezed(context)
            ]
            assert len(asked) == 1, context
            for k in range(4):
                row = at * 4 + k
                whole = trainee.tokenizer.decode([rows.ids[row, : int(rows.lengths[row])].tolist()])[0]
                answer = squeezed(whole).removeprefix(squeezed(context)).strip()
                where = asked[0].candidates.index(answer)
                assert (where == asked[0].truth) == (k == 0)
                labels = [asked[0].attributes[name][where] for name in NAMES]
                assert rows.attributes[row].tolist() == labels
    assert 0 < captions < 4  # `dialogue_captions` is a half


def squeezed(text: str) -> str:
    return text.replace(" ?", "?").replace(" .", ".")


@pytest.mark.parametrize("chunk", [0, 3])
def test_losses_are_means_over_single_rows(
    chunk: int, batch: Batch, recipe: Recipe, trainee: TrainableModel
) -> None:
    """ITM, attributes and the decoder's answers, each row alone, without padding and groups."""
    network, rows = trainee.network.eval(), rows_of(batch)
    moved, pixels = on_device(batch, trainee.image_spec, torch.device("cpu"))
    context = LossContext(network, None, trainee.heads, recipe, moved, pixels, {}, 0.0, GradCache(chunk))
    LOSS_TERMS["dialogue"](context)
    LOSS_TERMS["reply"](context)
    itm, attributes, reply, words = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        tokens = network.encode_image(pixels).tokens
        for image in range(4):
            own = Encoded(tokens[image : image + 1])
            caption = rows.caption_ids[image, : int(rows.caption_lengths[image])]
            states = network.encoder(caption[None]).tokens
            memory = Encoded(torch.cat([own.tokens, states], 1))
            for number in range(2):
                at = image * 2 + number
                for k in range(4):
                    row = at * 4 + k
                    ids = rows.ids[row, : int(rows.lengths[row])][None]
                    state = network.encode_text(memory, ids, rows.lengths[row][None]).pooled
                    odds = network.match_head(state).log_softmax(1)[0]
                    itm -= float(odds[int(k == 0)])
                    p = network.attribute_head(state).sigmoid()[0]
                    labels = rows.attributes[row]
                    attributes -= float((labels * p.log() + (1 - labels) * (1 - p).log()).sum())
                ids = rows.context_ids[at, : int(rows.context_lengths[at])][None]
                read = network.encode_text(memory, ids, rows.context_lengths[at][None])
                answer = rows.reply_ids[at, : int(rows.reply_lengths[at])].clone()
                answer[0] = network.config.start_id
                logits = network.lm_logits(network.decoder_states(Encoded(read.tokens), answer[None]))[0]
                reply -= float(logits.log_softmax(1)[range(len(answer) - 1), answer[1:]].sum())
                words += len(answer) - 1
    assert float(context.values["dialogue"]) == pytest.approx(itm / 32, abs=1e-4)
    assert float(context.values["attributes"]) == pytest.approx(attributes / (32 * 4), abs=1e-4)
    assert float(context.values["reply"]) == pytest.approx(reply / words, abs=1e-4)
    assert context.chances["dialogue"] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_unknown_attributes_weigh_nothing() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0], [-2.0, 0.0]])
    labels = torch.tensor([[1.0, math.nan], [0.0, 1.0], [math.nan, math.nan]])
    known = [(2.0, 1), (0.5, 0), (3.0, 1)]
    by_hand = sum(math.log1p(math.exp(-x if y else x)) for x, y in known) / 3
    loss = attribute_loss(logits, labels, 3, 0.0)
    assert float(loss.value) == pytest.approx(by_hand)
    assert float(loss.facts["accuracy"]) == pytest.approx(2 / 3)
    # The first is 1 of half of its known labels, the second of all.
    assert attribute_chance(labels) == pytest.approx(2 / 3 * math.log(2))
    assert attribute_chance(torch.full((2, 2), math.nan)) == 0


def test_wrong_answers_are_never_the_true_text() -> None:
    """A candidate that occurs twice, and a round that nothing is known of."""
    one = Round("is it?", "yes", ("no", "yes", "yes", "maybe"), 1)
    rounds = (one, Round("why?", "because"), Round("and?", "no", ("no", "no"), 0))
    sample = Sample("a", b"", dialogues=(Dialogue(rounds),))
    random = np.random.default_rng(0)
    for _ in range(20):
        (drawn,) = draw_rounds(random, sample, 1, 3, captioned=1.0, names=("safe",))
        assert (drawn.number, drawn.answers[0]) == (0, "yes")
        assert sorted({*drawn.answers[1:]}) == ["maybe", "no"]
        assert all(math.isnan(row[0]) for row in drawn.attributes)
    assert not draw_rounds(random, Sample("b", b""), 1, 3, captioned=1.0, names=())


def test_attributes_need_the_dialogue_term() -> None:
    with pytest.raises(UsageError, match=r"terms\.attributes"):
        apply_settings(RECIPES["dialogue"], ["terms.dialogue=0"])


def test_a_trained_dialogue_model_is_saved_loaded_and_validated(shard: Path, tmp_path: Path) -> None:
    settings = [
        "steps=2",
        "data.batch=3",
        "schedule.warmup_steps=0",
        f"evaluation.data={shard}",
        "evaluation.samples=2",
    ]
    events = list(train("world_dialogue", str(shard), tmp_path / "run", settings=settings, device="cpu"))
    values = next(e.values for e in reversed(events) if type(e).__name__ == "Evaluated")
    assert {"dialogue R@1", "dialogue MRR", *(f"area ({name})" for name in NAMES)} <= values.keys()
    model = sightloop.load(tmp_path / "run" / "model", device="cpu")
    config = model.network.config
    assert (config.dialogue, config.attributes) == (True, NAMES)
    model.save(tmp_path / "again")
    again = sightloop.load(tmp_path / "again", device="cpu")
    (sample,) = synthetic_world("unseen", 1, seed=0, dialogues=True)
    first, second = (one.judge_answers(sample.image, sample.dialogues[0])[2] for one in (model, again))
    assert first.attributes.keys() == {*NAMES}
    assert np.array_equal(first.match, second.match)
    assert all(np.array_equal(first.attributes[name], second.attributes[name]) for name in NAMES)
    assert len({*first.match.tolist()}) > 50  # the head reads the answers
