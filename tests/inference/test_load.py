"""Loading and saving: every layout, strictly, and back again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

import sightloop
from sightloop.checkpoints import hub
from sightloop.checkpoints.catalog import CATALOG
from sightloop.checkpoints.key_map import native_state_dict
from sightloop.nn.prepack import unpack
from tests.checkpoints.test_against_reference import TEXTS, pictures, reference_inputs
from tests.tiny_checkpoints.clip_and_blip import BLIP_HEADS, write_blip, write_clip


def write(folder: Path, kind: str) -> Any:
    return write_clip(folder) if kind == "clip" else write_blip(folder, head=kind)


@pytest.mark.parametrize("kind", ["clip", *BLIP_HEADS])
def test_round_trips(tmp_path: Path, kind: str) -> None:
    reference = write(tmp_path / "hub", kind)
    model = sightloop.load(tmp_path / "hub", device="cpu")
    images = pictures(3)
    before = model.embed_images(images) if "embed" in model.capabilities else None

    model.save(tmp_path / "own")
    again = sightloop.load(tmp_path / "own", device="cpu")
    unpack(model.network)
    unpack(again.network)
    first, second = native_state_dict(model.network), native_state_dict(again.network)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.image_spec == model.image_spec
    assert again.capabilities == model.capabilities
    assert again.tokenizer.encode(TEXTS).ids.tolist() == model.tokenizer.encode(TEXTS).ids.tolist()

    model.save(tmp_path / "back", layout="transformers")
    for file in (tmp_path / name / "model.safetensors" for name in ("own", "back")):
        assert file.read_bytes() == save(
            load_file(file), {"format": "pt"}
        )  # as the library writes what has its own memory
    back = type(reference).from_pretrained(tmp_path / "back")
    ours, theirs = back.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if before is not None:
        assert np.array_equal(model.embed_images(images), before)  # saving leaves the model as it was


def test_the_bundled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hub.BUNDLED_FOLDER.is_dir():
        pytest.skip("this source tree has no bundled model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = sightloop.load(device="cpu")
    assert (model.name, model.family) == ("nano", "blip")
    assert "\n" not in repr(model)  # a line, not the network
    assert model.capabilities == set(CATALOG[0].capabilities)
    images = pictures(2)
    assert all(model.caption(images))
    assert model.match(images, ["a dog", "a man"]).shape == (2,)
    assert model.answer(images, "what is it?") == sightloop.load("nano", device="cpu").answer(
        images, "what is it?"
    )
    size = sum(path.stat().st_size for path in hub.BUNDLED_FOLDER.iterdir())
    assert size <= 24e6


def test_processors_saved_as_one_file(tmp_path: Path) -> None:
    """As the processors of transformers 5 save themselves; what they say is checked against the model."""
    reference = write_blip(tmp_path / "hub", vision={"image_size": 40})
    single = tmp_path / "hub" / "preprocessor_config.json"
    settings = json.loads(single.read_text())
    single.unlink()
    both = tmp_path / "hub" / "processor_config.json"
    both.write_text(json.dumps({"image_processor": {**settings, "image_mean": [0.1, 0.2, 0.3]}}))
    model = sightloop.load(tmp_path / "hub", device="cpu")
    assert model.image_spec.mean == (0.1, 0.2, 0.3)
    assert model.image_spec.resize == (40, 40)
    assert reference.config.vision_config.image_size == 40
    both.write_text(json.dumps({"image_processor": {**settings, "size": {"height": 48, "width": 48}}}))
    with pytest.raises(sightloop.CheckpointError, match="40 x 40"):
        sightloop.load(tmp_path / "hub", device="cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_words_tied_or_not(tmp_path: Path, tied: bool) -> None:
    reference = write_blip(tmp_path / "hub", tie_word_embeddings=tied)
    model = sightloop.load(tmp_path / "hub", device="cpu")
    assert model.network.config.tied_words is tied
    images = pictures(3)
    ids = reference.generate(**reference_inputs(reference, images, ["a"] * 3), max_new_tokens=9)
    wanted = [text.strip() for text in reference.reference_tokenizer.batch_decode(ids, True)]
    assert model.caption(images, "a", max_new_tokens=9) == wanted
    model.save(tmp_path / "back", layout="transformers")
    back = type(reference).from_pretrained(tmp_path / "back")
    unread = (
        "text_decoder.cls.predictions.bias"  # where words are untied, the reference reads decoder.bias alone
    )
    assert all(torch.equal(back.state_dict()[k], v) for k, v in reference.state_dict().items() if k != unread)


def test_save_never_overwrites(tmp_path: Path) -> None:
    write_clip(tmp_path / "hub")
    model = sightloop.load(tmp_path / "hub", device="cpu")
    (tmp_path / "own").mkdir()
    model.save(tmp_path / "own")
    with pytest.raises(sightloop.UsageError, match="is there already"):
        model.save(tmp_path / "own")
    with pytest.raises(sightloop.UsageError, match="layout"):
        model.save(tmp_path / "other", layout="onnx")  # pyright: ignore[reportArgumentType]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "own"]


def test_open_clip_layout(tmp_path: Path) -> None:
    shape = {
        "vision": {
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
        }
    }
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 1, "hidden_act": "gelu"}
    reference = write_clip(tmp_path / "hub", **shape, text=text, projection_dim=24)
    folder = tmp_path / "open_clip"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "hub" / name, folder)
    tensors = _as_open_clip(reference.state_dict())
    save_file(tensors, folder / "open_clip_model.safetensors")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8},
        "text_cfg": {
            "context_length": 77,
            "vocab_size": reference.config.text_config.vocab_size,
            "width": 64,
            "heads": 1,
            "layers": 2,
        },
    }
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}})
    )
    images = pictures(3)
    with torch.inference_mode():
        wanted = reference(**reference_inputs(reference, images, TEXTS))
    model = sightloop.load(folder, device="cpu")
    assert np.abs(model.embed_images(images) - wanted.image_embeds.numpy()).max() < 1e-5
    assert np.abs(model.embed_texts(TEXTS) - wanted.text_embeds.numpy()).max() < 1e-5

    # The same tensors as some open_clip models nest them, and as a bare file of OpenAI's code (QuickGELU there).
    nested = {k if k.startswith(("visual", "logit")) else f"text.{k}": v for k, v in tensors.items()}
    save_file(nested, folder / "open_clip_model.safetensors")
    assert (
        np.abs(sightloop.load(folder, device="cpu").embed_texts(TEXTS) - wanted.text_embeds.numpy()).max()
        < 1e-5
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "hub" / name, bare)
    torch.save(tensors | {"input_resolution": torch.tensor(32)}, bare / "ViT.pt")
    openai = sightloop.load(bare / "ViT.pt", device="cpu")
    assert openai.network.config.vision.activation == "quick_gelu"
    assert openai.network.config.vision.image_size == 32
    assert openai.embed_texts(TEXTS).shape == (5, 24)


def _as_open_clip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP of `transformers` under open_clip's names."""
    names = [
        ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
        ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
        ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
        ("vision_model.pre_layrnorm.", "visual.ln_pre."),
        ("vision_model.post_layernorm.", "visual.ln_post."),
        ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
        ("text_model.encoder.layers.", "transformer.resblocks."),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm.", "ln_final."),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.out_proj", "attn.out_proj"),
    ]
    out: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        for old, new in names:
            key = key.replace(old, new)
        if "k_proj" in key or "v_proj" in key:
            continue
        if "q_proj" in key:
            layer = [tensors[_theirs(key, part)] for part in ("q_proj", "k_proj", "v_proj")]
            out[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(layer)
        elif key == "visual_projection.weight":
            out["visual.proj"] = value.t().contiguous()
        elif key == "text_projection.weight":
            out["text_projection"] = value.t().contiguous()
        else:
            out[key] = value.clone()
    return out


def _theirs(key: str, part: str) -> str:
    tower = "vision_model" if key.startswith("visual") else "text_model"
    layer, name = key.split("resblocks.")[1].split(".", 1)
    return f"{tower}.encoder.layers.{layer}.{name.replace('q_proj', part)}"


def _as_original_blip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A BLIP of `transformers` under the names of the original repository."""
    names = [
        ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
        ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
        ("vision_model.embeddings.patch_embedding.", "visual_encoder.patch_embed.proj."),
        ("vision_model.post_layernorm.", "visual_encoder.norm."),
        ("vision_model.encoder.layers.", "visual_encoder.blocks."),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
        ("layer_norm", "norm"),
    ]
    out = {}
    for key, value in tensors.items():
        for old, new in names:
            key = key.replace(old, new)
        out[key] = value.clone()
    return out


def test_original_blip_with_all_heads(tmp_path: Path) -> None:
    """A pre-training checkpoint: all heads, shared text layers, a momentum teacher and queues beside them."""
    vision = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, "layer_norm_eps": 1e-6}
    text = {"hidden_size": 64, "num_attention_heads": 1}
    judge = write_blip(tmp_path / "match", head="match", vision=vision, text=text)
    writer = write_blip(tmp_path / "caption", head="caption", seed=7, vision=vision, text=text)
    tensors = _as_original_blip(judge.state_dict())
    decoder = {k: v for k, v in writer.state_dict().items() if k.startswith("text_decoder.")}
    for name, value in list(decoder.items()):  # tie the decoder to the encoder, all but self-attention
        other = name.replace("text_decoder.bert.", "text_encoder.")
        if ".attention." not in name and other in tensors:
            value = tensors[other]
        decoder[name] = value.clone()
    decoder["text_decoder.cls.predictions.decoder.weight"] = tensors[
        "text_encoder.embeddings.word_embeddings.weight"
    ]
    tensors |= decoder
    extra = {"temp": torch.tensor(0.07), "image_queue": torch.zeros(16, 8), "queue_ptr": torch.zeros(1)}
    extra |= {
        k.replace("visual_encoder.", "visual_encoder_m.", 1): v for k, v in tensors.items() if "visual" in k
    }
    extra["text_encoder.embeddings.position_ids"] = torch.arange(64)[None]
    folder = tmp_path / "original"
    folder.mkdir()
    shutil.copy(tmp_path / "match" / "tokenizer.json", folder)
    shutil.copy(tmp_path / "match" / "tokenizer_config.json", folder)
    torch.save({"model": tensors | extra, "epoch": 3}, folder / "model_base.pth")

    model = sightloop.load(folder / "model_base.pth", device="cpu")
    assert model.capabilities >= {"embed", "similarity", "classify", "match", "rank", "caption"}
    network = model.network
    assert network.config.shared
    assert network.decoder.text.blocks[0].mlp is network.encoder.blocks[0].mlp
    assert network.decoder.text.blocks[0].attn is not network.encoder.blocks[0].attn
    images = pictures(5)
    inputs = reference_inputs(judge, images, TEXTS)
    with torch.inference_mode():
        similarity = judge(**inputs, use_itm_head=False).itm_score
        inputs["input_ids"][:, 0] = network.config.encoder_start  # [ENC], as the original code has it
        wanted = judge(**inputs).itm_score.softmax(dim=-1)[:, 1].numpy()
    assert np.abs(model.match(images, TEXTS) - wanted).max() < 1e-5
    assert np.abs(model.similarity(images, TEXTS) - similarity.numpy()).max() < 1e-5
    classes = (similarity / 0.07).softmax(dim=-1).numpy()
    assert np.abs(model.classify(images, TEXTS, "{}") - classes).max() < 1e-5

    # No one model of `transformers` holds all heads: two folders, each of which it loads.
    model.save(tmp_path / "back", layout="transformers")
    again = BLIP_HEADS["match"].from_pretrained(tmp_path / "back" / "retrieval")
    with torch.inference_mode():
        assert torch.allclose(again(**inputs).itm_score, judge(**inputs).itm_score, atol=1e-6)
    captions = sightloop.load(tmp_path / "back" / "captioning", device="cpu").caption(images)
    assert model.caption(images) == captions
    model.save(tmp_path / "own")
    assert sightloop.load(tmp_path / "own", device="cpu").caption(images) == captions
    assert len(load_file(tmp_path / "own" / "model.safetensors")) == len(native_state_dict(network))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_blip(tmp_path / "hub")
    path = tmp_path / "hub" / "model.safetensors"
    tensors = load_file(path)
    dropped = "vision_model.encoder.layers.1.mlp.fc1.weight"
    cut = "text_decoder.bert.encoder.layer.0.attention.self.key.weight"
    broken = {name: value for name, value in tensors.items() if name != dropped}
    broken[cut] = broken[cut][:-1].contiguous()
    broken["something.else"] = torch.zeros(1)
    save_file(broken, path)
    with pytest.raises(sightloop.CheckpointError) as caught:
        sightloop.load(tmp_path / "hub", device="cpu")
    for name in (dropped, cut, "something.else"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.lit.model.", "_orig_mod.module.clip."]
)
@pytest.mark.parametrize("suffix", ["bin", "pth", "ckpt", "safetensors"])
def test_names_of_modules_around_the_network(tmp_path: Path, prefix: str, suffix: str) -> None:
    """Compiled, data-parallel, in a LightningModule: the same weights give the same vectors."""
    write_clip(tmp_path / "clip")
    expected = sightloop.load(tmp_path / "clip", device="cpu").embed_texts(TEXTS)
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    (tmp_path / "clip" / "model.safetensors").unlink()
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    path = tmp_path / "clip" / f"pytorch_model.{suffix}"
    save_file(wrapped, path) if suffix == "safetensors" else torch.save(
        {"state_dict": wrapped, "epoch": 3}, path
    )
    assert np.array_equal(sightloop.load(tmp_path / "clip", device="cpu").embed_texts(TEXTS), expected)


def test_the_original_layout_of_llava_names_the_one_to_load(tmp_path: Path) -> None:
    names = ("model.mm_projector.0.weight", "model.embed_tokens.weight", "lm_head.weight")
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(
        sightloop.CheckpointError, match=r"LLaVA in the layout of its original code.*llava-hf/"
    ):
        sightloop.load(tmp_path, device="cpu")


def test_what_is_no_known_checkpoint_is_told(tmp_path: Path) -> None:
    write_clip(tmp_path / "hub")
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "hub" / "model.safetensors")
    with pytest.raises(sightloop.CheckpointError, match=r"some\.weight"):
        sightloop.load(tmp_path / "hub", device="cpu")
    with pytest.raises(sightloop.CheckpointError, match="nowhere"):
        sightloop.load(tmp_path / "nowhere")


def test_a_config_that_contradicts_the_weights_is_told(tmp_path: Path) -> None:
    write_clip(tmp_path / "hub")
    path = tmp_path / "hub" / "config.json"
    config = json.loads(path.read_text())
    for change in (
        {"hidden_size": 64},
        {"num_attention_heads": 0},
        {"hidden_act": "gelu_of_nobody"},
        {"num_hidden_layers": 10**12},  # refused before any is made
        {"num_hidden_layers": "12"},
        {"patch_size": 0},
        {"image_size": 10**9},
    ):
        changed = {**config, "vision_config": {**config["vision_config"], **change}}
        path.write_text(json.dumps(changed))
        with pytest.raises(sightloop.CheckpointError):
            sightloop.load(tmp_path / "hub", device="cpu")


@pytest.mark.parametrize("change", [{"config": "x"}, {"config": []}, {"image": 3}, {"family": ["clip"]}])
def test_an_own_config_that_is_none_is_told(tmp_path: Path, change: dict[str, Any]) -> None:
    write_clip(tmp_path / "hub")
    sightloop.load(tmp_path / "hub", device="cpu").save(tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(sightloop.CheckpointError, match=r"config\.json is not one that this version wrote"):
        sightloop.load(tmp_path / "own", device="cpu")
