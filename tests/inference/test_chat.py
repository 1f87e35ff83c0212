"""Conversations with small random LLaVAs, from their folders on, against the reference's processor and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoProcessor, LlamaTokenizer

import sightloop
from sightloop import Message
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.text.padding import Padding
from sightloop.data.text.sentencepiece import load_sentencepiece
from sightloop.data.text.tokenizer import Tokenizer as OurTokenizer
from sightloop.errors import CheckpointError, UnsupportedError, UsageError
from sightloop.inference.chat import _pieces
from sightloop.inference.fingerprint import fingerprint
from sightloop.inference.load import load
from sightloop.inference.model import Model
from sightloop.nn.lora import add_lora
from sightloop.nn.prepack import unpack
from sightloop.training.events import StepDone
from sightloop.types import Pixels
from tests.tiny_checkpoints.llava import LLAVA_15, LLAVA_16_MISTRAL, as_older_files, pieces, write_llava

KINDS = {"1.5": (False, LLAVA_15, {}), "1.6": (True, LLAVA_16_MISTRAL, {"mistral": True, "kv": 2})}


def picture(height: int, width: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


PICTURES = [picture(20, 50, 0), picture(33, 31, 1), picture(90, 17, 2)]


@pytest.fixture(params=KINDS, scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    tiled, template, shape = KINDS[request.param]
    folder = tmp_path_factory.mktemp("llava")
    model, _ = write_llava(folder, tiled=tiled, template=template, **shape)
    return model, AutoProcessor.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def model(made: tuple[Any, Any, Path]) -> Model:
    return load(made[2], device="cpu")


def theirs(
    made: tuple[Any, Any, Path], prompts: list[str], shown: list[list[Image.Image]], new: int
) -> list[str]:
    net, processor, _ = made
    given = processor(images=shown, text=prompts, return_tensors="pt", padding=True)
    out = net.generate(
        **given, max_new_tokens=new, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
    )
    texts = processor.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


CONVERSATION = [
    Message("system", "be kind."),
    Message("user", "a dog\n  or\ttwo?", (PICTURES[0], PICTURES[2])),
    Message("assistant", "two dogs"),
    Message("user", "and this: zebra éß?", (PICTURES[1],)),
]


def as_theirs(messages: list[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": [{"type": "image"}] * len(message.images) + [{"type": "text", "text": message.text}],
        }
        for message in messages
    ]


def test_prompts_are_those_of_the_checkpoints_template(made: tuple[Any, Any, Path], model: Model) -> None:
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[3:]):
        wanted = made[1].apply_chat_template(as_theirs(messages), add_generation_prompt=True)
        assert model.network.render_chat(messages) == wanted


def test_chat_as_the_reference(made: tuple[Any, Any, Path], model: Model) -> None:
    for messages in (CONVERSATION, [Message("user", "no picture at all")]):
        prompt = made[1].apply_chat_template(as_theirs(messages), add_generation_prompt=True)
        shown = [picture for message in messages for picture in message.images]
        if shown:
            assert model.chat(messages, max_new_tokens=9) == theirs(made, [prompt], [shown], 9)[0]
        pieces = list(model.chat(messages, stream=True, max_new_tokens=9))
        assert "".join(pieces) == model.chat(messages, max_new_tokens=9)
        assert all(pieces)
    assert len(list(model.chat(CONVERSATION, stream=True, max_new_tokens=9))) > 1


def test_answers_of_ragged_batches(made: tuple[Any, Any, Path], model: Model) -> None:
    questions = ["a dog on the grass?", "what?", "zebra éß\n  two  spaces "]
    prompts = [
        made[1].apply_chat_template(as_theirs([Message("user", text, (image,))]), add_generation_prompt=True)
        for text, image in zip(questions, PICTURES, strict=True)
    ]
    wanted = theirs(made, prompts, [[image] for image in PICTURES], 8)
    assert model.answer(PICTURES, questions, max_new_tokens=8) == wanted
    assert [
        model.answer(p, q, max_new_tokens=8)[0] for p, q in zip(PICTURES, questions, strict=True)
    ] == wanted
    assert len(model.caption(PICTURES, max_new_tokens=4)) == 3


def test_ids_are_those_of_the_reference(made: tuple[Any, Any, Path], model: Model) -> None:
    texts = ["USER: <image>\nwhat is  it? ASSISTANT:", "[INST] zebra é 犬 🙂\n\n", "", " a"]
    ours = model.tokenizer.encode(texts)
    for text, row, length in zip(texts, ours.ids, ours.lengths, strict=True):
        assert row[:length].tolist() == made[1].tokenizer(text).input_ids


def test_pixels_are_those_of_the_reference(made: tuple[Any, Any, Path], model: Model) -> None:
    from sightloop.data.images.preprocess import normalize

    wanted = made[1].image_processor(PICTURES, return_tensors="pt")["pixel_values"]
    for i, pixels in enumerate(model.read(PICTURES, isolate=False)):
        assert not isinstance(pixels, Exception)
        found = normalize([pixels], model.image_spec)[0]
        if model.image_spec.tiles:
            found = found.unflatten(1, (-1, 14)).transpose(0, 1)
            assert torch.equal(found, wanted[i][: len(found)])
            assert not wanted[i][len(found) :].any()
        else:
            assert torch.equal(found, wanted[i])


def test_older_files_and_saving(made: tuple[Any, Any, Path], model: Model, tmp_path: Path) -> None:
    wanted = model.chat(CONVERSATION, max_new_tokens=9)
    model.save(tmp_path / "own")
    model.save(tmp_path / "theirs", layout="transformers")
    assert load(tmp_path / "own", device="cpu").chat(CONVERSATION, max_new_tokens=9) == wanted
    assert load(tmp_path / "theirs", device="cpu").chat(CONVERSATION, max_new_tokens=9) == wanted
    again, loading = type(made[0]).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    for name, value in again.state_dict().items():
        assert torch.equal(value, made[0].state_dict()[name])
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    prompt = processor.apply_chat_template(as_theirs(CONVERSATION), add_generation_prompt=True)
    assert prompt == model.network.render_chat(CONVERSATION)
    given, before = (
        p(images=PICTURES[:1], text="a<image>b", return_tensors="pt") for p in (processor, made[1])
    )
    assert all(torch.equal(given[name], before[name]) for name in before)
    as_older_files(tmp_path / "theirs")
    assert load(tmp_path / "theirs", device="cpu").chat(CONVERSATION, max_new_tokens=9) == wanted


def test_few_bits(made: tuple[Any, Any, Path], model: Model, tmp_path: Path) -> None:
    small = load(made[2], device="cpu", quantize="int8", dtype="bfloat16")
    assert small.network.language.text.blocks[0].mlp.fc1.weight.is_meta
    ids, real = torch.arange(3, 40)[None], torch.ones(1, 37, dtype=torch.bool)
    nothing = torch.zeros(0, 1)
    states = [
        network.language.text.forward_embeddings(
            network.build_prefix(nothing, ids, real).tokens, causal=True
        ).float()
        for network in (model.network, small.network)
    ]
    assert (states[0] - states[1]).norm() < 0.2 * states[0].norm()
    assert isinstance(small.chat(CONVERSATION, max_new_tokens=3), str)
    assert fingerprint(small) != fingerprint(model)
    with pytest.raises(UsageError, match="quantize"):
        small.save(tmp_path / "small")
    with pytest.raises(UsageError, match=r"quantized; load the model without `quantize`"):
        add_lora(small.network, ["language.text.blocks.*.attn.qkv"])
    with pytest.raises(UsageError, match="language model"):
        load(device="cpu", quantize="int4")


def test_what_cannot_be_said(made: tuple[Any, Any, Path], model: Model, tmp_path: Path) -> None:
    for messages, reason in (
        ([], "last"),
        ([Message("user", "a"), Message("assistant", "b")], "last"),
        ([Message("robot", "a"), Message("user", "b")], "robot"),
        ([Message("user", "an <image> in words")], "images"),
        ([Message("assistant", "a", (PICTURES[0],)), Message("user", "b")], "user's"),
    ):
        with pytest.raises(UsageError, match=reason):
            model.chat(messages)
        with pytest.raises(UsageError, match=reason):
            model.chat(messages, stream=True)
    with pytest.raises(sightloop.ImageError):
        model.chat([Message("user", "a", ("absent.jpg",))], stream=True)
    with pytest.raises(UsageError, match="no image"):
        load(device="cpu").chat([Message("user", "a")])


def test_a_template_is_never_run(made: tuple[Any, Any, Path], tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made[2], tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__ }}")
    strange = load(tmp_path / "copy", device="cpu")
    with pytest.raises(UnsupportedError, match="known form"):
        strange.chat([Message("user", "a")])
    config = tmp_path / "copy" / "config.json"
    config.write_text(config.read_text().replace("clip_vision_model", "siglip_vision_model"))
    with pytest.raises(CheckpointError, match="siglip"):
        load(tmp_path / "copy", device="cpu")


@pytest.mark.parametrize("recipe", ["llava_projector", "llava"])
def test_the_stages_learn(recipe: str, tmp_path: Path) -> None:
    """The projector alone, then with the language model: the loss falls, what is frozen stays."""
    write_llava(tmp_path / "start", tiled=False, template=LLAVA_15)
    write_synthetic_world(tmp_path / "train.tar", synthetic_world("train", 12, seed=0))
    settings = [
        f"model.init_from={tmp_path / 'start'}", "data.batch=6", "optimizer.lr=0.003", "schedule.warmup_steps=0",
        "epochs=1", "steps=12",
    ]  # fmt: skip
    events = list(sightloop.train(recipe, tmp_path / "train.tar", tmp_path / "run", settings=settings))
    losses = [event.loss for event in events if isinstance(event, StepDone)]
    assert sum(losses[-3:]) < sum(losses[:3])
    before, after = (load(tmp_path / name, device="cpu") for name in ("start", "run/model"))
    unpack(before.network)
    unpack(after.network)
    learned = after.network.state_dict()
    moved = {
        name.split(".")[0]
        for name, value in before.network.state_dict().items()
        if not torch.equal(value, learned[name])
    }
    assert moved == ({"projector"} if recipe == "llava_projector" else {"projector", "language"})
    assert isinstance(after.chat(CONVERSATION, max_new_tokens=3), str)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bare_piece_model(legacy: bool, tmp_path: Path) -> None:
    """Only tokenizer.model and tokenizer_config.json, as Llama's first checkpoints: ids are those of its class."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("a dog on the grass\nthe zebra and the dog\nwhat is it\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), model_type="bpe",
        vocab_size=300, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        minloglevel=2,
    )  # fmt: skip
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_bos_token": True,
        "add_eos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = LlamaTokenizer.from_pretrained(tmp_path)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    ours = load_sentencepiece(
        tmp_path, max_length=1000, extra_special_token="<image>", default_class="LlamaTokenizer"
    )
    texts = ["a dog", " the  zebra\n", "USER: <image>\nwhat is it? ASSISTANT:", "é 犬", "", "</s> dog"]
    rows = ours.encode(texts)
    for text, row, length in zip(texts, rows.ids, rows.lengths, strict=True):
        assert row[:length].tolist() == theirs(text).input_ids, text
    assert ours.decode([theirs("a dog é").input_ids]) == ["a dog é"]


def test_pictures_made_square(tmp_path: Path) -> None:
    """A processor that fills pictures up to a square with its mean colour first: pixels, and both layouts again."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from sightloop.data.images.preprocess import normalize

    write_llava(tmp_path / "m", tiled=False, template=LLAVA_15)
    sizes: Any = {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}}
    images: Any = LlavaImageProcessorPil(**sizes, do_pad=True, image_mean=[0.4814, 0.1, 0.999])
    processor = AutoProcessor.from_pretrained(tmp_path / "m")
    LlavaProcessor(images, processor.tokenizer, patch_size=7).save_pretrained(tmp_path / "m")
    shown = [*PICTURES, picture(1, 1, 3), picture(1, 9, 4), picture(8, 1, 5), picture(40, 40, 6)]
    wanted = images(shown, return_tensors="pt")["pixel_values"]
    loaded = load(tmp_path / "m", device="cpu")
    loaded.save(tmp_path / "own")
    loaded.save(tmp_path / "theirs", layout="transformers")
    for folder in ("m", "own", "theirs"):
        model = load(tmp_path / folder, device="cpu")
        for isolate in (False, True):
            read = [one for one in model.read(shown, isolate=isolate) if isinstance(one, Pixels)]
            assert torch.equal(normalize(read, model.image_spec), wanted)
        assert [one.size for one in read] == [(one.height, one.width) for one in shown]
    theirs = AutoProcessor.from_pretrained(tmp_path / "theirs").image_processor
    assert torch.equal(torch.as_tensor(np.stack(theirs(shown)["pixel_values"])), wanted)
    tight = sightloop.types.Limits(max_pixels=2000)
    small = list(loaded.read([picture(10, 60, 7)], isolate=False, limits=tight))
    assert "square" in str(small[0])


def test_a_stream_may_be_left_and_begun_again(made: tuple[Any, Any, Path], model: Model) -> None:
    whole = list(model.chat(CONVERSATION, stream=True, max_new_tokens=9))
    cut = model.chat(CONVERSATION, stream=True, max_new_tokens=9)
    first = [next(cut), next(cut)]
    cut.close()
    between = model.chat(CONVERSATION, stream=True, max_new_tokens=9)
    other = model.chat(CONVERSATION[3:], stream=True, max_new_tokens=9)
    mixed = [next(between), next(other)]
    assert first == whole[:2]
    assert mixed[0] == whole[0]
    assert [mixed[0], *between] == whole
    assert mixed[1] + "".join(other) == model.chat(CONVERSATION[3:], max_new_tokens=9)
    assert not torch.is_inference_mode_enabled()


def test_what_the_model_spelled_does_not_end_the_conversation(model: Model) -> None:
    """An answer in whose letters "<image>" or "</s>" stands is no picture and no end when it is read again."""
    said = [Message("user", "how?"), Message("assistant", "write <image> and </s> so"), Message("user", "a")]
    plain = [said[0], Message("assistant", "write < image> and < /s> so"), said[2]]
    assert model.chat(said, max_new_tokens=5) == model.chat(plain, max_new_tokens=5)


def test_everything_is_checked_before_the_first_piece(model: Model) -> None:
    with pytest.raises(UsageError, match="no such"):
        model.chat(CONVERSATION, stream=True, beams=3)
    with pytest.raises(UsageError, match="tuple of images"):
        model.chat([Message("user", "a", "cat.jpg")], stream=True)  # pyright: ignore[reportArgumentType]


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.booleans(), st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_pieces_are_whole_characters(text: str, tidy: bool, data: st.DataObject) -> None:
    """However the bytes of a text are spread over tokens, the pieces join to it and no character is torn."""
    backend = Tokenizer(BPE(*pieces(), unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_of = [backend.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
    tokenizer = sightloop_tokenizer(backend, tidy=tidy)
    stop = data.draw(st.integers(0, len(bytes_of)))
    whole, cut = (
        list(_pieces(tokenizer, iter([ids[: i + 1] for i in range(len(ids))])))
        for ids in (bytes_of, bytes_of[:stop])
    )
    assert "".join(whole) == tokenizer.decode([bytes_of])[0].strip()
    for found in (whole, cut):
        assert all(found)
        assert "\ufffd" not in "".join(found[:-1]) or "\ufffd" in text
    if not tidy:
        assert text.lstrip().startswith("".join(cut).rstrip("\ufffd"))


def test_a_space_that_is_taken_out_later() -> None:
    """Where "do n't" becomes "don't", nothing is said that does not stay."""
    backend = Tokenizer(BPE({"do": 0, " n": 1, "'t": 2, " go": 3, " ,": 4}, []))
    backend.decoder = decoders.Fuse()
    tokenizer = sightloop_tokenizer(backend, tidy=True)
    runs = iter([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4]])
    assert list(_pieces(tokenizer, runs)) == ["do", "n't", " go,"]


def sightloop_tokenizer(backend: Any, *, tidy: bool) -> Any:
    settings = {"clean_up_tokenization_spaces": tidy}
    return OurTokenizer("pieces", None, None, Padding(0), backend.get_vocab_size(), 99, backend, settings)
