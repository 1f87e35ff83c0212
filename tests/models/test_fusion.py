"""BLIP's other fusions: weights, what each can do, rows over images, padding, saving, one training step each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UnsupportedError, UsageError
from sightloop.models.blip import Blip, BlipConfig
from sightloop.models.fusion import EarlyFusion, FusionKind, LateFusion, MutualFusion
from sightloop.nn.init import initialize
from sightloop.protocols import DecoderNetwork, Embedder, Matcher
from sightloop.training.config import apply_settings
from sightloop.training.model_sizes import SIZES, fit_to_tokenizer, with_fusion
from sightloop.training.recipes import find_recipe
from sightloop.training.trainer import train
from sightloop.types import Encoded

KINDS: tuple[FusionKind, ...] = ("late", "both", "early")
IDS = {"[PAD]": 0, "[SEP]": 3, "[DEC]": 58, "[ENC]": 59}


def base(size: str = "world-32") -> BlipConfig:
    config = fit_to_tokenizer(SIZES[size][1], 60, IDS.__getitem__)
    assert isinstance(config, BlipConfig)
    return config


def build(kind: FusionKind) -> Blip:
    network = Blip(with_fusion(base(), kind))
    initialize(network, 1)
    return network.double().eval()


def texts(rows: int, length: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(4, 58, (rows, length), generator=generator)
    return ids, torch.randint(3, length + 1, (rows,), generator=generator)


def images(network: Blip, count: int) -> Encoded:
    generator = torch.Generator().manual_seed(count)
    return network.encode_image(torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["world-32", "world", "blip-nano", "blip-base"])
def test_as_many_weights_as_blip(size: str, kind: FusionKind) -> None:
    config = SIZES[size][1]
    assert isinstance(config, BlipConfig)
    with torch.device("meta"):
        ours, theirs = (
            sum(p.numel() for p in network.parameters())
            for network in (Blip(with_fusion(config, kind)), Blip(config))
        )
    assert abs(ours - theirs) < 0.01 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_what_each_can_do(kind: FusionKind) -> None:
    network = build(kind)
    assert {"embed", "similarity", "classify", "match", "rank", "answer"} <= network.capabilities
    assert ("caption" in network.capabilities) == (kind != "early") == ("lm" in network.objectives)
    assert ("mlm" in network.objectives) == (kind != "late")
    assert {"itc", "itm", "vqa", "classes"} <= network.objectives
    for protocol in (Embedder, Matcher, DecoderNetwork):
        assert isinstance(network, protocol)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_image_are_independent_and_padding_is_not_read(kind: FusionKind) -> None:
    network, (ids, lengths) = build(kind), texts(6)
    image = images(network, 3)
    together = network.match_logits(image, ids, lengths)
    states = network.encode_text(image, ids, lengths)
    for row in range(6):
        own = Encoded(image.tokens[row // 2 : row // 2 + 1])
        alone = ids[row : row + 1, : lengths[row]], lengths[row : row + 1]
        torch.testing.assert_close(network.match_logits(own, *alone)[0], together[row])
        torch.testing.assert_close(network.embed_text(*alone)[0], network.embed_text(ids, lengths)[row])
        words = network.encode_text(own, *alone).tokens[0]
        torch.testing.assert_close(words, states.tokens[row, : len(words)])
    assert (states.mask is None) == (kind == "late")
    norms = torch.cat([network.embed_text(ids, lengths), network.embed_image(image)]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_reads_image_and_text(kind: FusionKind) -> None:
    network, (ids, lengths) = build(kind), texts(2)
    lengths = torch.full_like(lengths, ids.shape[1])
    image = images(network, 2)
    logits = network.match_logits(image, ids, lengths)
    assert not torch.allclose(logits, network.match_logits(Encoded(image.tokens.flip(0)), ids, lengths))
    assert not torch.allclose(logits, network.match_logits(image, ids.flip(1), lengths))


def test_late_needs_the_vectors_of_an_index_alone() -> None:
    network, (ids, lengths) = build("late"), texts(4)
    image = images(network, 2)
    u, v = network.embed_image(image).repeat_interleave(2, 0) * 8, network.embed_text(ids, lengths) * 8
    late = network.fusion
    assert isinstance(late, LateFusion)
    wanted = network.match_head(
        late.fc2(nn.functional.gelu(late.fc1(torch.cat([u, v, u * v, (u - v).abs()], 1))))
    )
    torch.testing.assert_close(network.match_logits(image, ids, lengths), wanted)
    network.calibrate_match(0.5, 2.0)
    u, v = network.embed_image(image), network.embed_text(ids, lengths)
    wanted[:, 1] += 2 * (u.repeat_interleave(2, 0) * v).sum(1) - 0.5
    torch.testing.assert_close(network.match_embeddings(u, v), wanted)
    torch.testing.assert_close(network.match_logits(image, ids, lengths), wanted)


def test_both_streams_read_the_layer_before() -> None:
    """One co-attention layer, by hand: each stream attends to what the other was before it."""
    network, (ids, lengths) = build("both"), texts(2)
    fusion, image = network.fusion, images(network, 2)
    assert isinstance(fusion, MutualFusion)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    x, y = network.encoder(ids, lengths=lengths).tokens, fusion.image_in(image.tokens)
    (reader,), (viewer,) = fusion.text_layers, fusion.image_layers
    valid = mask[:, None, None]
    words = reader(x, mask=valid, memory=reader.cross.memory(y))
    patches = viewer(y, memory=viewer.cross.memory(x), memory_mask=valid)
    made = fusion(network.encoder, image.tokens, ids, mask)
    torch.testing.assert_close(made.tokens, words)
    pooled = torch.tanh(fusion.pool(torch.cat([words[:, 0], patches[:, 0]], 1)))
    torch.testing.assert_close(made.pooled, pooled)


def test_early_tells_patches_from_words() -> None:
    network, (ids, lengths) = build("early"), texts(2)
    image = images(network, 2)
    before, fusion = network.match_logits(image, ids, lengths), network.fusion
    assert isinstance(fusion, EarlyFusion)
    with torch.no_grad():
        fusion.types.copy_(fusion.types.flip(0))
    assert not torch.allclose(before, network.match_logits(image, ids, lengths))
    assert not network.embeds_first_token


WRONG: list[Callable[[BlipConfig], Any]] = [
    lambda c: replace(c, encoder=False),
    lambda c: replace(c, text=replace(c.text, memory_dim=64)),
    lambda c: replace(c, fusion_layers=0),
    lambda c: replace(c, fusion="late"),
    lambda c: replace(c, fusion="cross"),
    lambda c: replace(c, fusion="early", fusion_layers=0),
]


@pytest.mark.parametrize("make", WRONG)
def test_sizes_that_do_not_fit(make: Callable[[BlipConfig], Any]) -> None:
    with pytest.raises(ValueError, match=r"fusion|early|answers"):
        make(with_fusion(base(), "both"))


SMALL = (
    "model.size=world-32",
    "model.vocab_size=200",
    "data.batch=6",
    "data.augment=null",
    "data.questions=1",
    "teacher.momentum=0",
    "schedule.warmup_steps=1",
    "steps=2",
)


@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_and_used(kind: FusionKind, tmp_path: Path) -> None:
    scenes = list(synthetic_world("train", 12, seed=0, size=32))
    write_synthetic_world(tmp_path / "train.tar", scenes)
    terms = {"late": (), "both": ("terms.mlm=1",), "early": ("terms.lm=0",)}[kind]
    settings = (*SMALL, f"model.fusion={kind}", *terms)
    for _ in train("world", str(tmp_path / "train.tar"), tmp_path / "run", settings=settings, device="cpu"):
        pass
    model = sightloop.load(tmp_path / "run" / "model", device="cpu")
    assert (model.family, model.network.config.fusion) == ("blip", kind)
    image, told = scenes[0].image, [scene.captions[0] for scene in scenes[:5]]
    matched, ranked = model.match(image, told), model.rank(image, told, k=3)
    with torch.inference_mode():
        tokens = model.tokenize(told)
        encoded = model.encode(list(model.read([image], isolate=False)))  # pyright: ignore[reportArgumentType]
        logits = model.network.match_logits(encoded, tokens.ids, tokens.device_lengths)
    np.testing.assert_allclose(matched, logits.softmax(1)[:, 1].numpy(), atol=1e-5)
    assert matched.shape == (5,)
    assert (ranked > -100).sum() == 3
    question = scenes[0].questions[0].question
    (answer,) = model.answer(image, question, candidates=["red", "two"])
    assert answer in ("red", "two")
    assert isinstance(model.answer(image, question)[0], str)
    model.save(tmp_path / "again")
    again = sightloop.load(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.match(image, told), matched)
    np.testing.assert_array_equal(again.rank(image, told, k=3), ranked)
    with pytest.raises(UnsupportedError, match=f"fusion {kind}"):
        model.save(tmp_path / "other", layout="transformers")
    if kind == "early":
        with pytest.raises(UnsupportedError, match="caption"):
            model.caption(image)
    else:
        assert isinstance(model.caption(image)[0], str)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_have_the_gradient_of_the_batch(kind: FusionKind, tmp_path: Path) -> None:
    write_synthetic_world(tmp_path / "train.tar", list(synthetic_world("train", 8, seed=0, size=32)))
    losses: list[list[float]] = []
    for micro_batch in (0, 3):
        settings = (*SMALL, f"model.fusion={kind}", "terms.lm=0", f"data.micro_batch={micro_batch}")
        events = train("world", str(tmp_path / "train.tar"), tmp_path / str(micro_batch), settings=settings)
        steps = [event for event in events if type(event).__name__ == "StepDone"]
        losses.append([step.values["gradient_norm"] for step in steps] + [step.loss for step in steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.fusion=both: a checkpoint has its own"):
        apply_settings(find_recipe("captioner"), ["model.fusion=both"])
    write_synthetic_world(tmp_path / "train.tar", list(synthetic_world("train", 8, seed=0)))
    data, early = str(tmp_path / "train.tar"), ["model.fusion=early", "data.batch=4", "steps=1"]
    with pytest.raises(UsageError, match="world-clip is no BLIP"):
        list(train("clip_pretrain", data, tmp_path / "a", settings=[*early, "model.size=world-clip"]))
    with pytest.raises(UsageError, match=r"terms\.lm: world lacks a part"):
        list(train("world", data, tmp_path / "b", settings=[*early, "schedule.warmup_steps=0"]))
