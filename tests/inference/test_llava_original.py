"""LLaVA in the layout of its original code: the same answers as the same weights in the hub's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sightloop import load
from sightloop.checkpoints import llava_original
from sightloop.errors import CheckpointError
from tests.tiny_checkpoints.llava import LLAVA_15, LLAVA_16_MISTRAL, as_original, write_llava

KINDS: dict[str, dict[str, Any]] = {
    "1.5": {"tiled": False, "template": LLAVA_15},
    "1.6, mistral": {"tiled": True, "template": LLAVA_16_MISTRAL, "mistral": True, "kv": 2},
}


@pytest.fixture(params=KINDS, scope="module")
def folders(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, bool]:
    folder, kind = tmp_path_factory.mktemp("llava"), KINDS[request.param]
    write_llava(folder / "hub", **kind)
    path = folder / "hub" / "model.safetensors"
    tensors = load_file(path)
    tensors["language_model.lm_head.weight"][-2:] = 0  # so that neither model writes <image> or <pad>
    save_file(tensors, path, metadata={"format": "pt"})
    as_original(folder / "hub", folder / "original", tiled=kind["tiled"])
    return folder / "hub", folder / "original", kind["tiled"]


def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(20, 50), (33, 31), (90, 17)]
    return [Image.fromarray(generator.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def test_the_same_answers(folders: tuple[Path, Path, bool]) -> None:
    hub, original, tiled = folders
    first, second = load(hub, device="cpu"), load(original, device="cpu")
    pixels = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    towers: list[Any] = [first.network, second.network]
    with torch.inference_mode():
        tokens, others = (tower.encode_image(pixels).tokens for tower in towers)
    assert torch.equal(tokens, others)
    assert first.image_spec.tiles == second.image_spec.tiles
    assert towers[1].config.chat_template == ("mistral" if tiled else "vicuna")
    questions = ["a dog on the grass?", "what?", "zebra"]
    assert first.answer(images(), questions, max_new_tokens=8) == second.answer(
        images(), questions, max_new_tokens=8
    )
    assert first.caption(images(), max_new_tokens=8) == second.caption(images(), max_new_tokens=8)


def test_images_are_padded_where_the_config_says_so(folders: tuple[Path, Path, bool], tmp_path: Path) -> None:
    if folders[2]:
        pytest.skip("1.6 cuts tiles")
    shutil.copytree(folders[1].parent, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "original" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"image_aspect_ratio": "pad"}))
    assert load(tmp_path / "original", device="cpu").image_spec.square == (122, 116, 104)


def test_an_image_tower_that_is_not_there(
    folders: tuple[Path, Path, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object) -> None:
        raise CheckpointError(f"{source}: cannot be reached")

    monkeypatch.setattr(llava_original, "locate", refuse)
    shutil.copytree(folders[1], tmp_path / "original")
    with pytest.raises(
        CheckpointError, match=r"someone/tiny-tower.*put that checkpoint's folder beside it"
    ) as caught:
        load(tmp_path / "original")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mm_projector_type", "linear"), ("mm_use_im_start_end", True), ("mm_resampler_type", "qformer"),
     ("mm_vision_select_feature", 3), ("mm_projector_type", ["x"]), ("mm_vision_select_layer", "x")],
)  # fmt: skip
def test_other_projectors_are_refused(
    folders: tuple[Path, Path, bool], name: str, value: object, tmp_path: Path
) -> None:
    shutil.copytree(folders[1].parent, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "original" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    with pytest.raises(CheckpointError):
        load(tmp_path / "original")
