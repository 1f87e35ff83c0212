"""BLIP-2 against the reference: same weights, same images, same texts, same numbers and words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import sightloop
from sightloop.checkpoints.key_map import export_state_dict
from sightloop.checkpoints.registry import FAMILIES, build_network, key_map_of, recognize
from sightloop.checkpoints.tensors import read_tensors
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.images.preprocess import normalize
from sightloop.errors import CheckpointError, SightloopError, UnsupportedError
from sightloop.inference.rerank import cosines
from sightloop.models.blip2 import Blip2
from sightloop.nn.init import initialize
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import generate
from sightloop.training.events import StepDone
from sightloop.training.model_sizes import SIZES, fit_to_tokenizer
from sightloop.training.trainer import train
from sightloop.types import Encoded, Message, Pixels
from tests.checkpoints.test_against_reference import pictures
from tests.tiny_checkpoints.blip2 import (
    OPT,
    T5,
    opt_tokenizer,
    t5_tokenizer,
    write_judge,
    write_processor,
    write_writer,
)
from tests.tiny_checkpoints.clip_and_blip import bert_tokenizer, sharpen

WRITERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "opt": (OPT, {}),
    "opt-untied": (OPT, {"language": {"tie_word_embeddings": False, "num_attention_heads": 4}, "queries": 1}),
    "opt-odd": (
        OPT,
        {"vision": {"qkv_bias": False, "image_size": 42}, "qformer": {"cross_attention_frequency": 1}},
    ),
    "t5": (T5, {}),
    "t5-plain": (
        T5,
        {"language": {"feed_forward_proj": "relu", "dense_act_fn": "relu", "tie_word_embeddings": True}},
    ),
    "t5-deep": (T5, {"language": {"num_decoder_layers": 3}, "qformer": {"cross_attention_frequency": 3}}),
}
JUDGES: list[dict[str, Any]] = [
    {},
    {"queries": 7, "qformer": {"cross_attention_frequency": 1, "num_hidden_layers": 2}, "width": 5},
    {"qformer": {"hidden_size": 36, "num_attention_heads": 3, "layer_norm_eps": 1e-3, "hidden_act": "relu"}},
]


def ours(folder: Path) -> Blip2:
    """The checkpoint as our network; its tensors come back as they were."""
    tensors = read_tensors([folder / "model.safetensors"])
    family, name = recognize(tensors, "test")
    assert (family.name, name) == ("blip2", "transformers")
    layout = family.layouts[name]
    config = layout.configure(json.loads((folder / "config.json").read_text()), tensors)
    network = build_network(family, config, tensors, layout, source="test")
    back = export_state_dict(network, key_map_of(layout, config))
    assert set(back) == set(tensors)
    assert all(torch.equal(back[key], tensors[key]) for key in back)
    return network  # pyright: ignore[reportReturnType]


def prompts(reference: Any, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of queries and random words, padded in front, and where they are real."""
    config = reference.config
    count, longest = config.num_query_tokens, max(lengths)
    ids = torch.randint(3, 50, (len(lengths), count + longest), generator=torch.Generator().manual_seed(1))
    real = torch.arange(count + longest) >= longest - torch.tensor(lengths)[:, None]
    for row, length in enumerate(lengths):
        ids[row, longest - length :][:count] = config.image_token_index
    return ids.masked_fill(~real, config.text_config.pad_token_id), real


def pixels(reference: Any, count: int, seed: int = 0) -> Tensor:
    side = reference.config.vision_config.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", WRITERS)
@torch.inference_mode()
def test_logits(tmp_path: Path, name: str) -> None:
    text, shape = WRITERS[name]
    reference = write_writer(tmp_path / "m", text, **shape)
    network = ours(tmp_path / "m")
    ids, real = prompts(reference, [5, 2, 0])
    images = pixels(reference, 3)
    tokens = network.encode_image(images).tokens
    wanted = reference.get_image_features(images, return_dict=True).pooler_output
    assert (tokens - wanted).abs().max() < 1e-5
    given = network.build_prefix(tokens.flatten(0, 1), ids, real)
    kwargs: dict[str, Any] = {"pixel_values": images, "input_ids": ids, "attention_mask": real.long()}
    if name.startswith("opt"):
        got = network.language.logits(
            network.language.text.forward_embeddings(given.tokens, valid_mask=real, causal=True)
        )
        wanted = reference(**kwargs).logits
        assert (got - wanted)[real].abs().max() < 1e-4
        return
    words = torch.randint(3, 50, (3, 6))
    words[:, 0] = network.config.start_ids[0]
    wanted = reference(**kwargs, decoder_input_ids=words).logits
    got = network.language.all_logits(words, network.language.start(given, 6))
    assert (got - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "length_penalty": 2.0, "num_return": 2}]
)
@pytest.mark.parametrize("name", ["opt", "opt-odd", "t5", "t5-plain"])
def test_words(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    text, shape = WRITERS[name]
    reference = write_writer(tmp_path / "m", text, **shape)
    network = ours(tmp_path / "m")
    ids, real = prompts(reference, [5, 1, 3, 4])
    images = pixels(reference, 4)
    asked = {"max_new_tokens": 9, **options}
    returned = asked.pop("num_return", 1)
    out = reference.generate(
        images,
        input_ids=ids,
        attention_mask=real.long(),
        **asked,
        num_return_sequences=returned,
        do_sample=False,
    )
    start = ids.shape[1] if name.startswith("opt") else 1
    with torch.inference_mode():
        given = network.build_prefix(network.encode_image(images).tokens.flatten(0, 1), ids, real)
    prompt = torch.tensor([network.config.start_ids] * 4, dtype=torch.int64).view(4, -1)
    options = {"max_new_tokens": 9, **options}
    got = generate(network.language, given, prompt, Decoding(**options), end_id=network.config.end_id)
    end = network.config.end_id
    cut = [row[: row.index(end)] if end in row else row for row in out[:, start:].tolist()]
    assert [text.ids[prompt.shape[1] :] for text in got] == cut


@pytest.mark.parametrize("shape", JUDGES)
@torch.inference_mode()
def test_judges(tmp_path: Path, shape: dict[str, Any]) -> None:
    reference = write_judge(tmp_path / "m", **shape)
    network = ours(tmp_path / "m")
    images = pixels(reference, 4)
    lengths = torch.tensor([3, 7, 1, 5])
    ids = torch.randint(3, 50, (4, 7))
    real = torch.arange(7) < lengths[:, None]
    ids = ids.masked_fill(~real, 0)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
    image = network.encode_image(images)
    wanted = reference(images, **given)
    assert (network.embed_image(image) - wanted.image_embeds).abs().max() < 1e-5
    assert (network.embed_text(ids, lengths) - wanted.text_embeds).abs().max() < 1e-5
    wanted = reference(images, **given, use_image_text_matching_head=True).logits_per_image
    assert (network.match_logits(image, ids, lengths) - wanted).abs().max() < 1e-5
    # Two texts for each of two images.
    wanted = reference(images[[0, 0, 1, 1]], **given, use_image_text_matching_head=True).logits_per_image
    both = Encoded(image.tokens[:2])
    assert (network.match_logits(both, ids, lengths) - wanted).abs().max() < 1e-5


def test_one_stage_at_a_time(tmp_path: Path) -> None:
    write_judge(tmp_path / "m")
    config = ours(tmp_path / "m").config
    with pytest.raises(ValueError, match="either"):
        type(config)(**{name: getattr(config, name) for name in config.__slots__} | {"texts": None})
    assert set(FAMILIES) >= {"blip2"}


TOKENIZERS = {"opt": opt_tokenizer, "t5": t5_tokenizer}
QUESTIONS = ["what is the dog?", "of  the\nphoto", "", "Wie heißt der Hund — 犬?", "a" * 30]


def loaded(folder: Path, kind: str, **shape: Any) -> tuple[Any, Any, sightloop.Model]:
    """The reference, its processor and our model."""
    tokenizer = TOKENIZERS[kind]()
    reference = write_writer(folder, {"opt": OPT, "t5": T5}[kind], words=len(tokenizer) + 1, **shape)
    return reference, write_processor(folder, reference, tokenizer), sightloop.load(folder, device="cpu")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_and_pixels(tmp_path: Path, kind: str) -> None:
    reference, processor, model = loaded(tmp_path / "m", kind)
    images = pictures(5)
    seen: dict[str, Tensor] = {}

    def begin(image_tokens: Tensor, ids: Tensor, real: Tensor) -> Encoded:
        seen.update(ids=ids, valid_mask=real)
        raise KeyboardInterrupt

    model.network.build_prefix = begin
    for ask in ("Question: {} Answer:", "{}"):
        wanted = processor(images, [ask.format(text) for text in QUESTIONS])["input_ids"]
        forms = [f"<image>{ask}".format(text) for text in QUESTIONS]
        ready = [picture for picture in model.read(images) if isinstance(picture, Pixels)]
        with pytest.raises(KeyboardInterrupt):
            model.generator.build_prefix([[image] for image in model.encoder.encode_each(ready)], forms)
        for ids, real, theirs in zip(seen["ids"], seen["valid_mask"], wanted, strict=True):
            # The network puts the image first; the tokenizer has its first token there.
            assert sorted(ids[real].tolist(), key=lambda i: i != reference.config.image_token_index) == theirs
    wanted = processor(images, [""] * 5, return_tensors="pt")["pixel_values"]
    mine = normalize(ready, model.image_spec, device=model.device, dtype=model.dtype)
    assert torch.equal(mine, wanted)


DECODING: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "max_new_tokens": 7},
    {"num_beams": 4, "num_return": 2, "length_penalty": -1.0, "max_new_tokens": 6},
    {"min_new_tokens": 5, "max_new_tokens": 8},
]


@pytest.mark.parametrize("options", DECODING)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_captions_and_answers(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    reference, processor, model = loaded(tmp_path / "m", kind, seed=3)
    images = pictures(5, seed=2)
    asked = {"max_new_tokens": 20, **options}
    returned = asked.pop("num_return", 1)

    def theirs(pictures: list[Image.Image], texts: list[str]) -> list[str]:
        # T5 counts padding between images and words as distance, and OPT goes on from the last token.
        side = "left" if kind == "opt" else "right"
        inputs = processor(pictures, texts, padding=True, padding_side=side, return_tensors="pt")
        ids = reference.generate(**inputs, **asked, num_return_sequences=returned, do_sample=False)
        start = inputs["input_ids"].shape[1] if kind == "opt" else 0
        return [text.strip() for text in processor.batch_decode(ids[:, start:], skip_special_tokens=True)]

    forms = [f"Question: {text} Answer:" for text in QUESTIONS]
    wanted = theirs(images, forms)
    assert model.answer(images, QUESTIONS, **options) == wanted
    assert model.answer(images[3], QUESTIONS[3], **options) == wanted[3 * returned : 4 * returned]
    assert model.caption(images, **options) == theirs(images, [""] * 5)
    assert model.caption(images, QUESTIONS, **options) == theirs(images, QUESTIONS)
    assert model.answer(images[0], QUESTIONS, **options) == theirs([images[0]] * 5, forms)


def test_conversations(tmp_path: Path) -> None:
    _, _, model = loaded(tmp_path / "m", "opt")
    picture = pictures(1)[0]
    first = [Message("user", "what is the dog?", (picture,))]
    assert model.network.render_chat(first) == "<image>Question: what is the dog? Answer:"
    answer = model.chat(first, max_new_tokens=5)
    assert answer == model.answer(picture, "what is the dog?", max_new_tokens=5)[0]
    more = [*first, Message("assistant", "a"), Message("user", "where?")]
    text = "Question: what is the dog? Answer: a. Question: where? Answer:"
    assert model.network.render_chat(more) == f"<image>{text}"
    assert model.chat(more, max_new_tokens=5) == model.caption(picture, text, max_new_tokens=5)[0]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_writers_are_saved_and_come_back(tmp_path: Path, kind: str) -> None:
    reference, processor, model = loaded(tmp_path / "m", kind)
    images = pictures(3)
    words = model.caption(images, "the dog")
    for layout in ("sightloop", "transformers"):
        model.save(tmp_path / layout, layout=layout)
        again = sightloop.load(tmp_path / layout, device="cpu")
        assert again.network.config == model.network.config
        assert again.caption(images, "the dog") == words
    given = (images, ["the dog", "a", "of the photo"])
    saved = AutoProcessor.from_pretrained(tmp_path / "transformers")(*given)["input_ids"]
    assert saved == processor(*given)["input_ids"]
    back = type(reference).from_pretrained(tmp_path / "transformers")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in reference.state_dict().items())
    inputs = processor(images, [""] * 3, return_tensors="pt")
    assert torch.equal(
        back.generate(**inputs, max_new_tokens=9), reference.generate(**inputs, max_new_tokens=9)
    )


def test_judges_judge_as_the_reference_does(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(tmp_path / "words")
    reference = write_judge(tmp_path / "m", words=len(tokenizer) + 1)
    tokenizer.save_pretrained(tmp_path / "m")
    processor = BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "m")
    model = sightloop.load(tmp_path / "m", device="cpu")
    assert model.capabilities == {"embed", "similarity", "match", "rank"}
    images, texts = pictures(4), ["a dog", "two cats on the street, standing", "a", "a small red car"]
    inputs = {**tokenizer(texts, padding=True, return_tensors="pt"), **processor(images, return_tensors="pt")}
    del inputs["token_type_ids"]
    with torch.inference_mode():
        itc = reference(**inputs)
        pixels = inputs["pixel_values"]
        grid = torch.stack(
            [
                reference(
                    **{**inputs, "pixel_values": one[None].expand(4, -1, -1, -1)},
                    use_image_text_matching_head=True,
                ).logits_per_image
                for one in pixels
            ]
        )
    assert np.abs(model.embed_images(images) - itc.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(texts) - itc.text_embeds.numpy()).max() < 1e-5
    assert np.abs(model.similarity(images, texts) - itc.logits_per_image.numpy()).max() < 1e-5
    every = model.match([image for image in images for _ in texts], texts * 4).reshape(4, 4)
    assert np.abs(every - grid.softmax(dim=-1)[..., 1].numpy()).max() < 1e-5
    wanted = (grid[..., 1] + itc.logits_per_image).numpy()
    assert np.abs(model.rank(images, texts) - wanted).max() < 1e-5
    assert (
        np.abs(
            cosines(model.embed_images(images), model.embed_texts(texts)) - model.similarity(images, texts)
        ).max()
        < 1e-6
    )
    for layout in ("sightloop", "transformers"):
        model.save(tmp_path / layout, layout=layout)
        again = sightloop.load(tmp_path / layout, device="cpu")
        assert again.network.config == model.network.config
        assert np.array_equal(again.match(images, texts), model.match(images, texts))
    back = type(reference).from_pretrained(tmp_path / "transformers")
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in reference.state_dict().items())


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world") / "train.tar"
    write_synthetic_world(path, synthetic_world("train", 24, seed=0))
    return path


QUICK = (
    "data.batch=8",
    "data.augment=null",
    "data.cache=64",
    "steps=16",
    "optimizer.lr=2e-3",
    "schedule.warmup_steps=3",
)


def losses(recipe: str, shard: Path, out: Path, *settings: str) -> list[float]:
    events = train(recipe, str(shard), out, settings=[*QUICK, *settings], device="cpu")
    return [event.loss for event in events if isinstance(event, StepDone)]


def test_the_first_stage_learns(shard: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = losses("blip2_stage1", shard, out, "model.size=world-blip2", "model.vocab_size=400")
    assert np.mean(found[-4:]) < 0.7 * np.mean(found[:3])
    model = sightloop.load(out / "model", device="cpu")
    assert {"match", "rank", "embed", "classify"} <= model.capabilities
    # The image tower is as it was drawn.
    family, config = SIZES["world-blip2"]
    fresh = FAMILIES[family].network(
        fit_to_tokenizer(config, model.tokenizer.vocab_size, model.tokenizer.token_id)
    )
    initialize(fresh, 0)
    mine = load_file(out / "model" / "model.safetensors")
    for name, value in fresh.state_dict().items():
        if name in mine:
            assert torch.equal(mine[name], value) == name.startswith("vision."), name
    with pytest.raises(UnsupportedError, match="stem"):
        model.save(tmp_path / "hub", layout="transformers")
    plain = replace(fresh.config, vision=replace(config.vision, stem=()))
    data, parts = FAMILIES[family].to_transformers(plain)[""]
    reference = Blip2ForImageTextRetrieval(Blip2Config(**data))
    back = export_state_dict(Blip2(plain), key_map_of(FAMILIES[family].layouts["transformers"], plain))
    reference.load_state_dict({name: value for name, value in back.items() if name.startswith(parts)})


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_second_stage_learns(shard: Path, tmp_path: Path, kind: str) -> None:
    _, _, model = loaded(tmp_path / "m", kind)
    frozen = ("vision.", "language.", "encoder.")[: 2 + (kind == "t5")]
    settings = (
        f"model.init_from={tmp_path / 'm'}",
        f"model.frozen={','.join(f'{part}*' for part in frozen)}",
    )
    found = losses("blip2_stage2", shard, tmp_path / "run", *settings, "optimizer.lr=1e-2")
    assert np.mean(found[-4:]) < np.mean(found[:3]) - 0.2
    model.save(tmp_path / "before")
    before = load_file(tmp_path / "before" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(frozen))
    assert not torch.equal(after["queries.word.weight"], before["queries.word.weight"])
    assert not torch.equal(after["projection.weight"], before["projection.weight"])


def test_words_see_the_queries_and_what_came_before() -> None:
    family, config = SIZES["world-blip2"]
    network = FAMILIES[family].network(config).eval()
    initialize(network, 0)
    image = network.encode_image(torch.randn(1, 3, 64, 64))
    ids = torch.randint(5, 900, (2, 6))
    changed = ids.clone()
    changed[:, 4] += 1
    with torch.inference_mode():
        first, second = network.decoder_states(image, ids), network.decoder_states(image, changed)
        other = network.decoder_states(network.encode_image(torch.randn(1, 3, 64, 64)), ids)
    assert torch.allclose(first[:, :4], second[:, :4], atol=1e-6)
    assert not torch.allclose(first[:, 4:], second[:, 4:], atol=1e-3)
    assert not torch.allclose(first[:, 0], other[:, 0], atol=1e-6)


def test_settings_are_read_as_the_reference_reads_them(tmp_path: Path) -> None:
    write_writer(tmp_path / "t5", T5)
    tensors = read_tensors([tmp_path / "t5" / "model.safetensors"])
    data = json.loads((tmp_path / "t5" / "config.json").read_text())
    configure = FAMILIES["blip2"].layouts["transformers"].configure
    data["text_config"] |= {"pad_token_id": 3, "decoder_start_token_id": 0}
    assert configure(data, tensors).start_ids == (0,)
    assert configure({**data, "image_token_id": 9}, tensors).image_id == 9
    with pytest.raises(CheckpointError, match="eos_token_id"):
        configure({**data, "text_config": {**data["text_config"], "eos_token_id": [4, 5]}}, tensors)
    with pytest.raises(CheckpointError, match="'gpt2' is not supported"):
        configure({**data, "text_config": {**data["text_config"], "model_type": "gpt2"}}, tensors)


def write_language(folder: Path, kind: str) -> Any:
    """A small OPT or T5 alone, as `transformers` keeps it, OPT's tokenizer in its first files' form."""
    tokenizer = TOKENIZERS[kind]()
    words = len(tokenizer) + 3  # a few rows that no word has, as the published ones
    torch.manual_seed(5)
    if kind == "opt":
        model: Any = OPTForCausalLM(
            OPTConfig(**{**OPT, "vocab_size": words, "eos_token_id": 2, "pad_token_id": 1})
        )
    else:
        model = T5ForConditionalGeneration(T5Config(**{**T5, "vocab_size": words}))
    sharpen(model.eval()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kind == "opt":
        whole = json.loads((folder / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(whole["vocab"]))
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs))
        (folder / "tokenizer.json").unlink()
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "pad_token": "<pad>"}
        config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return model, tokenizer


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_second_stage_from_a_first_and_a_language_model(shard: Path, tmp_path: Path, kind: str) -> None:
    """Image tower and queries of a stage 1, words and weights of a language model alone; only the rest learns."""
    losses(
        "blip2_stage1", shard, tmp_path / "one", "model.size=world-blip2", "model.vocab_size=300", "steps=2"
    )
    reference, theirs = write_language(tmp_path / "words", kind)
    start = f"model.init_from={tmp_path / 'one' / 'model'}"
    frozen = "vision.*,language.*" + ",encoder.*" * (kind == "t5")
    settings = (start, f"model.language={tmp_path / 'words'}", f"model.frozen={frozen}")
    found = losses("blip2_stage2", shard, tmp_path / "two", *settings, "optimizer.lr=1e-2")
    assert np.mean(found[-4:]) < np.mean(found[:3])
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert all(
        torch.equal(second[name], value) for name, value in first.items() if name.startswith("vision.")
    )
    assert not torch.equal(first["queries.word.weight"], second["queries.word.weight"])
    assert not any(name.startswith(("texts.", "head.")) for name in second)
    model: Any = sightloop.load(tmp_path / "two" / "model", device="cpu")
    texts = ["a photo of the dog", "Qu é 犬", ""]
    rows = model.tokenizer.encode(texts)
    for text, row, length in zip(texts, rows.ids, rows.lengths, strict=True):
        assert row[:length].tolist() == theirs(text).input_ids
    # The language model is the one of the folder, logit for logit.
    ids = torch.randint(3, 50, (2, 6))
    network = model.network
    with torch.inference_mode():
        if kind == "opt":
            wanted = reference(input_ids=ids).logits
            states = network.language.text.forward_embeddings(
                network.language.text.embed_tokens(ids), causal=True
            )
        else:
            wanted = reference(input_ids=ids, decoder_input_ids=ids).logits
            tower = network.language.text
            memory = tower.memory(network.encoder.forward_embeddings(network.encoder.embed_tokens(ids)))
            states = tower.forward_embeddings(tower.embed_tokens(ids), causal=True, memory=memory)
        assert torch.allclose(network.language.logits(states), wanted, atol=1e-4)
    assert {"caption", "answer", "chat"} <= model.capabilities
    assert len(model.caption(pictures(2), max_new_tokens=4)) == 2
    for wrong, reason in (
        ((f"model.init_from={tmp_path / 'two' / 'model'}", settings[1]), "needs a BLIP-2 of stage 1"),
        ((start, f"model.language={tmp_path / 'one' / 'model'}"), "not supported"),
    ):
        with pytest.raises(SightloopError, match=reason):
            losses("blip2_stage2", shard, tmp_path / reason, *wrong)
