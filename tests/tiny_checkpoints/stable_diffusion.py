"""Tiny random Stable Diffusion folders, written by `diffusers` and `transformers`: the reference of the tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from tests.tiny_checkpoints.clip_and_blip import clip_tokenizer

from diffusers import (  # isort: skip (after the environment that clip_and_blip sets)
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

SCHEDULERS: dict[str, type[Any]] = {
    "pndm": PNDMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# As the official checkpoints of each kind have it.
KINDS: dict[str, dict[str, Any]] = {
    "1": {
        "scheduler": ("pndm", {**BETAS, "skip_prk_steps": True, "set_alpha_to_one": False}),
        "unet": {"attention_head_dim": 2},
    },
    "2": {
        "scheduler": (
            "ddim",
            {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
        ),
        "unet": {"attention_head_dim": [2, 4], "use_linear_projection": True},
        "text": {"hidden_act": "gelu"},
        "pad": "!",
    },
    "xl": {
        "scheduler": ("euler", {**BETAS, "timestep_spacing": "leading"}),
        "unet": {
            "attention_head_dim": [2, 4],
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2],
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
            "cross_attention_dim": 32 + 40,
        },
        "vae": {"scaling_factor": 0.13025},
    },
    "turbo": {"scheduler": ("euler_ancestral", {**BETAS, "timestep_spacing": "trailing"})},
}
KINDS["turbo"] = {**KINDS["xl"], **KINDS["turbo"]}


def _larger(module: torch.nn.Module) -> torch.nn.Module:
    """Weights with which no step is lost in rounding: random norms and biases too."""
    for parameter in module.parameters():
        scale = 0.2 if parameter.ndim == 1 else 1.2 * parameter[0].numel() ** -0.5
        parameter.data = torch.randn_like(parameter) * scale + (parameter.data if parameter.ndim == 1 else 0)
    return module.eval()


def _text(tokenizer: Any, dim: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )


def write_stable_diffusion(folder: Path, kind: str = "1", *, seed: int = 0, **saving: Any) -> Any:
    """Writes a tiny pipeline of a kind ("1", "2", "xl", "turbo") and returns it; `saving`: of `save_pretrained`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of `diffusers`, about NumPy 2
        return _write(folder, kind, seed, saving)


def _write(folder: Path, kind: str, seed: int, saving: dict[str, Any]) -> Any:
    torch.manual_seed(seed)
    shape = KINDS[kind]
    tokenizer = clip_tokenizer(folder)
    second = clip_tokenizer(folder)
    if "pad" in shape:
        tokenizer.pad_token = shape["pad"]
    second.pad_token = "!"
    tokenizer.model_max_length = second.model_max_length = 77
    unet: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        **shape["unet"],
    }
    vae: dict[str, Any] = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 8,
        **shape.get("vae", {}),
    }
    name, options = shape["scheduler"]
    parts: dict[str, Any] = {
        "unet": _larger(UNet2DConditionModel(**unet)),
        "vae": _larger(AutoencoderKL(**vae)),
        "scheduler": SCHEDULERS[name](**options),
        "tokenizer": tokenizer,
        "text_encoder": _larger(CLIPTextModel(_text(tokenizer, 32, **shape.get("text", {})))),
    }
    if kind in ("xl", "turbo"):
        last = _text(tokenizer, 40, hidden_act="gelu", projection_dim=24)
        parts |= {"tokenizer_2": second, "text_encoder_2": _larger(CLIPTextModelWithProjection(last))}
        pipeline: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.save_pretrained(folder, **saving)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
