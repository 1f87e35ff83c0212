"""Verbs over videos against the published protocols, written out over transformers and PyAV in a few lines each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import sightloop
from sightloop import UsageError, Video
from sightloop.data.video.reader import stop_workers
from sightloop.data.video.writing import write_video
from sightloop.errors import ImageError
from tests.data.video.clips import noise_frames
from tests.tiny_checkpoints.clip_and_blip import write_blip, write_clip

TEXTS = ["a red square moves left", "a blue circle", "two dogs", "a small cat above a dog"]
VIDEOS = 50


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Random videos of 1 to 60 frames, sizes 16 to 56, some of them odd, at 5 to 30 frames a second."""
    folder, random = tmp_path_factory.mktemp("videos"), np.random.default_rng(0)
    paths: list[Path] = []
    for i in range(VIDEOS):
        height, width = random.integers(16, 57, 2).tolist()
        frames = noise_frames(random, int(random.integers(1, 61)), height, width)
        paths.append(folder / f"{i}.{('mkv', 'mp4')[i % 2]}")
        write_video(paths[-1], frames, rate=int(random.integers(5, 31)), pixel_format="yuv444p")
    yield paths
    stop_workers()


def decoded(path: Path) -> tuple[list[Image.Image], float]:
    """All frames of a video, and its rate."""
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        frames = [f.reformat(format="rgb24", interpolation="BICUBIC") for f in container.decode(video=0)]
    return [Image.fromarray(frame.to_ndarray()) for frame in frames], rate


def frame_features(reference: Any, frames: list[Image.Image]) -> torch.Tensor:
    """The image tower's tokens of each frame."""
    pixels = reference.reference_processor(frames, return_tensors="pt")["pixel_values"]
    return reference.vision_model(pixels).last_hidden_state


def published_frames(path: Path, count: int) -> list[Image.Image]:
    """data/video_dataset.py of BLIP, "uniform"."""
    frames, _ = decoded(path)
    return [frames[i] for i in np.arange(0, len(frames), len(frames) / count, dtype=int)]


@torch.inference_mode()
def test_blips_scores_are_those_of_its_code(tmp_path: Path, videos: list[Path]) -> None:
    """eval_retrieval_video.py: ITM logit over all tokens of 8 frames, plus ITC of the mean of projected tokens."""
    reference = write_blip(tmp_path / "match", head="match", seed=1)
    for parameter in reference.parameters():  # halved: large random weights multiply the rounding of float32
        parameter.mul_(0.5 if parameter.dim() > 1 else 1.0)
    reference.save_pretrained(tmp_path / "match")
    model = sightloop.load(tmp_path / "match", device="cpu")
    tokens = reference.reference_tokenizer(TEXTS, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    texts = normalize(reference.text_proj(reference.text_encoder(ids, attention_mask=mask)[0][:, 0]), dim=-1)
    sources = [Video(path) for path in videos]
    scores, matches = model.rank(sources, TEXTS, k=len(TEXTS)), model.match(sources, TEXTS[0])
    for i, path in enumerate(videos):
        features = frame_features(reference, published_frames(path, 8))  # [8, N, D]
        assert len(features) == 8
        video = normalize(reference.vision_proj(features[:, 0]).mean(dim=0), dim=-1)
        memory = features.reshape(1, -1, features.shape[2]).expand(len(TEXTS), -1, -1)
        states = reference.text_encoder(ids, attention_mask=mask, encoder_hidden_states=memory)[0]
        logits = reference.itm_head(states[:, 0])
        wanted = logits[:, 1] + texts @ video
        assert np.abs(scores[i] - wanted.numpy()).max() < 1e-5, path
        assert abs(matches[i] - logits[0].softmax(dim=-1)[1]) < 1e-5


@torch.inference_mode()
def test_clip4clips_vectors_are_those_of_its_code(tmp_path: Path, videos: list[Path]) -> None:
    """rawvideo_util.py's frames; modeling.py: unit length, mean, unit length."""
    reference = write_clip(tmp_path / "clip")
    model = sightloop.load(tmp_path / "clip", device="cpu")
    vectors = model.embed_images([Video(path) for path in videos])
    labels = model.classify([Video(path) for path in videos[:5]], ["dog", "cat"], activation="softmax")
    lengths = set[int]()
    for i, path in enumerate(videos):
        frames, rate = decoded(path)
        chosen = list(range(0, len(frames), int(rate)))
        if len(chosen) > 12:
            chosen = [chosen[j] for j in np.linspace(0, len(chosen) - 1, num=12, dtype=int)]
        lengths.add(len(chosen))
        inputs = reference.reference_processor([frames[j] for j in chosen], return_tensors="pt")
        states = reference.vision_model(inputs["pixel_values"]).pooler_output
        mean = normalize(reference.visual_projection(states), dim=-1).mean(dim=0)
        assert np.abs(vectors[i] - normalize(mean, dim=-1).numpy()).max() < 1e-5, path
    assert len(lengths) > 3
    cosines = vectors[:5] @ model.embed_texts(["a photo of a dog.", "a photo of a cat."]).T
    scaled = torch.from_numpy(cosines) * reference.logit_scale.exp()
    assert np.abs(np.asarray(labels) - scaled.softmax(dim=-1).numpy()).max() < 1e-4


class _Features(torch.nn.Module):
    """An image tower that returns what it was made with."""

    def __init__(self, features: torch.Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (self.features,)


@pytest.mark.parametrize(("head", "count"), [("answer", 16), ("caption", 8)])
@torch.inference_mode()
def test_writing_reads_the_features_of_all_frames(
    tmp_path: Path, videos: list[Path], head: str, count: int
) -> None:
    """BLIP#30: "we simply concatenate frame features and pass them to the text decoder"."""
    reference = write_blip(tmp_path / head, head=head, seed=2)
    model = sightloop.load(tmp_path / head, device="cpu")
    tower, options, wanted = reference.vision_model, {"num_beams": 1, "max_new_tokens": 8}, list[str]()
    for path in videos[:8]:
        reference.vision_model = tower
        features = frame_features(reference, published_frames(path, count))
        reference.vision_model = _Features(features.reshape(1, -1, features.shape[2]))
        inputs = {"pixel_values": torch.zeros(1, 3, 32, 32)}
        if head == "answer":
            inputs |= reference.reference_tokenizer(["what is red?"], return_tensors="pt")
            inputs.pop("token_type_ids", None)
        ids = reference.generate(**inputs, **options, do_sample=False)
        wanted += [text.strip() for text in reference.reference_tokenizer.batch_decode(ids, True)]
    sources = [Video(path) for path in videos[:8]]
    if head == "answer":
        assert model.answer(sources, "what is red?", **options) == wanted
    else:
        assert model.caption(sources, **options) == wanted
    assert len(set(wanted)) > 2


def test_a_part_is_read_as_a_video_of_its_own(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    model = sightloop.load(tmp_path / "clip", device="cpu")
    frames = noise_frames(np.random.default_rng(3), 60, 32, 32)
    lossless = {"codec": "ffv1", "pixel_format": "bgr0", "rate": 10}
    write_video(tmp_path / "whole.mkv", frames, **lossless)
    write_video(tmp_path / "part.mkv", frames[20:45], **lossless)
    part = model.embed_images(Video(tmp_path / "whole.mkv", start=2.0, end=4.5))
    assert np.abs(part - model.embed_images(Video(tmp_path / "part.mkv"))).max() < 1e-6
    image = model.embed_images(frames[0])
    mixed = model.embed_images([frames[0], Video(tmp_path / "part.mkv"), frames[0]])
    assert np.abs(mixed - np.concatenate([image, part, image])).max() < 1e-6
    single = model.embed_images(Video(tmp_path / "whole.mkv", frames=1))
    assert np.abs(single - image).max() < 1e-6


def test_vectors_of_frames_and_scenes_have_times(tmp_path: Path) -> None:
    write_clip(tmp_path / "clip")
    model = sightloop.load(tmp_path / "clip", device="cpu")
    colors = np.random.default_rng(4).integers(0, 256, (3, 3))
    frames = [np.full((48, 48, 3), color, np.uint8) for color in colors for _ in range(30)]
    write_video(tmp_path / "v.mkv", frames, codec="ffv1", pixel_format="bgr0", rate=10)
    by_frame = model.embed_video(tmp_path / "v.mkv", seconds=0.5)
    assert by_frame.starts.tolist() == pytest.approx([0.5 * i for i in range(18)])
    assert by_frame.ends.tolist() == pytest.approx([0.5 * i for i in range(1, 18)] + [9.0], abs=0.11)
    for start, vector in zip(by_frame.starts, by_frame.vectors, strict=True):
        assert np.abs(vector - model.embed_images(frames[round(start * 10)])[0]).max() < 1e-6
    scenes = model.embed_video(Video(tmp_path / "v.mkv"), by="scene")
    assert scenes.starts.tolist() == pytest.approx([0, 3, 6])
    assert scenes.ends.tolist() == pytest.approx([3, 6, 9], abs=0.11)
    assert np.abs(scenes.vectors - model.embed_images(frames[::30])).max() < 1e-5
    with pytest.raises(UsageError, match="frame or scene"):
        model.embed_video(tmp_path / "v.mkv", by="shot")


def test_what_cannot_be_read_or_asked_is_named(tmp_path: Path) -> None:
    write_blip(tmp_path / "match", head="match")
    model = sightloop.load(tmp_path / "match", device="cpu")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ImageError, match=r"broken\.mp4: not a video"):
        model.match(Video(tmp_path / "broken.mp4"), "a dog")
    write_video(tmp_path / "v.mp4", noise_frames(np.random.default_rng(5), 9, 32, 32))
    with pytest.raises(UsageError, match="frames=0"):
        model.match(Video(tmp_path / "v.mp4", frames=0), "a dog")
    with pytest.raises(UsageError, match="start below end"):
        model.match(Video(tmp_path / "v.mp4", start=2, end=1), "a dog")
