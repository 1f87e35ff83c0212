"""Drawing against `diffusers`' own pipeline, at the size of Stable Diffusion 1.5: `python -m benchmarks.draw`.

A folder with random float32 weights is written once (4.3 GB). Each run is a process of its own that loads it and
draws one image; the sides take turns, and start from the same noise. Seconds are those of drawing alone: the prompt,
all steps with guidance, the autoencoder. Processor seconds are printed beside those of the clock, so that other work on
the machine shows; the ratio of either is that of the best runs. Memory is the greatest of the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, SEED = "a photo of a cat and the dog", 0
SIDES = ("sightloop", "diffusers")


def write_folder(folder: Path) -> None:
    """Stable Diffusion 1.5's architecture with random weights, as `diffusers` writes it."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    from tests.tiny_checkpoints.clip_and_blip import clip_tokenizer
    from tests.tiny_checkpoints.stable_diffusion import BETAS

    def filled(module: Any) -> Any:
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, parameter[0].numel() ** -0.5)
        return module

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(folder)
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=512,
    )
    pipeline = StableDiffusionPipeline(
        unet=filled(UNet2DConditionModel(sample_size=64, cross_attention_dim=768)),
        vae=filled(vae),
        text_encoder=filled(CLIPTextModel(text)),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**BETAS, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def draw(side: str, folder: str, size: int, steps: int) -> np.ndarray:
    """One image, uint8 `[H, W, 3]`; prints seconds by the clock and of all cores."""
    if side == "sightloop":
        import sightloop

        model = sightloop.load(folder, device="cpu")
        start = time.perf_counter(), time.process_time()
        image = model.draw(PROMPT, seed=SEED, size=size, steps=steps)[0]
    else:
        import torch
        from diffusers import StableDiffusionPipeline

        from sightloop.inference.drawing import image_seed

        pipeline = StableDiffusionPipeline.from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(image_seed(SEED, PROMPT, 0))
        start = time.perf_counter(), time.process_time()
        image = pipeline(
            PROMPT, height=size, width=size, num_inference_steps=steps, generator=[generator]
        ).images[0]
    print(json.dumps([time.perf_counter() - start[0], time.process_time() - start[1]]))
    return np.asarray(image)


def child(side: str, folder: str, size: int, steps: int, threads: int) -> None:
    """One run of a side; prints its figures and writes its image."""
    import torch

    torch.set_num_threads(threads)
    image = draw(side, folder, size, steps)
    np.save(Path(folder, f"{side}.npy"), image)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-f", "--folder", default=str(Path(tempfile.gettempdir(), "random-sd15")))
    parser.add_argument("--size", type=int, default=512, help="pixels a side (512)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.side:
        child(options.side, options.folder, options.size, options.steps, options.threads)
        return
    if not Path(options.folder, "model_index.json").exists():
        write_folder(Path(options.folder))
    figures: dict[str, list[tuple[float, float, int]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            own = [f"--{name}={getattr(options, name)}" for name in ("folder", "size", "steps", "threads")]
            command = [sys.executable, "-m", "benchmarks.draw", f"--side={side}", *own]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            clock, cores = json.loads(lines[-2])
            figures[side].append((clock, cores, int(lines[-1])))
            print(f"  {side:<10} {clock:8.1f} s  {cores:8.1f} processor s  {lines[-1]:>6} MB", flush=True)
    best = {side: [min(column) for column in zip(*rows, strict=True)] for side, rows in figures.items()}
    ours, theirs = (best[side] for side in SIDES)
    images = [np.load(Path(options.folder, f"{side}.npy")).astype(int) for side in SIDES]
    print(
        f"{options.size} px, {options.steps} steps, float32, {options.threads} threads, best of {options.rounds}"
    )
    print(
        f"  times as fast           {theirs[0] / ours[0]:6.2f}  by processor seconds {theirs[1] / ours[1]:6.2f}"
    )
    print(f"  memory, share of theirs {ours[2] / theirs[2]:6.2f}")
    print(f"  greatest difference     {np.abs(images[0] - images[1]).max():6d}  of 255, in any pixel")


if __name__ == "__main__":
    main()
