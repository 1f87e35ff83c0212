"""Florence-2 against the reference: same pixels, same ids, same states, same words, from both layouts of its files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Florence2ForConditionalGeneration

import sightloop
from sightloop.data.images.preprocess import normalize
from sightloop.errors import CheckpointError, UsageError
from sightloop.inference.regions import regions_of
from sightloop.nn.prepack import unpack
from sightloop.tasks.generate import Generation
from sightloop.types import Region
from tests.checkpoints.test_against_reference import pictures
from tests.tiny_checkpoints.florence import write_florence, write_original

SHAPES: list[dict[str, Any]] = [
    {},
    {
        "side": 96,
        "vision": {"window_size": 5, "depths": [2, 1, 1, 2], "patch_prenorm": [True, False, True, False]},
    },
    {
        "side": 70,
        "vision": {"embed_dim": [6, 9, 10, 22], "num_heads": [1, 3, 2, 11], "num_groups": [3, 3, 5, 2]},
    },
    {"text": {"d_model": 30, "scale_embedding": True, "activation_function": "relu", "encoder_layers": 1}},
]
TASKS = ["<CAPTION>", "<OD>", "<OCR_WITH_REGION>", "<MORE_DETAILED_CAPTION>"]
TASKS += ["<CAPTION_TO_PHRASE_GROUNDING>two young dogs é on a street with <loc_3>, </s> and cats"]
TASKS += ["<REGION_TO_DESCRIPTION><loc_1><loc_20><loc_300><loc_999>"]


def inputs(reference: Any, images: list[Image.Image], tasks: list[str]) -> Any:
    return reference.reference_processor(text=tasks, images=images, padding=True, return_tensors="pt")


def ask(model: Any, task: str) -> str:
    name, _, text = task.partition(">")
    form = model.network.prompts[f"{name}>"]
    return form.replace("{}", text)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@torch.inference_mode()
def test_the_same_numbers(tmp_path: Path, shape: int) -> None:
    reference = write_florence(tmp_path / "hub", seed=shape, **SHAPES[shape])
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    images = pictures(len(TASKS), seed=shape)
    wanted = inputs(reference, images, TASKS)
    read = list(model.read(images, isolate=False))
    assert torch.equal(normalize(read, model.image_spec), wanted["pixel_values"])
    assert (
        model.encode(read).tokens - reference.get_image_features(wanted["pixel_values"]).pooler_output
    ).abs().max() < 1e-5
    # In float64, as weights drawn this large make much of any rounding.
    unpack(model.network)
    model.network.double()
    reference.double()
    model.dtype, wanted["pixel_values"] = torch.float64, wanted["pixel_values"].double()
    given, asked = model.generator.build_prefix(
        [[image] for image in model.encoder.encode_each(read)], [ask(model, task) for task in TASKS]
    )
    assert asked.shape == wanted["input_ids"].shape
    states = reference.model.get_encoder()(
        inputs_embeds=_embedded(reference, wanted), attention_mask=wanted["attention_mask"]
    ).last_hidden_state
    for row, real in enumerate(wanted["attention_mask"].bool()):
        assert given.mask is not None
        assert given.mask[row].sum() == real.sum()
        assert (given.tokens[row][given.mask[row]] - states[row][real]).abs().max() < 1e-9
    ids = torch.randint(3, 500, (len(TASKS), 7))
    logits = reference(**wanted, decoder_input_ids=ids).logits
    ours = model.network.language
    assert (ours.all_logits(ids, ours.start(given, 7)) - logits).abs().max() < 1e-9


def _embedded(reference: Any, wanted: Any) -> torch.Tensor:
    words = reference.get_input_embeddings()(wanted["input_ids"])
    image = reference.get_image_features(wanted["pixel_values"]).pooler_output
    places = (wanted["input_ids"] == reference.config.image_token_id)[..., None]
    return words.masked_scatter(places, image.to(words.dtype))


RULES: list[dict[str, Any]] = [
    {},
    {"forced_bos_token_id": 0, "no_repeat_ngram_size": 2, "early_stopping": True, "num_beams": 3},
]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_words(tmp_path: Path, beams: int, rules: dict[str, Any]) -> None:
    reference = write_florence(tmp_path / "hub", seed=beams, generation=rules)
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    images = pictures(len(TASKS), seed=9)
    given = inputs(reference, images, TASKS)
    for count in (1, 4, 12):
        with torch.inference_mode():
            wanted = reference.generate(**given, max_new_tokens=count, num_beams=beams, do_sample=False)
        options = model.options({"max_new_tokens": count, "num_beams": beams})
        read = list(model.read(images, isolate=False))
        asked = [ask(model, task) for task in TASKS]
        seen = model.encoder.encode_each(read)
        rows, start = model.generator.generate([[image] for image in seen], asked, options, [0] * len(TASKS))
        assert [row.ids[start:] for row in rows] == [_text(row[1:]) for row in wanted.tolist()]
        for row, picture, prompt in zip(rows, seen, asked, strict=True):
            alone, _ = model.generator.generate([[picture]], [prompt], options, [0])
            assert alone[0].ids == row.ids


def _text(row: list[int]) -> list[int]:
    return row[: row.index(2)] if 2 in row else row


def test_the_original_layout(tmp_path: Path) -> None:
    """Its own names, a bare BART tokenizer, no token for pictures: the same model, and both save to both layouts."""
    reference = write_florence(tmp_path / "hub", seed=3)
    write_original(tmp_path / "hub", tmp_path / "original")
    hub: Any = sightloop.load(tmp_path / "hub", device="cpu")
    original: Any = sightloop.load(tmp_path / "original", device="cpu")
    images = pictures(3)
    wanted = [hub.caption(images, max_new_tokens=12, num_beams=beams) for beams in (1, 3)]
    original.save(tmp_path / "own")
    original.save(tmp_path / "back", layout="transformers")
    hub.save(tmp_path / "again", layout="transformers")
    for folder in ("original", "own", "back", "again"):
        model = sightloop.load(tmp_path / folder, device="cpu")
        assert [model.caption(images, max_new_tokens=12, num_beams=beams) for beams in (1, 3)] == wanted, (
            folder
        )
    for folder in ("back", "again"):
        theirs = Florence2ForConditionalGeneration.from_pretrained(tmp_path / folder)
        processor = AutoProcessor.from_pretrained(tmp_path / folder)
        given = processor(text=TASKS[:3], images=images, padding=True, return_tensors="pt")
        usual = inputs(reference, images, TASKS[:3])
        assert torch.equal(given["input_ids"], usual["input_ids"])
        assert torch.equal(given["pixel_values"], usual["pixel_values"])
        ids = torch.randint(3, 500, (3, 5))
        with torch.inference_mode():
            logits = theirs(**given, decoder_input_ids=ids).logits
            words = min(logits.shape[-1], reference.config.text_config.vocab_size - 1)
            expected = reference(**usual, decoder_input_ids=ids).logits
        assert torch.equal(logits[..., :words], expected[..., :words])


VERBS: list[tuple[str, str, Callable[[Any, Any], Any]]] = [
    ("<OD>", "", lambda model, images: model.detect(images, max_new_tokens=ROOM, num_beams=1)),
    (
        "<DENSE_REGION_CAPTION>",
        "",
        lambda model, images: model.detect(images, describe=True, max_new_tokens=ROOM, num_beams=3),
    ),
    (
        "<CAPTION_TO_PHRASE_GROUNDING>",
        "a dog and two cats",
        lambda model, images: model.locate(images, "a dog and two cats", max_new_tokens=ROOM, num_beams=1),
    ),
    (
        "<REFERRING_EXPRESSION_SEGMENTATION>",
        "a dog",
        lambda model, images: model.segment(images, "a dog", max_new_tokens=ROOM, num_beams=1),
    ),
    (
        "<OCR_WITH_REGION>",
        "",
        lambda model, images: model.read_text(images, max_new_tokens=ROOM, num_beams=1),
    ),
]
ROOM = 150


@pytest.mark.parametrize(("task", "text", "verb"), VERBS)
def test_the_same_regions(
    tmp_path: Path, task: str, text: str, verb: Callable[[Any, Any], list[list[Region]]]
) -> None:
    """A random model that writes mostly places; what it writes is read as the reference reads it, in real pixels."""
    reference = write_florence(tmp_path / "hub", seed=len(task), text={"max_position_embeddings": ROOM + 60})
    with torch.no_grad():  # places and letters are likelier than tags
        table = reference.model.language_model.shared.weight
        table[-1020:-20] *= 1.5
    reference.save_pretrained(tmp_path / "hub")
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    images = pictures(5, seed=len(task))
    given = inputs(reference, images, [task + text] * 5)
    beams = 3 if "DENSE" in task else 1
    with torch.inference_mode():
        written = reference.generate(**given, max_new_tokens=ROOM, num_beams=beams, do_sample=False)
    found = verb(model, images)
    some = 0
    for image, row, regions in zip(images, written.tolist(), found, strict=True):
        spelled = reference.reference_processor.decode(_text(row[1:]), skip_special_tokens=False)
        parsed = reference.reference_processor.post_process_generation(
            spelled, task=task, image_size=image.size
        )
        expected = parsed[task]
        labels = [label or text for label in expected["labels"]]
        assert [region.label for region in regions] == labels
        if "bboxes" in expected:
            assert [list(region.box) for region in regions] == expected["bboxes"]
        else:
            polygons = [[list(polygon) for polygon in region.polygons] for region in regions]
            assert polygons == expected.get("polygons", [[quad] for quad in expected.get("quad_boxes", [])])
        some += len(regions)
        assert all(region.score is not None and 0 < region.score <= 1 for region in regions)
        (alone,) = verb(model, image)
        assert [(one.label, one.box, one.polygons) for one in alone] == [
            (one.label, one.box, one.polygons) for one in regions
        ]
        assert [one.score for one in alone] == pytest.approx([one.score for one in regions], rel=1e-4)
    assert some or task in ("<CAPTION_TO_PHRASE_GROUNDING>", "<OCR_WITH_REGION>")


@pytest.mark.parametrize("beams", [1, 3])
def test_how_likely_each_token_was(tmp_path: Path, beams: int) -> None:
    reference = write_florence(tmp_path / "hub", seed=5, generation={"no_repeat_ngram_size": 2})
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    images = pictures(3)
    read = list(model.read(images, isolate=False))
    prompts = [ask(model, task) for task in TASKS[:3]]
    options = model.options({"num_beams": beams, "max_new_tokens": 20})
    seen = model.encoder.encode_each(read)
    rows, start = model.generator.generate(
        [[image] for image in seen], prompts, options, [0, 0, 0], scored=True
    )
    given = inputs(reference, images, TASKS[:3])
    for place, (ids, log_p) in enumerate((row.ids[start:], row.log_probs) for row in rows):
        assert len(ids) == len(log_p)
        one = {name: value[place : place + 1] for name, value in given.items()}
        with torch.inference_mode():
            logits = reference(**one, decoder_input_ids=torch.tensor([[2, *ids]])).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (torch.tensor(log_p) - expected).abs().max() < 1e-3


def test_captions_of_a_length_and_of_a_region(tmp_path: Path) -> None:
    reference = write_florence(tmp_path / "hub", seed=8)
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    images = [image.convert("RGB") for image in pictures(2)]
    places = "".join(f"<loc_{int(edge)}>" for edge in (100, 250, 500, 750))
    box = [(w * 0.1005, h * 0.2505, w * 0.5005, h * 0.7505) for w, h in (image.size for image in images)]
    tasks = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "long": "<MORE_DETAILED_CAPTION>"}
    for length, task in tasks.items():
        expected = captions(reference, images, task)
        assert model.caption(images, length=length, max_new_tokens=9) == expected
        assert model.caption(images, task, max_new_tokens=9) == expected
    found = [
        model.caption(image, region=mine, max_new_tokens=9)[0]
        for image, mine in zip(images, box, strict=True)
    ]
    assert found == captions(reference, images, f"<REGION_TO_DESCRIPTION>{places}")
    with pytest.raises(UsageError, match="exclude"):
        model.caption(images, "a", length="long")


def captions(reference: Any, images: list[Any], task: str) -> list[str]:
    with torch.inference_mode():
        rows = reference.generate(**inputs(reference, images, [task] * len(images)), max_new_tokens=9)
    return [
        text.strip() for text in reference.reference_processor.batch_decode(rows, skip_special_tokens=True)
    ]


def test_boxes_land_on_the_upright_picture(tmp_path: Path) -> None:
    """A picture that its file turns: the same regions as of the upright one, in its own pixels."""
    write_florence(tmp_path / "hub", seed=4, text={"max_position_embeddings": ROOM + 60})
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    upright = pictures(1, seed=2)[0].resize((90, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    one, other = model.detect([tmp_path / "turned.png", tmp_path / "upright.png"], num_beams=1)
    assert [region.box for region in one] == [region.box for region in other]
    for region in regions_of(
        model.tokenizer,
        "boxes",
        Generation([model.tokenizer.token_id(f"<loc_{i}>") for i in (0, 0, 999, 999)], [0.0] * 4),
        (40, 90),
        "",
    ):
        assert region.box == (0, 0, 89, 39)


def test_what_is_asked_wrongly(tmp_path: Path) -> None:
    write_florence(tmp_path / "hub")
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    image = pictures(1)[0]
    for call, message in (
        (lambda: model.detect(image, "dog", describe=True), "exclude"),
        (lambda: model.locate(image, (1, 2, 3, 4)), "only segment"),
        (lambda: model.segment(image, []), "none were given"),
        (lambda: model.segment(image, [3]), "neither"),
        (lambda: model.detect(image, max_new_tokens=2000), "room for 200"),
        (lambda: model.caption(image, "word " * 300), "tokens"),
        (lambda: model.caption(image, length="tiny"), "must be one of"),
    ):
        with pytest.raises(UsageError, match=message), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            call()


@pytest.mark.parametrize(
    ("task", "verb"), [("<REGION_TO_CATEGORY>", "detect"), ("<REGION_TO_OCR>", "read_text")]
)
def test_what_a_box_holds(tmp_path: Path, task: str, verb: str) -> None:
    """Its name, and the text in it: the reference's words, in the box that was asked for, without its places."""
    image = pictures(1)[0].convert("RGB")
    width, height = image.size
    box = (width * 0.1005, height * 0.2505, width * 0.5005, height * 0.7505)
    for seed in range(8, 20):  # until a random model has words for it
        reference = write_florence(tmp_path / "hub", seed=seed)
        (expected,) = captions(reference, [image], task + "<loc_100><loc_250><loc_500><loc_750>")
        if expected:
            break
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    ((region,),) = getattr(model, verb)(image, region=box, max_new_tokens=9)
    assert (region.label, region.box) == (expected, box)
    assert 0 < region.score <= 1
    ids = [*model.tokenizer.encode([" dog"]).ids[0], model.tokenizer.token_id("<loc_7>")]
    (said,) = regions_of(
        model.tokenizer, "said", Generation(ids, [-0.5] * (len(ids) - 1) + [-9.0]), (20, 10), ""
    )
    assert (said.label, said.box, round(said.score or 0, 6)) == (
        "dog",
        (0, 0, 10, 20),
        round(2.718281828**-0.5, 6),
    )
    assert regions_of(model.tokenizer, "said", Generation(ids[-1:], [-9.0]), (20, 10), "") == []
    for wrong in ((1, 2, 3), (3, 0, 1, 4), (0, 0, float("nan"), 1), (0, 0, 0, 0), "box"):
        with pytest.raises(UsageError, match="with something in it"):
            getattr(model, verb)(image, region=wrong)
    with pytest.raises(UsageError, match="with something in it"):
        model.segment(image, (5, 5, 5, 9))
    with pytest.raises(UsageError, match="exclude"):
        model.detect(image, "dog", region=box)


def test_the_processors_own_words_for_no_thing(tmp_path: Path) -> None:
    reference = write_florence(tmp_path / "hub")
    file = tmp_path / "hub" / "processor_config.json"
    about = json.loads(file.read_text())
    text = "".join(f"{word}<loc_1><loc_2><loc_30><loc_40>" for word in ("a dog", "it", "zebra", "a lot"))
    for words in (["zebra", "a lot"], []):
        about["post_processor_config"]["phrase_grounding"] = {"banned_grounding_tokens": words}
        file.write_text(json.dumps(about))
        theirs = AutoProcessor.from_pretrained(tmp_path / "hub")
        wanted = theirs.post_process_generation(
            text, task="<CAPTION_TO_PHRASE_GROUNDING>", image_size=(90, 40)
        )["<CAPTION_TO_PHRASE_GROUNDING>"]["labels"]
        model: Any = sightloop.load(tmp_path / "hub", device="cpu")
        assert model.network.config.ignored_phrases == tuple(words)
        ids = model.tokenizer.encode([text]).ids[0].tolist()
        found = regions_of(
            model.tokenizer,
            "phrases",
            Generation(ids, [0.0] * len(ids)),
            (40, 90),
            "",
            ignored_phrases=model.network.config.ignored_phrases,
        )
        assert [region.label for region in found] == wanted
        model.save(tmp_path / f"own-{len(words)}")
        model.save(tmp_path / f"theirs-{len(words)}", layout="transformers")
        for name in ("own", "theirs"):
            again: Any = sightloop.load(tmp_path / f"{name}-{len(words)}", device="cpu")
            assert again.network.config == model.network.config
    assert reference is not None


@pytest.mark.parametrize("tied", [True, False])
def test_words_that_the_decoder_has_for_itself(tmp_path: Path, tied: bool) -> None:
    reference = write_florence(tmp_path / "hub", seed=9, tied=tied, text={"tie_word_embeddings": False})
    model: Any = sightloop.load(tmp_path / "hub", device="cpu")
    config = model.network.config
    assert config.untied_decoder
    assert config.language.tied == tied
    images, words = pictures(1), torch.randint(3, 500, (1, 7), generator=torch.Generator().manual_seed(1))
    given = inputs(reference, images, TASKS[:1])
    with torch.inference_mode():
        seen = model.encoder.encode_each(list(model.read(images, isolate=False)))
        start, _ = model.generator.build_prefix([seen], [ask(model, TASKS[0])])
        logits = model.network.language.all_logits(words, model.network.language.start(start, 7))
        wanted = reference(**given, decoder_input_ids=words).logits
        assert (logits - wanted).abs().max() < 1e-3
        model.save(tmp_path / "back", layout="transformers")
        back, about = Florence2ForConditionalGeneration.from_pretrained(
            tmp_path / "back", output_loading_info=True
        )
        assert not about["missing_keys"]
        assert torch.equal(back.eval()(**given, decoder_input_ids=words).logits, wanted)
    assert sightloop.load(tmp_path / "back", device="cpu").network.config == config


def test_other_language_models_are_refused(tmp_path: Path) -> None:
    write_florence(tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "bart"', '"model_type": "mbart"'))
    with pytest.raises(CheckpointError, match="'mbart' is not supported"):
        sightloop.load(tmp_path / "other", device="cpu")
