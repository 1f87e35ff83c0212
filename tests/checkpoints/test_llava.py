"""LLaVA 1.5 and 1.6 against `transformers`: random checkpoints of several shapes, ragged batches, both layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sightloop.checkpoints import llava
from sightloop.checkpoints.registry import FAMILIES, build_network, recognize
from sightloop.data.images import tiles
from sightloop.models.llava import Llava
from sightloop.tasks.decoding_options import Decoding
from sightloop.tasks.generate import generate
from tests.tiny_checkpoints.llava import reference

IMAGE = 90


def ours(folder: Path, rename: Any = str) -> Llava:
    import json

    tensors = {rename(name): value for name, value in load_file(folder / "model.safetensors").items()}
    family, name = recognize(tensors, "test")
    layout = family.layouts[name]
    config = layout.configure(json.loads((folder / "config.json").read_text()), tensors)
    return build_network(family, config, layout.prepare(tensors), layout, source="test")  # pyright: ignore[reportReturnType]


SHAPES: dict[str, dict[str, Any]] = {
    "usual": {"tiled": False},
    "grouped heads, tied words, class token": {
        "tiled": False, "kv": 2, "tied": True, "vision_feature_select_strategy": "full",
    },
    "two layers": {"tiled": False, "vision_feature_layer": [1, -1], "multimodal_projector_bias": False},
    "tiles": {"tiled": True},
    "tiles, mistral": {"tiled": True, "mistral": True, "kv": 1, "patch": 2},
}  # fmt: skip


@pytest.fixture(params=SHAPES, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llava, Path]:
    folder = tmp_path_factory.mktemp("llava")
    model = reference(**SHAPES[request.param])
    model.save_pretrained(folder)
    return model, ours(folder), folder


def tokens_of(net: Llava, pictures: list[tuple[torch.Tensor, tuple[int, int]]]) -> list[torch.Tensor]:
    config = net.config
    found: list[torch.Tensor] = []
    for pixels, size in pictures:
        grid = (
            tiles.tile_layout(size, config.tiles, config.vision.image_size, config.vision.patch)
            if config.tiles
            else None
        )
        image = net.encode_image(pixels[None]) if grid is None else net.encode_tiles(pixels[None], grid)
        found.append(image.tokens[0])
    return found


def material(net: Llava) -> tuple[list[tuple[torch.Tensor, tuple[int, int]]], list[list[int]]]:
    """Images of several sizes as pixels, and which of them three prompts show."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(20, 50), (31, 30), (90, 17)]
    config = net.config
    pictures: list[tuple[torch.Tensor, tuple[int, int]]] = []
    for size in sizes:
        count = 1
        if config.tiles:
            rows, columns, *_ = tiles.tile_layout(size, config.tiles, 14, config.vision.patch)
            count += rows * columns
        pictures.append((torch.randn(3, count * 14, 14, generator=generator), size))
    return pictures, [[0], [2, 1], []]


def prompts(counts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows: list[list[int]] = []
    for mine in counts:
        row = [1, *torch.randint(3, IMAGE, (4,), generator=generator).tolist()]
        for count in mine:
            row += [IMAGE] * count + torch.randint(3, IMAGE, (2,), generator=generator).tolist()
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])


@torch.inference_mode()
def test_it_reads_and_writes_as_the_reference(pair: tuple[Any, Llava, Path]) -> None:
    theirs, net, _ = pair
    pictures, shown = material(net)
    encoded = tokens_of(net, pictures)
    ids, real = prompts([[len(encoded[i]) for i in mine] for mine in shown])
    flat = [i for mine in shown for i in mine]
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": real.long()}
    if net.config.tiles:
        most = max(pixels.shape[1] for pixels, _ in pictures) // 14
        parts = [pictures[i][0].unflatten(1, (-1, 14)).transpose(0, 1) for i in flat]
        given["pixel_values"] = torch.stack(
            [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in parts]
        )
        given["image_sizes"] = torch.tensor([pictures[i][1] for i in flat])
    else:
        given["pixel_values"] = torch.stack([pictures[i][0] for i in flat])
    features = theirs.get_image_features(
        given["pixel_values"], **({"image_sizes": given["image_sizes"]} if net.config.tiles else {})
    ).pooler_output
    for place, i in enumerate(flat):
        assert (features[place] - encoded[i]).abs().max() <= 1e-5 * features[place].abs().max()
    begun = net.build_prefix(torch.cat([encoded[i] for i in flat]), ids, real)
    states = net.language.text.forward_embeddings(begun.tokens, valid_mask=real, causal=True)
    wanted = theirs(**given).logits
    assert (net.language.logits(states) - wanted)[real].abs().max() <= 1e-4
    for beams in (1, 3):
        text = theirs.generate(**given, num_beams=beams, do_sample=False, max_new_tokens=7, pad_token_id=0)
        options = Decoding(num_beams=beams, max_new_tokens=7)
        found = generate(net.language, begun, torch.zeros(3, 0, dtype=torch.long), options, end_id=2)
        for (row, _), expected in zip(found, text[:, ids.shape[1] :].tolist(), strict=True):
            assert row == (expected[: expected.index(2)] if 2 in expected else expected[: len(row)])
            assert len(row) == 7 or 2 in expected


@pytest.mark.parametrize("spelling", ["hub", "middle"])
def test_older_files_have_other_names(pair: tuple[Any, Llava, Path], spelling: str) -> None:
    _, net, folder = pair

    def rename(name: str) -> str:
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if spelling == "hub":
            return name
        if name.startswith("language_model.lm_head"):
            return name.removeprefix("language_model.")
        return "model." + name.replace("language_model.model.", "language_model.")

    again = ours(folder, rename)
    assert again.config == net.config
    for name, value in again.state_dict().items():
        assert torch.equal(value, net.state_dict()[name])


def test_the_config_survives(pair: tuple[Any, Llava, Path]) -> None:
    _, net, _ = pair
    ((data, _),) = llava.to_transformers(net.config).values()
    layers = data["vision_feature_layer"]
    assert all(layer < 0 for layer in (layers if isinstance(layers, list) else [layers]))
    again = llava.config_from_transformers(data)
    assert again == net.config
    assert FAMILIES["llava"].config is type(again)
