"""CLIP's ResNets: the network against its definition written out in functions, and its two layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import sightloop
from sightloop.checkpoints.clip import config_from_open_clip
from sightloop.checkpoints.clip_resnet import KEYS as RESNET_KEYS
from sightloop.checkpoints.key_map import export_state_dict
from sightloop.checkpoints.registry import FAMILIES
from sightloop.data.images.preprocess import normalize
from sightloop.errors import CheckpointError, UnsupportedError
from tests.checkpoints.test_against_reference import TEXTS, pictures
from tests.tiny_checkpoints.clip_and_blip import clip_tokenizer

SHAPES: list[dict[str, Any]] = [
    {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64, "head_width": 64},
    {"layers": [2, 1, 3, 1], "width": 16, "image_size": 96, "head_width": 32},
]


def config_of(shape: dict[str, Any], vocab: int, quick: bool = True) -> dict[str, Any]:
    text = {"context_length": 40, "vocab_size": vocab, "width": 64, "heads": 1, "layers": 2}
    return {"embed_dim": 24, "quick_gelu": quick, "vision_cfg": shape, "text_cfg": text}


def write(folder: Path, shape: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """A random checkpoint in open_clip's layout; the norms' statistics are random as well."""
    tokenizer = clip_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    config = config_of(shape, len(tokenizer))
    network = FAMILIES["clip_resnet"].network(config_from_open_clip(config, {}))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            scale = 1.6 / tensor[0].numel() ** 0.5 if tensor.dim() > 1 else 0.05
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
        if ".norm." in name and name.endswith(("weight", "running_var")):
            tensor.abs_().add_(0.7)
    tensors = export_state_dict(network, RESNET_KEYS)
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return tensors


def picture_embeddings(x: Tensor, t: Mapping[str, Tensor], shape: dict[str, Any]) -> Tensor:
    """Radford et al. 2021, released code, by the names of its state dict."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            t[f"visual.{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)

    def conv(x: Tensor, name: str, **how: int) -> Tensor:
        return F.conv2d(x, t[f"visual.{name}.weight"], **how)

    for i in (1, 2, 3):
        x = F.relu(norm(conv(x, f"conv{i}", padding=1, stride=2 if i == 1 else 1), f"bn{i}"))
    x = F.avg_pool2d(x, 2)
    for stage, blocks in enumerate(shape["layers"], 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            shrink = 2 if stage > 1 and block == 0 else 1
            y = F.relu(norm(conv(x, f"{at}.conv1"), f"{at}.bn1"))
            y = F.relu(norm(conv(y, f"{at}.conv2", padding=1), f"{at}.bn2"))
            y = norm(conv(F.avg_pool2d(y, shrink), f"{at}.conv3"), f"{at}.bn3")
            if block == 0:
                x = norm(conv(F.avg_pool2d(x, shrink), f"{at}.downsample.0"), f"{at}.downsample.1")
            x = F.relu(x + y)
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(0, keepdim=True), x]) + t["visual.attnpool.positional_embedding"][:, None]
    q, k, v, c = (
        (t[f"visual.attnpool.{p}_proj.weight"], t[f"visual.attnpool.{p}_proj.bias"]) for p in "qkvc"
    )
    out, _ = F.multi_head_attention_forward(
        x[:1], x, x, x.shape[-1], x.shape[-1] // shape["head_width"], None, torch.cat([q[1], k[1], v[1]]),
        None, None, False, 0.0, c[0], c[1], training=False, need_weights=False,
        use_separate_proj_weight=True, q_proj_weight=q[0], k_proj_weight=k[0], v_proj_weight=v[0],
    )  # fmt: skip
    return F.normalize(out[0], dim=-1)


@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_as_defined(tmp_path: Path, shape: int) -> None:
    tensors = write(tmp_path / "rn", SHAPES[shape], seed=shape)
    model = sightloop.load(tmp_path / "rn", device="cpu")
    images = pictures(5, seed=shape)
    pixels = normalize(list(model.read(images, isolate=False)), model.image_spec)  # pyright: ignore
    with torch.inference_mode():
        wanted = picture_embeddings(pixels, tensors, SHAPES[shape])
    found = model.embed_images(images)
    assert np.abs(found - wanted.numpy()).max() < 1e-5
    assert np.abs(found[:1] - found[1:]).max() > 1e-2  # the images do matter
    assert np.allclose(model.classify(images, TEXTS).sum(axis=1), 1)
    assert np.abs(model.embed_images(images[3]) - found[3]).max() < 1e-5


def test_saved_and_read_back(tmp_path: Path) -> None:
    write(tmp_path / "rn", SHAPES[1], seed=5)
    model = sightloop.load(tmp_path / "rn", device="cpu")
    images = pictures(3)
    model.save(tmp_path / "ours")
    again = sightloop.load(tmp_path / "ours", device="cpu")
    assert again.network.config == model.network.config
    assert np.array_equal(again.embed_images(images), model.embed_images(images))
    assert np.array_equal(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
    with pytest.raises(UnsupportedError, match="ResNet"):
        model.save(tmp_path / "theirs", layout="transformers")


def test_shape_from_a_bare_state_dict(tmp_path: Path) -> None:
    """OpenAI's files have no config: all sizes are in the tensors (heads are 64 wide)."""
    tensors = write(tmp_path / "rn", SHAPES[0], seed=2)
    bare = tmp_path / "bare"
    bare.mkdir()
    clip_tokenizer(bare).save_pretrained(bare)
    torch.save(tensors, bare / "RN.pt")
    one, other = (sightloop.load(folder, device="cpu") for folder in (tmp_path / "rn", bare))
    ours, theirs = one.network.config, other.network.config
    assert (ours.vision, ours.text, ours.embed_dim) == (theirs.vision, theirs.text, theirs.embed_dim)
    assert np.array_equal(one.embed_images(pictures(2)), other.embed_images(pictures(2)))


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        ("text_cfg", {"pool_type": "eos", "eos_id": 2}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}),
        ("text_cfg", {"norm_kwargs": {"eps": 1e-6}}),
        ("text_cfg", {"hf_tokenizer_name": "facebook/xlm-v-base"}),
        ("vision_cfg", {"final_ln_after_pool": True}),
    ],
)
def test_other_models_of_open_clip_are_refused(part: str, setting: dict[str, Any]) -> None:
    config = config_of(SHAPES[0], 90)
    usual = {"pool_type": "tok", "attentional_pool": False, "ls_init_value": None, "patch_dropout": 0.5}
    config["vision_cfg"] = {**config["vision_cfg"], **usual}
    config_from_open_clip(config, {})
    config[part] = {**config[part], **setting}
    with pytest.raises(CheckpointError, match=next(iter(setting))):
        config_from_open_clip(config, {})
