"""Labels as texts: class folders and captions in one batch, exactly UniCL's loss, and a run in two stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.errors import UsageError
from sightloop.training.build import build_model
from sightloop.training.config import apply_settings
from sightloop.training.dataloader import BatchLoader, on_device
from sightloop.training.grad_cache import GradCache
from sightloop.training.label_texts import LabelTexts, text_id
from sightloop.training.loss_context import LossContext
from sightloop.training.loss_terms import LOSS_TERMS
from sightloop.training.recipes import find_recipe
from sightloop.training.requirements import check_data
from sightloop.training.trainer import train
from sightloop.types import Sample
from tests.objectives.unicl import reference

TEMPLATES = find_recipe("unicl_pretrain").data.label_texts
SMALL = (
    "model.size=world-clip",
    "model.image_size=32",
    "model.vocab_size=300",
    "data.batch=10",
    "data.augment=null",
    "schedule.warmup_steps=1",
    "steps=2",
)
NAMES = st.text("abcdefg hij", min_size=1, max_size=12).map(str.strip).filter(bool)


def labeled(label: str, *captions: str) -> Sample:
    return Sample("key", b"", captions, label=label)


@given(NAMES, st.sampled_from(TEMPLATES))
def test_every_template_of_a_label_means_the_label(name: str, template: str) -> None:
    source = LabelTexts(TEMPLATES)
    texts = source.texts(labeled(name))
    assert len(set(texts)) == len(TEMPLATES)
    assert {*source.ids(labeled(name), texts), *source.all_ids(labeled(name))} == {text_id(name)}
    spelled = Sample("other", b"", (template.replace("{}", name),))
    assert source.ids(spelled, spelled.captions) == [text_id(name)] == source.all_ids(spelled)


@given(NAMES, NAMES)
def test_captions_come_before_the_label(name: str, caption: str) -> None:
    sample, source = labeled(name, caption, " "), LabelTexts(TEMPLATES)
    assert source.texts(sample) == [caption]
    assert source.ids(sample, [caption]) == [text_id(caption)]
    # Texts that are made of the label are true of it, too.
    assert set(source.all_ids(sample)) == {text_id(caption), text_id(name)}


def test_without_templates_a_label_is_no_text() -> None:
    assert LabelTexts().texts(labeled("dog")) == LabelTexts().all_ids(labeled("dog")) == []
    assert LabelTexts().texts(labeled("dog", "a dog")) == ["a dog"]
    assert LabelTexts(("a {}.",)).texts(Sample("key", b"")) == []


def mixed(folder: Path, classes: Sequence[str] = ("circle", "star", "ring")) -> list[str]:
    """A class folder of six images and shards of four with captions, of which one spells a label."""
    scenes = list(synthetic_world("train", 10, seed=0, size=32))
    for number, scene in enumerate(scenes[:6]):
        path = folder / "classes" / classes[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert isinstance(scene.image, bytes)
        path.write_bytes(scene.image)
    told = [scenes[6], *(replace(s, captions=(f"scene {s.key}",)) for s in scenes[7:])]
    told[0] = replace(told[0], captions=(f"A photo of a {classes[0]}.",))
    write_synthetic_world(folder / "captions.tar", told)
    return [str(folder / "classes"), str(folder / "captions.tar")]


def matching(samples: Sequence[Sample]) -> Tensor:
    """bool `[B, B]` by the definition: equal label or equal text, the spelled label counting as its text."""
    meanings = [s.label or ("circle" if "circle." in s.captions[0] else s.captions[0]) for s in samples]
    return torch.tensor([[one == other for other in meanings] for one in meanings])


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_mixed_batch_has_the_loss_and_gradient_of_the_reference(micro_batch: int, tmp_path: Path) -> None:
    recipe = apply_settings(find_recipe("unicl_pretrain"), SMALL)
    dataset = sightloop.open_dataset(mixed(tmp_path))
    model = build_model(recipe, dataset, tmp_path / "run")
    loader = BatchLoader(dataset, recipe.data, model.tokenizer, model.image_spec, 0, {})
    (batch,) = loader.batches(0, 1)
    moved, pixels = on_device(batch, model.image_spec, torch.device("cpu"))
    network, pixels = model.network.double(), pixels.double()
    context = LossContext(network, None, model.heads, recipe, moved, pixels, {}, 0.0, GradCache(micro_batch))
    LOSS_TERMS["clip"](context)
    context.cache.finish()
    got = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    texts = batch.captions
    assert texts is not None
    assert len({tuple(row) for row in texts.ids.tolist()}) > 7  # equal labels have different texts
    image, text = (
        network.embed_image(network.encode_image(pixels)),
        network.embed_text(texts.ids, texts.lengths),
    )
    known = matching([dataset[int(index)] for index in batch.sample_indices])
    assert known.sum() == 3 * 3 + 2 * 2 + 2 * 2 + 3  # three circles with the caption, stars, rings, captions
    loss = reference(image, text, network.logit_scale.exp(), known)
    loss.backward()
    assert float(context.values["clip"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-7, atol=1e-10)


def test_two_stages(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    for _ in train("unicl_pretrain", data, tmp_path / "one", settings=SMALL, device="cpu"):
        pass
    second = (
        *SMALL[3:],
        f"model.init_from={tmp_path / 'one' / 'model'}",
        'data.label_texts=["{}"]',
    )
    for _ in train("unicl_pretrain", data, tmp_path / "two", settings=second, device="cpu"):
        pass
    model = sightloop.load(tmp_path / "two" / "model", device="cpu")
    image = sightloop.open_dataset(data)[0].image
    assert model.classify(image, ["circle", "star", "ring"]).shape == (1, 3)


def test_labels_count_as_texts_before_a_run(tmp_path: Path) -> None:
    folder, _ = mixed(tmp_path)
    dataset = sightloop.open_dataset(folder)
    recipe = apply_settings(find_recipe("unicl_pretrain"), SMALL)
    assert check_data(recipe, dataset, folder) == []
    with pytest.raises(UsageError, match="captions"):
        check_data(apply_settings(recipe, ["data.label_texts=[]"]), dataset, folder)
    with pytest.raises(UsageError, match=r"one \{\}"):
        apply_settings(recipe, ['data.label_texts=["a photo"]'])
