"""Stable Diffusion 1, 2, XL and Turbo against `diffusers`: same weights, prompts and noise give the same latents."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sightloop
from sightloop.checkpoints.hub import locate
from sightloop.checkpoints.pipeline_files import files_to_fetch
from sightloop.errors import CheckpointError, UsageError
from sightloop.inference.drawing import image_seed
from sightloop.inference.model import Model
from sightloop.models.stable_diffusion import StableDiffusion
from tests.tiny_checkpoints.stable_diffusion import KINDS, SCHEDULERS, write_stable_diffusion

pytestmark = [  # of the reference, about NumPy and about its own configs
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning"),
]
PROMPTS = ["a cat and the dog", "the", "a dog, " * 9]
SIZE = (64, 32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A kind's folder and the pipeline that wrote it, made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def of(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("sd") / kind
            made[kind] = folder, write_stable_diffusion(folder, kind)
        return made[kind]

    return of


def network_of(model: Model) -> StableDiffusion:
    assert isinstance(model.network, StableDiffusion)
    return model.network


def scheduler_of(folder: Path, sampler: str) -> Any:
    """The reference's scheduler with the checkpoint's config, as its pipeline would correct it."""
    options = {} if "xl" in folder.name or "turbo" in folder.name else {"clip_sample": False}
    return SCHEDULERS[sampler].from_pretrained(folder, subfolder="scheduler", **options)


def generators(prompts: list[str], seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(image_seed(seed, prompt, 0)) for prompt in prompts]


def recorded(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A list that gets the latents after every step of a drawing."""
    network, steps = network_of(model), list[torch.Tensor]()
    build = network.build_sampler

    def recording(settings: Any) -> Any:
        sampler = build(settings)
        own = sampler.step

        def step(*arguments: Any) -> torch.Tensor:
            steps.append(own(*arguments))
            return steps[-1]

        sampler.step = step
        return sampler

    monkeypatch.setattr(network, "build_sampler", recording)
    return steps


CASES = [("1", "pndm"), ("2", "ddim"), ("xl", "euler"), ("turbo", "euler_ancestral")]
CASES += [("1", name) for name in SCHEDULERS if name != "pndm"]
CASES += [("2", name) for name in ("euler", "dpm", "euler_ancestral")]


@pytest.mark.parametrize(("kind", "sampler"), CASES)
def test_latents_and_images_as_the_reference(
    written: Any, kind: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, pipeline = written(kind)
    model = sightloop.load(folder, device="cpu")
    model.batch_size = len(PROMPTS)
    pipeline.scheduler = scheduler_of(folder, sampler)
    guidance = 1.0 if kind == "turbo" else 4.0
    wanted: list[torch.Tensor] = []

    def keep(pipeline: Any, index: int, time: Any, kwargs: Any) -> Any:
        wanted.append(kwargs["latents"].clone())
        return kwargs

    options = {"num_inference_steps": 4, "guidance_scale": guidance, "height": SIZE[0], "width": SIZE[1]}
    images = pipeline(
        PROMPTS, generator=generators(PROMPTS, 3), callback_on_step_end=keep, output_type="np", **options
    ).images
    steps = recorded(model, monkeypatch)
    drawn = model.draw(PROMPTS, seed=3, steps=4, guidance=guidance, size=SIZE, sampler=sampler)
    assert len(steps) == len(wanted) == 4 + (sampler == "pndm")
    for own, reference in zip(steps, wanted, strict=True):
        assert (own - reference).abs().max() <= 1e-4
    for own, reference in zip(drawn, images, strict=True):
        assert own.size == SIZE[::-1]
        # Rounded to whole numbers: half of one apart at most, where numbers of 0 to 1 differ by 1e-5 or less.
        assert np.abs(np.asarray(own) - 255 * reference).max() <= 0.5 + 255e-4


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_the_checkpoints(written: Any, kind: str) -> None:
    folder, _ = written(kind)
    defaults = network_of(sightloop.load(folder, device="cpu")).draw_defaults
    assert defaults.sampler == KINDS[kind]["scheduler"][0]
    assert defaults.size == (32, 32)  # 8 latent positions a side, 4 pixels each
    assert (defaults.guidance == 1) is (kind == "turbo")


def test_negative_prompts_as_the_reference(written: Any) -> None:
    for kind in ("1", "xl"):
        folder, pipeline = written(kind)
        pipeline.scheduler = scheduler_of(folder, "euler")
        images = pipeline(
            PROMPTS[:2],
            negative_prompt=["the dog"] * 2,
            generator=generators(PROMPTS[:2], 0),
            num_inference_steps=3,
            guidance_scale=6.0,
            output_type="np",
            height=32,
            width=32,
        ).images
        model = sightloop.load(folder, device="cpu")
        drawn = model.draw(PROMPTS[:2], steps=3, guidance=6.0, negative="the dog", sampler="euler")
        for own, reference in zip(drawn, images, strict=True):
            assert np.abs(np.asarray(own) - 255 * reference).max() <= 0.5 + 255e-4


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_image_to_image_as_the_reference(written: Any, sampler: str) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    folder, pipeline = written("1")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    model = sightloop.load(folder, device="cpu")
    with torch.inference_mode():
        normalized = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        latents = network_of(model).encode_pixels(normalized)
        wanted = pipeline.vae.encode(normalized).latent_dist.mode() * pipeline.vae.config.scaling_factor
    assert torch.allclose(latents, wanted, atol=1e-5)
    parts = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    again = StableDiffusionImg2ImgPipeline(
        **parts,
        scheduler=scheduler_of(folder, sampler),
        requires_safety_checker=False,
    )
    again.set_progress_bar_config(disable=True)
    # Latents in place of an image: the reference draws from the encoder's distribution, whose mean is used here.
    images = again(
        "a cat",
        image=latents,
        strength=0.6,
        num_inference_steps=6,
        generator=generators(["a cat"], 1),
        output_type="np",
        guidance_scale=3.0,
    ).images
    own = model.draw(
        "a cat", seed=1, steps=6, strength=0.6, init=pixels, guidance=3.0, sampler=sampler, size=32
    )
    assert np.abs(np.asarray(own[0]) - 255 * images[0]).max() <= 0.5 + 255e-4


def test_an_image_does_not_depend_on_its_batch(written: Any) -> None:
    for kind in ("xl", "turbo"):
        model = sightloop.load(written(kind)[0], device="cpu")
        drawn: list[list[np.ndarray]] = []
        for size in (1, 2, 5):
            model.batch_size = size
            drawn.append([np.asarray(image) for image in model.draw(PROMPTS, 2, seed=4, steps=3)])
        for other in drawn[1:]:
            assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(drawn[0], other, strict=True))
        one = model.draw(PROMPTS[1], 2, seed=4, steps=3)[1]
        assert np.abs(np.asarray(one).astype(int) - drawn[0][3]).max() <= 1
        assert np.abs(drawn[0][0].astype(int) - drawn[0][1]).max() > 50  # two drawings of one prompt


def test_long_prompts_are_cut_and_what_is_lost_is_said(written: Any) -> None:
    folder, pipeline = written("1")
    pipeline.scheduler = scheduler_of(folder, "ddim")
    prompt = "a cat " * 40 + "the dog"
    model = sightloop.load(folder, device="cpu")
    with pytest.warns(UserWarning, match="were cut.*the dog"):
        own = model.draw(prompt, steps=2, sampler="ddim", guidance=2.0)[0]
    image = pipeline(
        prompt,
        generator=generators([prompt], 0),
        num_inference_steps=2,
        guidance_scale=2.0,
        output_type="np",
        height=32,
        width=32,
    ).images[0]
    assert np.abs(np.asarray(own) - 255 * image).max() <= 0.5 + 255e-4


def test_variants_and_shards(tmp_path: Path) -> None:
    write_stable_diffusion(tmp_path / "plain")
    write_stable_diffusion(tmp_path / "shards", max_shard_size="300KB")
    write_stable_diffusion(tmp_path / "half", variant="fp16", max_shard_size="300KB")
    assert len(locate(tmp_path / "shards").weights) > 3
    assert all("fp16" in path.name for path in locate(tmp_path / "half").weights)
    drawn = [
        np.asarray(sightloop.load(tmp_path / name, device="cpu").draw("a cat", steps=2)[0])
        for name in ("plain", "shards", "half")
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])  # the tensors are float32 under another name
    shutil.copy(*[tmp_path / name / "unet" / "config.json" for name in ("plain", "shards")])
    for path in (tmp_path / "half" / "unet").glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing.*fp16"):
        sightloop.load(tmp_path / "half", device="cpu")


def test_attention_names_of_old_autoencoders(tmp_path: Path) -> None:
    write_stable_diffusion(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    path = tmp_path / "old" / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, old in names.items():
        tensors = {
            name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()
        }
    save_file(tensors, path)
    own, other = (
        sightloop.load(tmp_path / name, device="cpu").draw("a cat", steps=1)[0] for name in ("old", "new")
    )
    assert np.array_equal(np.asarray(own), np.asarray(other))


def test_half_precision_decodes_in_full(written: Any) -> None:
    model = sightloop.load(written("xl")[0], device="cpu", dtype="float16")
    kinds = {name.split(".")[0]: value.dtype for name, value in network_of(model).state_dict().items()}
    assert kinds["vision"] == torch.float16
    assert kinds["autoencoder"] == torch.float32  # its activations leave the range of float16 (force_upcast)


def edited(tmp_path: Path, written: Any, file: str, **values: Any) -> Path:
    """A copy of SD 1's folder with other values in a JSON file."""
    folder = tmp_path / "edited"
    shutil.copytree(written("1")[0], folder)
    data = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(data | values))
    return folder


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3Pipeline"},
            "StableDiffusion3Pipeline is not supp",
        ),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline is not supported"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is AutoencoderTiny, must be"),
        ("model_index.json", {"text_encoder": [None, None]}, "text_encoder is missing"),
        (
            "unet/config.json",
            {"class_embed_type": "timestep"},
            "class_embed_type='timestep' is not supported",
        ),
        ("unet/config.json", {"in_channels": 9}, "inpainting"),
        ("unet/config.json", {"block_out_channels": "wide"}, "cannot be understood|not supported"),
        ("unet/config.json", {"cross_attention_dim": 48}, "text encoders of width 32"),
        ("unet/config.json", {"layers_per_block": 1}, "unknown"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
        ("scheduler/scheduler_config.json", {"skip_prk_steps": False}, "Runge-Kutta"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("scheduler/scheduler_config.json", {"beta_start": "small"}, "beta_start='small', which must be"),
    ],
)
def test_other_networks_are_refused_in_one_line(
    tmp_path: Path, written: Any, file: str, values: dict[str, Any], words: str
) -> None:
    folder = edited(tmp_path, written, file, **values)
    with pytest.raises(CheckpointError, match=words) as caught:
        sightloop.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path, written: Any) -> None:
    folder = edited(tmp_path, written, "model_index.json")
    shutil.move(folder / "scheduler", tmp_path / "scheduler")
    with pytest.raises(CheckpointError, match="has no folder scheduler"):
        sightloop.load(folder)
    shutil.move(tmp_path / "scheduler", folder / "scheduler")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"unet: has its weights as .*\.bin.*safetensors"):
        sightloop.load(folder)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(CheckpointError, match="unet: has no weights"):
        sightloop.load(folder)


def test_tokenizers_of_other_words_are_refused(tmp_path: Path, written: Any) -> None:
    folder = tmp_path / "xl"
    shutil.copytree(written("xl")[0], folder)
    path = folder / "tokenizer_2" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["the</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["the</w>"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="differ in their words"):
        sightloop.load(folder)


def test_an_unknown_scheduler_is_said_and_replaced(tmp_path: Path, written: Any) -> None:
    folder = edited(
        tmp_path, written, "scheduler/scheduler_config.json", _class_name="UniPCMultistepScheduler"
    )
    with pytest.warns(UserWarning, match="UniPCMultistepScheduler is not known.*euler"):
        model = sightloop.load(folder, device="cpu")
    assert network_of(model).draw_defaults.sampler == "euler"


def test_wrong_settings_are_refused(written: Any) -> None:
    model = sightloop.load(written("1")[0], device="cpu")
    wrong: dict[str, dict[str, Any]] = {
        "multiples of 8": {"size": 36},
        "leaves no step": {"strength": 0.1, "steps": 5, "init": np.zeros((8, 8, 3), np.uint8)},
        "from 1 to 1000": {"steps": 1001},
        "must be one of pndm": {"sampler": "heun"},
    }
    for words, options in wrong.items():
        with pytest.raises(UsageError, match=words):
            model.draw("a cat", **options)


def test_one_copy_of_each_part_is_fetched(written: Any) -> None:
    """Of the names that the hub has for Stable Diffusion 1.5 and, in shards, for others."""
    index = json.loads((written("1")[0] / "model_index.json").read_text())
    unet = "diffusion_pytorch_model"
    names = [
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "model_index.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        *(f"text_encoder/{name}" for name in ("config.json", "model.fp16.safetensors", "model.safetensors")),
        *(f"text_encoder/{name}" for name in ("pytorch_model.bin", "pytorch_model.fp16.bin")),
        *(f"tokenizer/{name}" for name in ("merges.txt", "vocab.json", "tokenizer_config.json")),
        *(f"vae/{name}" for name in ("config.json", f"{unet}.bin", f"{unet}.fp16.safetensors")),
        "unet/config.json",
        *(f"unet/{unet}.{name}" for name in ("non_ema.safetensors", "fp16.safetensors", "bin")),
        *(f"unet/{unet}-0000{number}-of-00002.safetensors" for number in (1, 2)),
        f"unet/{unet}.safetensors.index.json",
    ]
    fetched = set(files_to_fetch(names, index, "owner/name"))
    assert {
        name for name in fetched if name.endswith(("safetensors", "bin", "ckpt", "safetensors.index.json"))
    } == {
        "text_encoder/model.safetensors",
        f"vae/{unet}.fp16.safetensors",
        f"unet/{unet}-00001-of-00002.safetensors",
        f"unet/{unet}-00002-of-00002.safetensors",
        f"unet/{unet}.safetensors.index.json",
    }
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "unet/config.json"} <= fetched


def test_transformers_and_diffusers_are_not_imported(written: Any) -> None:
    folder, _ = written("xl")
    code = (
        "import sys, sightloop; "
        f"image = sightloop.load({str(folder)!r}, device='cpu').draw('a cat', steps=1)[0]; "
        "print(image.size, sorted({'transformers', 'diffusers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(32, 32) []"


def test_nothing_is_said_where_nothing_is_wrong(written: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = sightloop.load(written("2")[0], device="cpu")
        assert model.capabilities == {"draw"}
        assert model.draw("a cat", steps=1)[0].info["model"] == model.name


@pytest.mark.parametrize("layout", ["sightloop", "transformers"])
def test_saving_is_refused_and_leaves_the_model_as_it_was(tmp_path: Path, written: Any, layout: Any) -> None:
    folder, _ = written("1")
    model = sightloop.load(folder, device="cpu")
    before = model.draw("a cat", steps=1)[0]
    with pytest.raises(UsageError, match="copy the folder"):
        model.save(tmp_path / "copy", layout=layout)
    assert not (tmp_path / "copy").exists()
    assert model.draw("a cat", steps=1)[0].tobytes() == before.tobytes()
