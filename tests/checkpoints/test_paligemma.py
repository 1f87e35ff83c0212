"""PaliGemma and PaliGemma 2 against `transformers`: random checkpoints of several shapes, ragged batches, layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PaliGemmaConfig

from sightloop.checkpoints import paligemma
from sightloop.checkpoints.key_map import export_state_dict
from sightloop.checkpoints.registry import FAMILIES, build_network, recognize
from sightloop.errors import CheckpointError
from sightloop.models.paligemma import PaliGemma
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import generate
from tests.tiny_checkpoints.paligemma import END, PATCH, SIDE, reference

SHAPES: dict[str, dict[str, Any]] = {
    "gemma": {"second": False},
    "gemma, scores that have an end": {"second": False, "final_logit_softcapping": 2.0},
    "gemma, the image's id beyond the words, a head that nothing reads": {
        "second": False, "image": 90, "head": True, "kv": 4,
    },
    "gemma 2": {"second": True, "kv": 2, "query_pre_attn_scalar": 7},
    "gemma 2, a window shorter than an image": {"second": True, "kv": 2, "sliding_window": 3},
}  # fmt: skip
Pair = tuple[Any, PaliGemma, Path]


def ours(folder: Path, rename: Any = str) -> PaliGemma:
    tensors = {rename(name): value for name, value in load_file(folder / "model.safetensors").items()}
    family, name = recognize(tensors, "test")
    assert family.name == "paligemma"
    layout = family.layouts[name]
    config = layout.configure(json.loads((folder / "config.json").read_text()), tensors)
    net = build_network(family, config, layout.prepare(tensors), layout, source="test")
    assert isinstance(net, PaliGemma)
    return net


@pytest.fixture(params=SHAPES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("paligemma")
    model = reference(**SHAPES[request.param])
    model.save_pretrained(folder)
    return model, ours(folder), folder


def prompts(image_id: int) -> dict[str, torch.Tensor]:
    """Rows of one and two images, prompts of several lengths, padded in front."""
    generator = torch.Generator().manual_seed(2)
    each = (SIDE // PATCH) ** 2
    rows = [
        [image_id] * (each * pictures) + [2, *torch.randint(3, 80, (words,), generator=generator).tolist()]
        for pictures, words in ((1, 3), (2, 6), (1, 1))
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    pixels = torch.randn(4, 3, SIDE, SIDE, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": real,
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": pixels,
    }


@torch.inference_mode()
def test_it_reads_and_writes_as_the_reference(pair: Pair) -> None:
    theirs, net, _ = pair
    given = prompts(net.config.image_id)
    ids, real = given["input_ids"], given["attention_mask"].bool()
    encoded = net.encode_image(given["pixel_values"]).tokens
    features = theirs.get_image_features(given["pixel_values"]).pooler_output
    assert (features - encoded).abs().max() <= 1e-5 * max(1.0, float(features.abs().max()))
    begun = net.build_prefix(encoded.flatten(0, 1), ids, real)
    whole = torch.ones_like(real)
    states = net.language.text.forward_embeddings(
        begun.tokens, valid_mask=real, prefix_mask=whole, causal=True
    )
    wanted = theirs(**given).logits
    assert (net.language.logits(states) - wanted)[real].abs().max() <= 1e-4
    for beams in (1, 3):
        text = theirs.generate(**given, num_beams=beams, do_sample=False, max_new_tokens=9)
        options = Decoding(num_beams=beams, max_new_tokens=9)
        found = generate(net.language, begun, torch.zeros(3, 0, dtype=torch.long), options, end_id=END)
        for (row, _), expected in zip(found, text[:, ids.shape[1] :].tolist(), strict=True):
            assert row == (expected[: expected.index(END)] if END in expected else expected)
    alone = net.build_prefix(encoded[:1].flatten(0, 1), ids[:1, -8:], real[:1, -8:])
    options = Decoding(max_new_tokens=9)
    row = generate(net.language, alone, torch.zeros(1, 0, dtype=torch.long), options, end_id=END)[0].ids
    single = {"pixel_values": given["pixel_values"][:1]}
    single |= {name: given[name][:1, -8:] for name in ("input_ids", "attention_mask", "token_type_ids")}
    expected = theirs.generate(**single, do_sample=False, max_new_tokens=9)[0, 8:].tolist()
    assert row == (expected[: expected.index(END)] if END in expected else expected)


@pytest.mark.parametrize("spelling", ["hub", "4.52"])
def test_older_files_have_other_names(pair: Pair, spelling: str) -> None:
    _, net, folder = pair

    def rename(name: str) -> str:
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        return (
            name if spelling == "hub" else "model." + name.replace("language_model.model.", "language_model.")
        )

    again = ours(folder, rename)
    assert again.config == net.config
    for name, value in again.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_it_goes_back(pair: Pair, tmp_path: Path) -> None:
    theirs, net, folder = pair
    ((data, _),) = paligemma.to_transformers(net.config).values()
    assert paligemma.config_from_transformers(json.loads(json.dumps(data))) == net.config
    tensors = export_state_dict(net, paligemma.transformers_keys(net.config))
    known = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, known[name]) for name, value in tensors.items())
    assert {name for name in set(known) - set(tensors) if "vision_tower.head." not in name} == set()
    again = PaliGemmaConfig(**data)
    for part in ("text_config", "vision_config"):
        mine, its = getattr(again, part).to_dict(), getattr(theirs.config, part).to_dict()
        left_out = {"dtype", "num_image_tokens", "vision_use_head", "architectures"}
        assert {k: v for k, v in mine.items() if k not in left_out and its.get(k, v) != v} == {}


def test_the_published_sizes_are_the_defaults() -> None:
    config = paligemma.config_from_transformers({"model_type": "paligemma"})
    assert (config.vision.dim, config.vision.layers, config.text.dim, config.text.vocab) == (
        1152,
        27,
        2048,
        257_152,
    )
    assert FAMILIES["paligemma"].config is type(config)


def test_other_towers_are_refused() -> None:
    with pytest.raises(CheckpointError, match="writes with 'llama'"):
        paligemma.config_from_transformers({"text_config": {"model_type": "llama"}})
    with pytest.raises(CheckpointError, match="over 'clip_vision_model'"):
        paligemma.config_from_transformers({"vision_config": {"model_type": "clip_vision_model"}})
