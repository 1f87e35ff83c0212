"""Named sizes: the official ones are the catalogue's, the small ones have every head, and all survive being saved."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from sightloop.checkpoints.blip import to_transformers
from sightloop.checkpoints.registry import FAMILIES, config_from_dict
from sightloop.errors import UnsupportedError
from sightloop.models.blip import Blip, BlipConfig
from sightloop.models.clip import Clip
from sightloop.nn.init import initialize
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import generate
from sightloop.tasks.text_scores import rank_answers
from sightloop.training.model_sizes import SIZES, fit_to_tokenizer


def blip(name: str) -> BlipConfig:
    _, config = SIZES[name]
    assert isinstance(config, BlipConfig)
    return config


@pytest.mark.parametrize(
    ("name", "millions"),
    [("blip-base", 252.44), ("blip-large", 474.73), ("clip-vit-b-32", 151.3), ("clip-vit-b-16", 149.6)],
)
def test_official_sizes(name: str, millions: float) -> None:
    family, config = SIZES[name]
    with torch.device("meta"):
        net = Blip(config) if family == "blip" else Clip(config)  # pyright: ignore[reportArgumentType]
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", SIZES)
def test_configs_survive_json(name: str) -> None:
    family, config = SIZES[name]
    data = json.loads(json.dumps(dataclasses.asdict(config)))
    assert config_from_dict(type(config), data, FAMILIES[family].towers) == config


def test_fit_to_a_tokenizer() -> None:
    ids = {"[PAD]": 0, "[SEP]": 3, "[DEC]": 98, "[ENC]": 99, "<|endoftext|>": 49}
    config = fit_to_tokenizer(blip("world"), 100, ids.__getitem__)
    assert (config.text.vocab, config.start_id, config.end_id, config.pad_id, config.encoder_start) == (
        100,
        98,
        3,
        0,
        99,
    )
    clip = fit_to_tokenizer(SIZES["clip-vit-b-32"][1], 50, ids.__getitem__)
    assert clip.text.vocab == 50
    assert dataclasses.asdict(clip)["end_id"] == 49


def test_one_decoder_captions_and_answers() -> None:
    net = Blip(blip("world"))
    initialize(net, 0)
    net.eval()
    assert net.capabilities >= {"caption", "answer", "match", "rank", "embed"}
    image = net.encode_image(torch.randn(2, 3, 64, 64))
    asked = torch.randint(5, 90, (4, 6))
    states = net.encode_text(image, asked, torch.tensor([6, 4, 6, 3]))
    start = net.config.start_id
    for memory in (image, states):
        prompt = torch.full((memory.tokens.shape[0], 1), start)
        texts = generate(net.decoder, memory, prompt, Decoding(num_beams=2, max_new_tokens=4), end_id=102)
        assert len(texts) == memory.tokens.shape[0]
    candidates = torch.tensor([[start, 7, 102], [start, 9, 102], [start, 8, 102]])
    assert len(rank_answers(net.decoder, states, candidates, torch.tensor([3, 3, 3]), top=2)) == 4


@pytest.mark.parametrize("name", ["blip-nano", "blip-lite0"])
def test_a_convolutional_tower_is_not_written_for_transformers(name: str) -> None:
    with pytest.raises(UnsupportedError, match="our own layout"):
        to_transformers(blip(name))


def test_answers_need_one_width() -> None:
    config = blip("world")
    with pytest.raises(ValueError, match="one width"):
        dataclasses.replace(config, vision=dataclasses.replace(config.vision, dim=64))
    with pytest.raises(ValueError, match="an encoder"):
        dataclasses.replace(config, encoder=False, shared=False)
    assert "answer" not in Blip(dataclasses.replace(config, answers=False)).capabilities
