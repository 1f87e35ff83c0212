"""Preprocessing: bit for bit what the Pillow-backed image processors of transformers do, or nearly and faster."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from sightloop.data.images import preprocess, processor_config, resample
from sightloop.errors import CheckpointError, ImageError, UsageError
from sightloop.types import ImageSpec, Limits, Pixels

REFERENCES: dict[str, Any] = {
    "clip": CLIPImageProcessorPil(),
    "clip 336": CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
    "clip odd": CLIPImageProcessorPil(
        size={"shortest_edge": 61}, crop_size={"height": 75, "width": 40}, resample=2
    ),
    "clip small crop": CLIPImageProcessorPil(
        size={"shortest_edge": 50}, crop_size={"height": 31, "width": 17}
    ),
    "clip crop only": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 90, "width": 91}),
    "clip no crop": CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False, resample=1),
    "blip": BlipImageProcessorPil(),
    "blip flat": BlipImageProcessorPil(size={"height": 31, "width": 77}, resample=4),
    "blip raw": BlipImageProcessorPil(size={"height": 40, "width": 40}, do_normalize=False, resample=5),
    "blip whole": BlipImageProcessorPil(size={"height": 40, "width": 40}, do_rescale=False, resample=0),
    "siglip": SiglipImageProcessorPil(size={"height": 64, "width": 64}),
    "vit": ViTImageProcessorPil(size={"height": 48, "width": 48}),
}
SIZES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (640, 1),
    (1, 640),
    (3, 600),
    (900, 5),
    (50, 60),
    (224, 224),
    (223, 225),
    (225, 300),
]
SIZES += [(300, 225), (97, 413), (640, 480), (480, 640)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def reference(processor: Any, image: Image.Image) -> torch.Tensor:
    return processor(image, return_tensors="pt")["pixel_values"]


def ours(source: Any, spec: ImageSpec) -> torch.Tensor:
    return preprocess.normalize([preprocess.preprocess(source, spec)], spec)


def off(source: Any, spec: ImageSpec) -> tuple[int, float]:
    """How far "fast" is from "exact": the largest difference, and the share of values that differ."""
    wanted, got = (preprocess.preprocess(source, spec, mode=mode) for mode in ("exact", "fast"))
    assert (wanted.size, wanted.name, wanted.values.shape) == (got.size, got.name, got.values.shape)
    difference = np.abs(wanted.values.astype(int) - got.values)
    return int(difference.max()), float((difference > 0).mean())


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference(name: str, size: tuple[int, int]) -> None:
    processor = REFERENCES[name]
    spec = processor_config.spec_from_transformers(processor.to_dict())
    image = noise(*size)
    assert torch.equal(ours(image, spec), reference(processor, image).float())


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    edge=st.integers(1, 80),
    crop=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    resample=st.integers(0, 5),
)
def test_equals_the_reference_at_any_size(
    size: tuple[int, int], edge: int, crop: tuple[int, int], resample: int
) -> None:
    form = {"height": crop[0], "width": crop[1]}
    image = noise(*size)
    for processor in (
        CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=form, resample=resample),
        BlipImageProcessorPil(size=form, resample=resample),
    ):
        spec = processor_config.spec_from_transformers(processor.to_dict())
        assert torch.equal(ours(image, spec), reference(processor, image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P transparent", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_equals_the_reference_on_files(tmp_path: Path, mode: str, orientation: int) -> None:
    """The reference gets the image upright; it lays transparency over white."""
    image = noise(120, 70).convert(mode.split()[0])
    if "A" in mode:
        image.putalpha(noise(120, 70).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path, exif=exif, **({"transparency": 7} if "transparent" in mode else {}))
    spec = processor_config.spec_from_transformers(REFERENCES["clip odd"].to_dict())
    with Image.open(path) as opened:
        wanted = reference(REFERENCES["clip odd"], ImageOps.exif_transpose(opened))
        assert torch.equal(ours(opened, spec), wanted)
    assert torch.equal(ours(path, spec), wanted)
    assert torch.equal(ours(path.read_bytes(), spec), wanted)


def test_equals_the_reference_on_photographs(shared_data: Path) -> None:
    for path in sorted((shared_data / "coco128").rglob("*.jpg"))[:16]:
        for name in ("clip", "blip", "siglip"):
            spec = processor_config.spec_from_transformers(REFERENCES[name].to_dict())
            assert torch.equal(ours(path, spec), reference(REFERENCES[name], str(path))), path


@pytest.mark.parametrize("size", [(10_000, 1), (10_000, 8), (8, 10_000), (3_000, 2), (2, 3_000)])
def test_strips_are_exact_where_the_whole_is_hardly_possible(size: tuple[int, int]) -> None:
    """Up to 2,240,000 x 224 pixels: checked against the window of a resize of the same ratio, done in pieces."""
    spec = ImageSpec(shortest_edge=224, crop=(224, 224))
    image = noise(*size)
    done = preprocess.preprocess(image, spec)
    assert done.values.shape == (3, 224, 224)
    if max(size) / min(size) <= 1_500:
        whole = image.resize(
            (224 * size[0] // min(size), 224 * size[1] // min(size)), Image.Resampling.BICUBIC
        )
        left, top = (whole.width - 224) // 2, (whole.height - 224) // 2
        wanted = np.asarray(whole.crop((left, top, left + 224, top + 224)))
        assert np.array_equal(done.values.transpose(1, 2, 0), wanted)
    assert off(image, spec) == (0, 0.0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_windows_equal_pillow(data: st.DataObject) -> None:
    sides = st.sampled_from([3, 20, 90]).flatmap(lambda top: st.integers(1, top))
    width, height, new_width, new_height = (data.draw(sides) for _ in range(4))
    left, top = data.draw(st.integers(0, new_width - 1)), data.draw(st.integers(0, new_height - 1))
    right, bottom = data.draw(st.integers(left + 1, new_width)), data.draw(st.integers(top + 1, new_height))
    window = resample.Window(new_width, new_height, left, top, right, bottom)
    image = noise(width, height)
    filters = [name for name in resample.FILTERS if name != "nearest"]
    kernel = data.draw(st.sampled_from(filters))
    wanted = resample.resize_pillow(image, window, kernel)
    assert np.array_equal(resample.resize_window(np.asarray(image), window, kernel), wanted)
    words = np.dstack([np.asarray(image), np.full((height, width), 77, np.uint8)])
    done = resample.resize_torch(words, window, kernel, True)
    if done is None:  # so much smaller that a sum of products could pass 24 bits: left to Pillow
        assert max(width / new_width, height / new_height) > 40
        return
    assert np.array_equal(done.transpose(1, 2, 0), wanted)
    nearly = resample.resize_torch(words, window, kernel, False)
    assert nearly is not None
    assert np.abs(nearly.transpose(1, 2, 0).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("name", ["clip", "blip", "siglip"])
def test_fast_is_nearly_exact_on_photographs(shared_data: Path, name: str) -> None:
    spec = processor_config.spec_from_transformers(REFERENCES[name].to_dict())
    paths = (
        sorted((shared_data / "coco128").rglob("*.jpg"))
        + sorted((shared_data / "clothing").rglob("*.jpg"))[::50]
    )
    assert len(paths) > 128
    for path in paths:
        largest, share = off(path, spec)
        assert largest <= 1, path
        assert share < 0.01, path


@pytest.mark.parametrize("name", ["clip", "clip odd", "blip"])
@pytest.mark.parametrize("size", SIZES)
def test_fast_is_never_off_by_more_than_one(name: str, size: tuple[int, int]) -> None:
    spec = processor_config.spec_from_transformers(REFERENCES[name].to_dict())
    assert off(noise(*size), spec)[0] <= 1
    assert off(Image.fromarray(np.asarray(noise(*size)) // 128 * 255), spec)[0] <= 1  # only black and white


def test_fast_falls_back_where_it_does_not_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    nearest = ImageSpec(shortest_edge=20, crop=(20, 20), interpolation="nearest")
    assert off(noise(50, 40), nearest) == (0, 0.0)
    monkeypatch.setattr(resample, "pass_order_is_known", lambda: False)
    monkeypatch.setattr(resample, "resize_torch", None)
    assert off(noise(50, 40), ImageSpec(shortest_edge=20)) == (0, 0.0)


def test_order_of_passes_is_the_installed_pillows() -> None:
    assert resample.pass_order_is_known()


def test_huge_results_are_refused() -> None:
    spec = ImageSpec(shortest_edge=224)
    for mode in ("exact", "fast"):
        with pytest.raises(ImageError, match="after resizing, over the limit"):
            preprocess.preprocess(noise(10_000, 1), spec, mode=mode)
    with pytest.raises(ImageError, match="limit of 99"):
        preprocess.preprocess(noise(5, 5), ImageSpec(resize=(10, 10)), limits=Limits(max_pixels=99))


def test_prepare() -> None:
    spec = ImageSpec(shortest_edge=20, crop=(20, 20))
    done = preprocess.preprocess(noise(50, 40), spec)
    assert (done.name, done.size, done.values.shape, done.values.dtype) == (
        "<image>",
        (40, 50),
        (3, 20, 20),
        np.uint8,
    )
    assert done.values.flags.c_contiguous
    assert done.values.flags.writeable
    assert preprocess.preprocess(done, spec) is done
    assert np.array_equal(
        preprocess.preprocess(noise(3, 2), ImageSpec()).values, np.asarray(noise(3, 2)).transpose(2, 0, 1)
    )
    with pytest.raises(ImageError, match="no such file"):
        preprocess.preprocess("absent.jpg", spec)
    with pytest.raises(UsageError, match="mode"):
        preprocess.preprocess(done, spec, mode="quick")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", REFERENCES)
def test_normalise_has_the_references_bits_for_every_value(name: str) -> None:
    processor = REFERENCES[name]
    spec = processor_config.spec_from_transformers(processor.to_dict())
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.dstack([every, every[::-1], every.T]))
    plain = type(processor)(**{**processor.to_dict(), "do_resize": False, "do_center_crop": False})
    wanted = reference(plain, image).float()
    batch = torch.from_numpy(np.asarray(image).transpose(2, 0, 1)[None].copy())
    assert torch.equal(preprocess.normalize(batch, spec), wanted)
    assert torch.equal(preprocess.normalize(batch.expand(5, -1, -1, -1), spec), wanted.expand(5, -1, -1, -1))


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(1e-4, 2.0),
    mean=st.tuples(*[st.floats(-1, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 3)] * 3),
)
def test_normalise_is_exact_for_any_numbers(
    scale: float, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> None:
    """The table stands in wherever the quick arithmetic would round otherwise."""
    spec = ImageSpec(scale=scale, mean=mean, std=std)
    every = np.tile(np.arange(256, dtype=np.uint8), (3, 1))[None, :, None]
    scaled = (every.astype(np.float64) * scale).astype(np.float32)
    low, wide = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    assert np.array_equal(preprocess.normalize(torch.from_numpy(every), spec).numpy(), (scaled - low) / wide)


def test_normalise_batches() -> None:
    spec = ImageSpec(shortest_edge=20, crop=(20, 24), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    batch = [preprocess.preprocess(noise(50, 40, seed), spec) for seed in range(3)]
    done = preprocess.normalize(batch, spec)
    assert done.shape == (3, 3, 20, 24)
    assert done.dtype == torch.float32
    assert done.is_contiguous()
    assert torch.equal(preprocess.normalize(batch, spec, dtype=torch.bfloat16), done.bfloat16())
    values = batch[0].values.copy()
    values.flags.writeable = False
    assert torch.equal(preprocess.normalize([Pixels("a", values, (1, 1))], spec, device="cpu"), done[:1])
    with pytest.raises(UsageError, match="different shapes"):
        preprocess.normalize([batch[0], preprocess.preprocess(noise(5, 5), ImageSpec())], spec)
    with pytest.raises(UsageError, match="empty"):
        preprocess.normalize([], spec)
    with pytest.raises(UsageError, match="uint8"):
        preprocess.normalize(done, spec)
    with pytest.raises(UsageError, match="uint8"):
        preprocess.normalize(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), spec)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_normalise_has_the_same_bits_on_a_gpu() -> None:
    batch = torch.arange(256, dtype=torch.uint8).expand(2, 3, 16, 256).contiguous()
    for processor in REFERENCES.values():
        spec = processor_config.spec_from_transformers(processor.to_dict())
        assert torch.equal(preprocess.normalize(batch.cuda(), spec).cpu(), preprocess.normalize(batch, spec))


@pytest.mark.parametrize("name", REFERENCES)
def test_specs_make_the_round_trip(name: str) -> None:
    processor = REFERENCES[name]
    spec = processor_config.spec_from_transformers(processor.to_dict())
    kind = processor.to_dict()["image_processor_type"]
    written = processor_config.spec_to_transformers(spec, kind)
    assert processor_config.spec_from_transformers(written) == spec
    assert written["image_processor_type"] == kind
    image = noise(80, 60)
    assert torch.equal(
        reference(type(processor)(**written), image).float(), reference(processor, image).float()
    )


def test_older_forms_of_specs() -> None:
    clip = ImageSpec(
        shortest_edge=224,
        crop=(224, 224),
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    read = processor_config.spec_from_transformers
    assert read({}) == clip
    assert read({"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224}) == clip
    assert read({"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 224}}) == clip
    assert (
        read({"image_processor": {"image_processor_type": "CLIPImageProcessor"}, "processor_class": "x"})
        == clip
    )
    assert read({"image_processor_type": "BlipImageProcessor", "size": 384}).resize == (384, 384)
    assert read({"image_processor_type": "ViTImageProcessor", "size": [10, 12]}).resize == (10, 12)
    assert read({"image_processor_type": "SiglipImageProcessor"}).mean == (0.5, 0.5, 0.5)
    assert read({"image_processor_type": "ViTFeatureExtractor", "image_mean": 0.25}).mean == (0.25,) * 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_processor_type": "DonutImageProcessor"},
        {"size": {"longest_edge": 224}},
        {"size": {"shortest_edge": 224, "longest_edge": 300}},
        {"size": {"max_height": 224, "max_width": 300}},
        {"size": "224"},
        {"size": 0},
        {"size": True},
        {"crop_size": {"shortest_edge": 224}},
        {"crop_size": [1, 2, 3]},
        {"resample": 9},
        {"resample": "soft"},
        {"image_mean": [0.5, 0.5]},
        {"image_std": [0.5, 0.5, 0.0]},
        {"image_std": [0.5, 0.5, "a"]},
        {"rescale_factor": "1/255"},
        {"do_pad": True, "do_resize": False, "do_center_crop": False},
        {"do_pad": True, "do_center_crop": False},
        {"do_pad": True, "pad_size": {"height": 256, "width": 256}},
    ],
)
def test_unknown_forms_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        processor_config.spec_from_transformers(wrong)


def test_a_file_that_names_no_processor_is_the_models_own() -> None:
    read = processor_config.spec_from_transformers
    assert read({"size": 384}, "BlipImageProcessor").resize == (384, 384)
    assert read({"size": 336, "crop_size": 336}) == read(
        {"size": 336, "crop_size": 336}, "CLIPImageProcessor"
    )
    assert read({"image_processor_type": "CLIPImageProcessor"}, "BlipImageProcessor").shortest_edge == 224


@pytest.mark.parametrize("kind", ["Blip", "CLIP", "Siglip", "ViT"])
def test_padding_to_the_largest_of_a_batch_changes_nothing_where_all_are_of_one_size(kind: str) -> None:
    """The published files of BLIP say do_pad and size_divisor; its processor reads neither."""
    config = {"image_processor_type": f"{kind}ImageProcessor", "size": {"height": 384, "width": 384}}
    config |= {"crop_size": 384}
    padded = {**config, "do_pad": True, "size_divisor": 32, "unheard_of": [1]}
    read = processor_config.spec_from_transformers
    assert read(padded) == read(config)
    assert read({**padded, "pad_size": {"height": 384, "width": 384}}) == read(config)


def test_specs_of_open_clip() -> None:
    config = {
        "size": [224, 224],
        "mode": "RGB",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bicubic",
    }
    half = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    read = processor_config.spec_from_open_clip
    assert read({**config, "resize_mode": "squash"}, 9) == ImageSpec(resize=(224, 224), **half)
    assert read({**config, "resize_mode": "shortest"}, 9) == ImageSpec(
        shortest_edge=224, crop=(224, 224), **half
    )
    assert read({}, 240).crop == (240, 240)
    assert read({"interpolation": "bilinear"}, [240, 240]).interpolation == "bilinear"
    for wrong in ({"resize_mode": "longest"}, {"interpolation": "random"}, {"size": [1, 2]}):
        with pytest.raises(CheckpointError):
            read(wrong, 224)


def test_preparing_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "from sightloop.data.images import preprocess, reader\n"
        "from sightloop.types import ImageSpec\n"
        "preprocess.preprocess(np.zeros((9, 9, 3), np.uint8), ImageSpec(shortest_edge=4))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jpeg_turned_and_fast() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    out = io.BytesIO()
    noise(90, 60).save(out, "JPEG", exif=exif, quality=95)
    spec = ImageSpec(shortest_edge=30, crop=(30, 30))
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(out.getvalue())))
    assert np.array_equal(
        preprocess.preprocess(out.getvalue(), spec).values, preprocess.preprocess(turned, spec).values
    )
    assert off(out.getvalue(), spec)[0] <= 1
