"""Checkpoints of Stable Diffusion 1, 2 and XL: folders of parts, as `diffusers` writes them (model_index.json)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from sightloop.checkpoints.clip import config_from_transformers
from sightloop.checkpoints.hf_config import transformers_block_keys
from sightloop.checkpoints.key_map import KeyMap, RenamedTensors, Rule, cat
from sightloop.checkpoints.layout import Family, Layout
from sightloop.errors import CheckpointError, UsageError
from sightloop.models.stable_diffusion import (
    NoiseSchedule,
    PromptEncoderConfig,
    StableDiffusion,
    StableDiffusionConfig,
)
from sightloop.towers.unet import AutoencoderConfig, UnetConfig
from sightloop.types import JsonDict, JsonMapping

# What a config may say: other values make another network. What is left out is the usual.
_UNET: JsonDict = {
    "act_fn": "silu",
    "addition_embed_type": (None, "text_time"),
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_AUTOENCODER: JsonDict = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
}
_SCHEDULER: JsonDict = {
    "algorithm_type": "dpmsolver++",
    "beta_schedule": ("linear", "scaled_linear"),
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "prediction_type": ("epsilon", "v_prediction"),
    "rescale_betas_zero_snr": False,
    "solver_order": 2,
    "solver_type": "midpoint",
    "thresholding": False,
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
}
_SAMPLERS = {
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpm",
}
_ATTENDS, _PLAIN = {"CrossAttnDownBlock2D", "CrossAttnUpBlock2D"}, {"DownBlock2D", "UpBlock2D"}


def _check(part: str, data: JsonMapping, usual: JsonMapping) -> None:
    """Raises CheckpointError for a setting that makes another network."""
    for name, allowed in usual.items():
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        if name in data and data[name] not in values:
            raise CheckpointError(
                f"{part}/config.json: {name}={data[name]!r} is not supported, only {' or '.join(map(repr, values))} "
                "is; take a checkpoint of Stable Diffusion 1, 2 or XL"
            )


def _per_level(value: object, levels: int) -> tuple[int, ...]:
    """One number a level, of a list or of one number for all."""
    values = cast("list[int]", list(value) if isinstance(value, list | tuple) else [value] * levels)
    if len(values) != levels:
        raise ValueError(f"{values} for {levels} levels")
    return tuple(values)


def _unet(data: JsonMapping, patch: int) -> UnetConfig:
    _check("unet", data, _UNET)
    dims = tuple(data["block_out_channels"])
    down = list(data["down_block_types"])
    up = [kind.replace("Up", "Down") for kind in reversed(list(data["up_block_types"]))]
    if down != up or not set(down) <= _ATTENDS | _PLAIN or len(down) != len(dims):
        raise CheckpointError(
            f"unet/config.json: down_block_types {down} and up_block_types are not supported"
        )
    if data.get("in_channels", 4) != data.get("out_channels", 4):
        raise CheckpointError(
            f"unet/config.json: in_channels={data['in_channels']}: it fills or edits images (inpainting); that is "
            "not supported. Take the checkpoint that draws from texts alone"
        )
    depths = _per_level(data.get("transformer_layers_per_block", 1), len(dims))
    is_added = data.get("addition_embed_type") is not None
    sizes = data["addition_time_embed_dim"] if is_added else 0
    return UnetConfig(
        image_size=data.get("sample_size", 64) * patch,
        patch=patch,
        channels=data.get("in_channels", 4),
        dims=dims,
        layers=data.get("layers_per_block", 2),
        depths=tuple(depth if kind in _ATTENDS else 0 for depth, kind in zip(depths, down, strict=True)),
        middle_depth=depths[-1],
        heads=_per_level(data.get("attention_head_dim", 8), len(dims)),
        memory_dim=data.get("cross_attention_dim", 1280),
        groups=data.get("norm_num_groups", 32),
        eps=data.get("norm_eps", 1e-5),
        sizes_dim=sizes,
        pooled_dim=data["projection_class_embeddings_input_dim"] - 6 * sizes if is_added else 0,
    )


def _autoencoder(data: JsonMapping) -> AutoencoderConfig:
    _check("vae", data, _AUTOENCODER)
    return AutoencoderConfig(
        dims=tuple(data["block_out_channels"]),
        layers=data.get("layers_per_block", 1),
        channels=data.get("latent_channels", 4),
        groups=data.get("norm_num_groups", 32),
        scale=data.get("scaling_factor", 0.18215),
        quantized=data.get("use_quant_conv", True),
        full_precision=data.get("force_upcast", True),
    )


def _encoder(data: JsonMapping, pad_id: int, *, is_xl: bool, pooled: bool) -> PromptEncoderConfig:
    clip = config_from_transformers({"text_config": data})
    return PromptEncoderConfig(
        text=clip.text,
        pad_id=pad_id,
        end_id=clip.end_id,
        end_is_largest_id=clip.end_is_largest_id,
        penultimate=is_xl,
        pooled_dim=data.get("projection_dim", 512) if pooled else 0,
    )


def _schedule(data: JsonMapping, *, is_xl: bool) -> NoiseSchedule:
    """The schedule; of Stable Diffusion 1 and 2 as `diffusers`' pipeline corrects it: offset 1, latents not clipped."""
    _check("scheduler", data, _SCHEDULER)
    name = data.get("_class_name")
    if name not in _SAMPLERS:
        warnings.warn(
            f"scheduler/scheduler_config.json: {name} is not known; images are drawn with the sampler euler",
            UserWarning,
            stacklevel=2,
        )
    if name == "PNDMScheduler" and not data.get("skip_prk_steps", False):
        raise CheckpointError(
            "scheduler/scheduler_config.json: skip_prk_steps=False: its Runge-Kutta steps are not supported; set it "
            "to true, as Stable Diffusion has it"
        )
    return NoiseSchedule(
        sampler=_SAMPLERS.get(str(name), "euler"),
        times=data.get("num_train_timesteps", 1000),
        beta_start=data.get("beta_start", 0.0001),
        beta_end=data.get("beta_end", 0.02),
        curve=data.get("beta_schedule", "linear"),
        prediction=data.get("prediction_type", "epsilon"),
        spacing=data.get("timestep_spacing"),
        offset=data.get("steps_offset", 0) if is_xl else 1,
        ends_clean=data.get("set_alpha_to_one"),
        clips=data.get("clip_sample") if is_xl else False,
    )


def config_from_parts(data: JsonMapping) -> StableDiffusionConfig:
    """From the configs of all parts by their names, and "pad_ids": the ids of the tokenizers' padding."""
    is_xl = data["_class_name"].startswith("StableDiffusionXL")
    pad_ids: JsonMapping = data["pad_ids"]
    autoencoder, schedule = _autoencoder(data["vae"]), _schedule(data["scheduler"], is_xl=is_xl)
    # Turbo has XL's network and is told apart by the times that it was trained at: the last of equal spans.
    is_turbo = schedule.spacing == "trailing"
    return StableDiffusionConfig(
        vision=_unet(data["unet"], 2 ** (len(autoencoder.dims) - 1)),
        autoencoder=autoencoder,
        encoder=_encoder(data["text_encoder"], pad_ids["tokenizer"], is_xl=is_xl, pooled=False),
        second=_encoder(data["text_encoder_2"], pad_ids["tokenizer_2"], is_xl=True, pooled=True)
        if is_xl
        else None,
        schedule=schedule,
        steps=1 if is_turbo else 50,
        guidance=1.0 if is_turbo else 5.0 if is_xl else 7.5,
        zero_empty=is_xl and data.get("force_zeros_for_empty_prompt", True),
    )


def _swapped(name: str) -> Rule:
    """The two halves of a gated layer, of which ours has the activated one first."""

    def swap(parts: list[Tensor]) -> Tensor:
        first, second = parts[0].chunk(2)
        return torch.cat([second, first])

    return Rule((name,), swap, lambda ours: [swap([ours])])


def _matrix(name: str) -> Rule:
    """A matrix, stored as such or as a 1 x 1 convolution."""
    return Rule((name,), lambda parts: parts[0].flatten(1), lambda ours: [ours])


def _residual_keys(ours: str, foreign: str) -> JsonDict:
    names = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
    parts = ("norm1", "conv1", "norm2", "conv2", *names)
    return {f"{ours}.{part}": f"{foreign}.{names.get(part, part)}" for part in parts}


def _transformer_keys(ours: str, foreign: str) -> JsonDict:
    block, other = f"{ours}.blocks.{{}}", f"{foreign}.transformer_blocks.{{}}"
    return {
        f"{ours}.norm": f"{foreign}.norm",
        f"{ours}.proj_in.weight": _matrix(f"{foreign}.proj_in.weight"),
        f"{ours}.proj_in.bias": f"{foreign}.proj_in.bias",
        f"{ours}.proj_out.weight": _matrix(f"{foreign}.proj_out.weight"),
        f"{ours}.proj_out.bias": f"{foreign}.proj_out.bias",
        f"{block}.norm1": f"{other}.norm1",
        f"{block}.attn.qkv": cat(*(f"{other}.attn1.to_{part}" for part in "qkv")),
        f"{block}.attn.out": f"{other}.attn1.to_out.0",
        f"{block}.norm_cross": f"{other}.norm2",
        f"{block}.cross.q": f"{other}.attn2.to_q",
        f"{block}.cross.kv": cat(*(f"{other}.attn2.to_{part}" for part in "kv")),
        f"{block}.cross.out": f"{other}.attn2.to_out.0",
        f"{block}.norm2": f"{other}.norm3",
        f"{block}.mlp.fc1": _swapped(f"{other}.ff.net.0.proj"),
        f"{block}.mlp.fc2": f"{other}.ff.net.2",
    }


def _unet_keys() -> JsonDict:
    keys: JsonDict = {
        "vision.conv_in": "unet.conv_in",
        "vision.time.fc1": "unet.time_embedding.linear_1",
        "vision.time.fc2": "unet.time_embedding.linear_2",
        "vision.added.fc1": "unet.add_embedding.linear_1",
        "vision.added.fc2": "unet.add_embedding.linear_2",
        "vision.down.{}.resample": "unet.down_blocks.{}.downsamplers.0.conv",
        "vision.up.{}.resample.conv": "unet.up_blocks.{}.upsamplers.0.conv",
        "vision.norm_out": "unet.conv_norm_out",
        "vision.conv_out": "unet.conv_out",
    }
    for ours, foreign in {
        "down.{}": "down_blocks.{}",
        "middle": "mid_block",
        "up.{}": "up_blocks.{}",
    }.items():
        ours, foreign = f"vision.{ours}", f"unet.{foreign}"
        keys |= _residual_keys(f"{ours}.resnets.{{}}", f"{foreign}.resnets.{{}}")
        keys |= _transformer_keys(f"{ours}.attentions.{{}}", f"{foreign}.attentions.{{}}")
    return keys


def _autoencoder_keys() -> JsonDict:
    keys: JsonDict = {
        "autoencoder.quant": "vae.quant_conv",
        "autoencoder.post_quant": "vae.post_quant_conv",
        "autoencoder.encoder.levels.{}.resample": "vae.encoder.down_blocks.{}.downsamplers.0.conv",
        "autoencoder.decoder.levels.{}.resample.conv": "vae.decoder.up_blocks.{}.upsamplers.0.conv",
    }
    for part, levels in {"encoder": "down_blocks", "decoder": "up_blocks"}.items():
        ours, foreign = f"autoencoder.{part}", f"vae.{part}"
        attention = f"{foreign}.mid_block.attentions.0"
        keys |= {
            f"{ours}.conv_in": f"{foreign}.conv_in",
            f"{ours}.norm": f"{attention}.group_norm",
            f"{ours}.attention.qkv": cat(*(f"{attention}.to_{part}" for part in "qkv")),
            f"{ours}.attention.out": f"{attention}.to_out.0",
            f"{ours}.norm_out": f"{foreign}.conv_norm_out",
            f"{ours}.conv_out": f"{foreign}.conv_out",
            **_residual_keys(f"{ours}.levels.{{}}.resnets.{{}}", f"{foreign}.{levels}.{{}}.resnets.{{}}"),
            **_residual_keys(f"{ours}.middle.resnets.{{}}", f"{foreign}.mid_block.resnets.{{}}"),
        }
    return keys


def _encoder_keys(ours: str, foreign: str) -> JsonDict:
    return {
        f"{ours}.text.word": f"{foreign}.embeddings.token_embedding",
        f"{ours}.text.position": f"{foreign}.embeddings.position_embedding",
        f"{ours}.text.norm": f"{foreign}.final_layer_norm",
        f"{ours}.projection": f"{foreign}.text_projection",
        **transformers_block_keys(f"{ours}.text", foreign),
    }


KEYS: KeyMap = {
    **_unet_keys(),
    **_autoencoder_keys(),
    **_encoder_keys("encoder", "text_encoder"),
    **_encoder_keys("second", "text_encoder_2"),
}

# Names of the autoencoder's attention in files from before 2023.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def one_spelling(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The names of the autoencoder's attention as they are today, and those of the text encoders without a wrapper."""

    def renamed(name: str) -> str:
        if name.startswith("text_encoder"):
            return name.replace(".text_model.", ".", 1)
        stem, _, suffix = name.rpartition(".")
        head, _, part = stem.rpartition(".")
        is_old = head.endswith("mid_block.attentions.0") and part in _OLD_NAMES
        return f"{head}.{_OLD_NAMES[part]}.{suffix}" if is_old else name

    return RenamedTensors(tensors, {renamed(name): name for name in tensors})


def to_transformers(config: StableDiffusionConfig) -> dict[str, tuple[JsonDict, tuple[str, ...]]]:
    """Raises UsageError: there is one layout, that of the folder it was loaded from."""
    raise UsageError("save: Stable Diffusion is not written again; copy the folder that it was loaded from")


def default_image(config: StableDiffusionConfig) -> JsonDict:
    """Squares, pixels from -1 to 1."""
    side, half = config.vision.image_size, [0.5] * 3
    return {
        "size": {"height": side, "width": side},
        "do_center_crop": False,
        "resample": 1,  # Lanczos, as `diffusers` resizes an image to start from
        "image_mean": half,
        "image_std": half,
    }


FAMILY = Family(
    name="stable_diffusion",
    network=StableDiffusion,
    config=StableDiffusionConfig,
    layouts={
        "diffusers": Layout(
            keys=KEYS,
            ignored=(r"\.position_ids$",),
            prepare=one_spelling,
            markers=("unet.conv_in.weight", "vae.decoder.conv_in.weight"),
            configure=lambda data, _: config_from_parts(data),
        ),
    },
    tokenizer="clip",
    image_processor="CLIPImageProcessor",
    to_transformers=to_transformers,
    default_image=default_image,
)
