"""PaliGemma through `load`: ids, pixels and texts as the reference's processor and model make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

import sightloop
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.images.preprocess import normalize
from sightloop.inference.regions import regions_of
from sightloop.tasks.generate import Generation
from sightloop.training.build import build_model
from sightloop.training.config import DataSettings, ModelSettings, Recipe
from sightloop.training.dataloader import BatchLoader, PromptFormat, on_device
from sightloop.training.events import StepDone
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_context import LossContext
from sightloop.training.loss_terms import LOSS_TERMS
from sightloop.training.trainer import train
from tests.inference.test_masks import stored, weights
from tests.tiny_checkpoints.paligemma import END, PATCH, SIDE, write_paligemma

# The reference's processor, under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
Loaded = tuple[Any, Any, sightloop.Model, Path]
QUESTIONS = ["what is the dog?", "is it  red", "how many\u00fc small <loc0012> tree"]


@pytest.fixture(params=["saved by 5.x, gemma", "as at the hub, gemma 2"], scope="module")
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("paligemma")
    hub = "hub" in request.param
    model, processor = write_paligemma(folder, places=hub, second=hub)
    return model, processor, sightloop.load(folder), folder


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    shapes = [(20, 50, 3), (31, 30, 3), (90, 17, 3)]
    return [Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


def given(processor: Any, pictures: list[Image.Image], texts: list[str]) -> dict[str, torch.Tensor]:
    prompts = ["<image>" + text for text in texts]
    made = processor(images=[[p] for p in pictures], text=prompts, return_tensors="pt", padding="longest")
    return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids", "pixel_values")}


def test_ids_and_pixels(loaded: Loaded, pictures: list[Image.Image]) -> None:
    _, processor, model, _ = loaded
    wanted = given(processor, pictures, [f"answer en {q}" for q in QUESTIONS])
    prompts = [model.network.prompts["answer"].replace("{}", question) for question in QUESTIONS]
    ids = model.tokenizer.encode(prompts)
    each, image_id = (SIDE // PATCH) ** 2, model.network.config.image_id
    for row, length, theirs, real in zip(
        ids.ids, ids.lengths, wanted["input_ids"], wanted["attention_mask"], strict=True
    ):
        mine = [i for one in row[:length].tolist() for i in [one] * (each if one == image_id else 1)]
        assert mine == theirs[real.bool()].tolist()
        assert model.tokenizer.decode([mine]) == processor.batch_decode([mine], skip_special_tokens=True)
    read = [p for p in model.read(pictures) if not isinstance(p, sightloop.ImageError)]
    pixels = normalize(read, model.image_spec, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(pixels, wanted["pixel_values"])


@pytest.mark.parametrize("beams", [1, 3])
def test_texts(loaded: Loaded, pictures: list[Image.Image], beams: int) -> None:
    theirs, processor, model, _ = loaded
    options = {"num_beams": beams, "max_new_tokens": 7}

    def written(pictures: list[Image.Image], texts: list[str]) -> list[str]:
        inputs = given(processor, pictures, texts)
        with torch.inference_mode():
            ids = theirs.generate(**inputs, **options, do_sample=False, eos_token_id=END)
        rows = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(rows, skip_special_tokens=True)]

    asked = model.answer(pictures, QUESTIONS, num_beams=beams, max_new_tokens=7)
    assert asked == written(pictures, [f"answer en {q}" for q in QUESTIONS])
    alone = model.answer(pictures[0], QUESTIONS[1], num_beams=beams, max_new_tokens=7)
    assert alone == written(pictures[:1], [f"answer en {QUESTIONS[1]}"])
    assert any(asked)
    captions = model.caption(pictures, num_beams=beams, max_new_tokens=7)
    assert captions == written(pictures, ["caption en"] * 3)
    free = model.caption(pictures, prompt="describe it", num_beams=beams, max_new_tokens=7)
    assert free == written(pictures, ["describe it"] * 3)


@pytest.mark.parametrize("layout", ["sightloop", "transformers"])
def test_save_round_trips(loaded: Loaded, pictures: list[Image.Image], layout: Any, tmp_path: Path) -> None:
    _, processor, model, _ = loaded
    model.save(tmp_path / "again", layout=layout)
    again = sightloop.load(tmp_path / "again")
    assert again.network.config == model.network.config
    again.save(tmp_path / "third", layout=layout)
    first, second = (tmp_path / name / "model.safetensors" for name in ("again", "third"))
    assert first.read_bytes() == second.read_bytes()
    assert again.answer(pictures, QUESTIONS, max_new_tokens=5) == model.answer(
        pictures, QUESTIONS, max_new_tokens=5
    )
    if layout == "transformers":
        theirs = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
        theirs_too = AutoProcessor.from_pretrained(tmp_path / "again")
        old, new = (given(p, pictures, ["caption en"] * 3) for p in (processor, theirs_too))
        assert all(torch.equal(old[name], new[name]) for name in old)
        with torch.inference_mode():
            assert torch.allclose(theirs(**new).logits, loaded[0](**old).logits, atol=1e-5)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 24, seed=0))
    return path


def test_the_loss_is_the_references(loaded: Loaded, shard: Path) -> None:
    """Of captions and answers behind their prompts: value and gradients, whatever the chunk."""
    theirs, _, _, folder = loaded
    settings = DataSettings(batch=6, max_tokens=12, augment=None)
    recipe = Recipe(
        "test",
        {"prompted": 1.0},
        model=ModelSettings(init_from=str(folder)),
        data=settings,
        label_smoothing=0,
    )
    dataset = sightloop.open_dataset(shard)
    trainee = build_model(recipe, dataset, folder)
    feed = BatchLoader(
        dataset, settings, trainee.tokenizer, trainee.image_spec, 0, {}, prompts=trainee.prompts
    )
    (batch,) = feed.batches(0, 1)
    rows = batch.prompted
    assert rows is not None
    assert rows.prompt_lengths is not None
    network = trainee.network.train()
    found: list[torch.Tensor] = []
    for chunk in (0, 4):
        network.zero_grad()
        features = GradCache(chunk)
        moved, pixels = on_device(batch, trainee.image_spec, torch.device("cpu"))
        context = LossContext(network, None, trainee.heads, recipe, moved, pixels, {}, 0.0, features)
        LOSS_TERMS["prompted"](context)
        features.finish()
        found += [context.values["prompted"], network.projector.weight.grad.clone()]
    each, image_id = (SIDE // PATCH) ** 2, network.config.image_id
    theirs.zero_grad()
    whole, count = torch.zeros(()), int((rows.lengths - rows.prompt_lengths).sum())
    for ids, length, prompt, owner in zip(
        rows.ids, rows.lengths, rows.prompt_lengths, rows.image_rows, strict=True
    ):
        row = [i for one in ids[:length].tolist() for i in [one] * (each if one == image_id else 1)]
        text = torch.tensor([row])
        suffix = (torch.arange(len(row)) >= int(prompt) + each - 1).long()[None]
        labels = text.masked_fill(suffix == 0, -100)
        assert text[0, -1] == END
        given = {"attention_mask": torch.ones_like(text), "token_type_ids": suffix, "labels": labels}
        made = theirs(input_ids=text, pixel_values=pixels[owner][None], **given)
        whole = whole + made.loss * int(suffix.sum()) / count
    whole.backward()
    wanted = theirs.model.multi_modal_projector.linear.weight.grad
    assert torch.allclose(found[0], whole.detach(), atol=1e-4)
    assert torch.allclose(found[2], found[0], atol=1e-5)
    for mine in (found[1], found[3]):
        assert (mine - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_prompts_and_texts_are_those_of_the_processor(loaded: Loaded, shard: Path) -> None:
    _, processor, model, _ = loaded
    dataset = sightloop.open_dataset(shard)
    forms = PromptFormat(model.network.prompts, END)
    settings = DataSettings(batch=5, augment=None, prompt="")
    (batch,) = BatchLoader(
        dataset, settings, model.tokenizer, model.image_spec, 0, {}, prompts=forms
    ).batches(0, 1)
    rows = batch.prompted
    assert rows is not None
    picture = Image.new("RGB", (9, 9))
    each, image_id = (SIDE // PATCH) ** 2, model.network.config.image_id
    for i, (ids, length) in enumerate(zip(rows.ids, rows.lengths, strict=True)):
        row = [i for one in ids[:length].tolist() for i in [one] * (each if one == image_id else 1)]
        sample = dataset[int(batch.sample_indices[int(rows.image_rows[i])])]
        pairs = [("caption en", text) for text in sample.captions]
        pairs += [(f"answer en {q.question}", a) for q in sample.questions for a in q.answers]
        wanted = [processor(images=picture, text=f"<image>{p}", suffix=a)["input_ids"][0] for p, a in pairs]
        assert row in wanted


def test_it_learns_and_frozen_parts_stay(loaded: Loaded, shard: Path, tmp_path: Path) -> None:
    before = load_file(loaded[3] / "model.safetensors")
    settings = [
        f"model.init_from={loaded[3]}",
        "model.frozen=vision.*",
        "steps=12",
        "data.batch=8",
        "optimizer.lr=1e-2",
    ]
    events = list(train("paligemma_transfer", str(shard), tmp_path / "run", settings=settings, device="cpu"))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert losses[-1] < 0.8 * losses[0]
    model = sightloop.load(tmp_path / "run" / "model")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert torch.equal(after["vision.norm_out.weight"], before["vision_tower.post_layernorm.weight"])
    assert not torch.equal(after["projector.weight"], before["multi_modal_projector.linear.weight"])
    assert isinstance(model.caption(Image.new("RGB", (9, 9)), max_new_tokens=3)[0], str)
    wider = [*settings[:1], "model.image_size=16", "steps=2", "data.batch=4"]
    events = list(train("paligemma_resolution", str(shard), tmp_path / "wide", settings=wider, device="cpu"))
    grown = sightloop.load(tmp_path / "wide" / "model")
    assert grown.network.config.vision.image_size == 16
    assert grown.network.encode_image(torch.zeros(1, 3, 16, 16)).tokens.shape[1] == 16


def test_regions_of_what_is_written(loaded: Loaded) -> None:
    """Boxes in pixels of an image that is not square, labels, and the probability of the tokens that say them."""
    tokenizer = loaded[2].tokenizer
    text = "<loc0256><loc0000><loc0512><loc1023> the dog ; <loc0001><loc0002><loc0003> "
    text += "<loc0000><loc0000><loc0512><loc0512>"
    ids = tokenizer.encode([text]).ids[0].tolist()
    log_p = [-0.5] * ids.index(tokenizer.token_id("<loc0001>")) + [-2.0] * len(ids)
    first, second = regions_of(tokenizer, "located", Generation(ids, log_p[: len(ids)]), (100, 400), "cat")
    assert (first.label, first.box) == ("the dog", (0.0, 25.0, 1023 / 1024 * 400, 50.0))
    assert (second.label, second.box) == ("cat", (0.0, 0.0, 200.0, 50.0))
    assert first.score == pytest.approx(np.exp(-0.5))
    assert second.score == pytest.approx(np.exp(-2.0))


def test_verbs_that_find(loaded: Loaded, pictures: list[Image.Image], tmp_path: Path) -> None:
    model, folder = loaded[2], loaded[3]
    assert model.capabilities == {"caption", "answer", "detect", "locate", "segment"}
    found = model.detect(pictures, ["the dog", "a cat"], max_new_tokens=9)
    assert len(found) == 3
    one = model.detect(pictures[1], ["the dog", "a cat"], max_new_tokens=9)
    assert one == found[1:2]
    assert len(model.locate(pictures[0], ["the dog", "a cat"], max_new_tokens=5)) == 2
    with pytest.raises(sightloop.UnsupportedError, match="it finds: find, locate, segment"):
        model.detect(pictures)
    with pytest.raises(sightloop.UnsupportedError, match=r"vae-oid\.npz"):
        model.segment(pictures[0], "the dog")
    stored(tmp_path, weights())
    seeing = sightloop.load(folder, masks=tmp_path / "vae-oid.npz")
    assert len(seeing.segment(pictures, "the dog", max_new_tokens=5)) == 3
    seeing.save(tmp_path / "with")
    again = sightloop.load(tmp_path / "with")
    assert again.masks is not None
    segments = "".join(f"<seg{i:03d}>" for i in range(16))
    ids = again.tokenizer.encode([f"<loc0000><loc0000><loc0512><loc1023>{segments} dog"]).ids[0].tolist()
    regions = [
        regions_of(m.tokenizer, "segments", Generation(ids, [0.0] * len(ids)), (40, 60), "", m.masks)
        for m in (seeing, again)
    ]
    mask = regions[0][0].mask
    assert mask is not None
    assert mask.shape == (40, 60)
    assert np.array_equal(mask, regions[1][0].mask)
    assert not mask[20:].any()
