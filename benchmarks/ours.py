"""sightloop's side of every case. A method prepares and returns the call that is timed; what it returns is compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import sightloop
from benchmarks.materials import Materials
from sightloop.capfilt.job import open_job
from sightloop.capfilt.options import CapFiltOptions
from sightloop.capfilt.shard import load_models, process_shard
from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.images.preprocess import normalize
from sightloop.data.images.processor_config import spec_from_transformers
from sightloop.data.images.reader import read_images
from sightloop.inference.malloc import keep_freed_memory
from sightloop.nn.blocks import Linear
from sightloop.nn.prepack import unpack, use_training_kernels
from sightloop.objectives.contrastive import clip_loss
from sightloop.objectives.language import lm_loss, next_token_targets
from sightloop.protocols import Matcher, require
from sightloop.tasks import text_scores
from sightloop.training import optimizer

Call = Callable[[], Any]


class Sightloop:
    """One checkpoint is held at a time."""

    def __init__(self, materials: Materials) -> None:
        self.given = materials
        self.held: tuple[tuple[str, str], sightloop.Model] | None = None
        self.kernels: dict[str, dict[str, int]] = {}

    def _model(self, name: str, dtype: Any = "float32") -> sightloop.Model:
        if self.held is None or self.held[0] != (name, dtype):
            self.held = None
            self.held = (
                (name, dtype),
                sightloop.load(Path(self.given.folder) / name, device="cpu", dtype=dtype),
            )
            self.kernels[name] = dict(
                Counter(_kernel(layer) for layer in _linear_layers(self.held[1].module))
            )
        return self.held[1]

    def caption(self, batch: int, beams: int, tokens: int, dtype: str = "float32") -> Call:
        """Files to captions."""
        model, files = self._model("caption", dtype), self.given.pictures[:batch]
        options: Any = {"num_beams": beams, "min_new_tokens": tokens, "max_new_tokens": tokens}
        return lambda: model.caption(files, **options)

    def encode_blip(self, batch: int, dtype: str = "float32") -> Call:
        """Prepared images to image tokens."""
        model = self._model("caption", dtype)
        pictures = self._prepared(model, batch)
        return lambda: model.encode(pictures).tokens.float().numpy()

    def judge(self, texts: int) -> Call:
        """A file and texts to ITM probabilities."""
        model, file, captions = self._model("match"), self.given.pictures[0], self.given.captions[:texts]
        return lambda: model.match(file, captions)

    def judge_texts(self, texts: int) -> Call:
        """An encoded image and texts to ITM probabilities: what `Model.match` does after the image tower."""
        model, captions = self._model("match"), self.given.captions[:texts]
        image, network = model.encode(self._prepared(model, 1)), require(model.network, Matcher)

        def call() -> Any:
            ids, lengths = model.tokenize(captions).rows(np.arange(texts))
            return text_scores.match_logits(network, image, ids, lengths).softmax(-1)[:, 1].numpy()

        return call

    def ask(self, questions: int, tokens: int) -> Call:
        """A file and questions to answers."""
        model, file = self._model("answer"), self.given.pictures[0]
        texts = self.given.questions[:questions]
        return lambda: model.answer(file, texts, min_new_tokens=tokens, max_new_tokens=tokens)

    def embed_pixels(self, batch: int) -> Call:
        """Prepared images to CLIP embeddings."""
        model = self._model("clip")
        pictures = self._prepared(model, batch)
        return lambda: model.embed_images(pictures)

    def embed_files(self, batch: int) -> Call:
        """Files to CLIP embeddings."""
        model, files = self._model("clip"), self._files(batch)
        return lambda: model.embed_images(files)

    def embed_texts(self, texts: int) -> Call:
        """Texts to CLIP embeddings."""
        model, captions = self._model("clip"), self.given.captions[:texts]
        return lambda: model.embed_texts(captions)

    def bootstrap(self, pictures: int, batch: int) -> Call:
        """Files with a web text each to a shard of the new dataset and the evidence: a nucleus sample, both judged.
        Gives the web texts' ITM probabilities."""
        folder = Path(self.given.folder)
        models = (str(folder / "caption"), str(folder / "match"))
        rows = zip(self.given.pictures[:pictures], cycle(self.given.captions), range(pictures))
        data = folder / f"bootstrap-{pictures}.jsonl"
        data.write_text(
            "".join(json.dumps({"image": i, "caption": c, "key": str(n)}) + "\n" for i, c, n in rows)
        )
        options = CapFiltOptions(group=batch, device="cpu")
        job, _ = open_job(open_dataset(data), None, models, options)
        loaded = load_models(job)

        def call() -> Any:
            with TemporaryDirectory() as out:
                (Path(out) / "evidence").mkdir()
                placed = replace(job, out=Path(out))
                process_shard(placed, loaded, 0, {})
                lines = [json.loads(line) for line in placed.evidence_path(0).read_text("utf-8").splitlines()]
            return np.array([line["itm"] for line in lines if line["source"] == "web"])[None]

        return call

    def train_clip(self, batch: int) -> Call:
        """Prepared pixels and tokens to a step of CLIP's objective."""
        model, pixels = self._trained("clip", batch)
        ids, lengths = model.tokenize(self.given.captions[:batch]).rows(np.arange(batch))
        net: Any = model.network

        def loss() -> torch.Tensor:
            image, text = net.embed_image(net.encode_image(pixels)), net.embed_text(ids, lengths)
            return clip_loss(image, text, net.logit_scale.exp()).value

        return _step(net, loss)

    def train_caption(self, batch: int) -> Call:
        """Prepared pixels and tokens to a step of the captioner's fine-tuning."""
        model, pixels = self._trained("caption", batch)
        net: Any = model.network
        tokens = model.tokenize(self.given.captions[:batch], first_id=net.config.start_id)
        ids, lengths = tokens.rows(np.arange(batch))
        kept, tower = next_token_targets(ids, lengths), net.decoder.text

        def loss() -> torch.Tensor:
            memory = tower.memory(net.encode_image(pixels).tokens)
            states = tower(ids, causal=True, memory=memory).tokens.flatten(0, 1)[kept.positions]
            # transformers smooths no labels.
            return lm_loss(net.decoder.head(states), kept.targets, len(kept.positions), smoothing=0).value

        return _step(net, loss)

    def _trained(self, name: str, batch: int) -> tuple[sightloop.Model, torch.Tensor]:
        """A model of its own, which a training may change, and normalised pixels."""
        self.held = None
        keep_freed_memory()
        model = sightloop.load(Path(self.given.folder) / name, device="cpu")
        unpack(model.module)
        use_training_kernels(model.module)
        model.module.requires_grad_(True).train()
        images = (self._prepared(model, batch) * batch)[:batch]  # again and again, should there be fewer
        return model, normalize(images, model.image_spec)

    def pixels(self, family: str, pictures: int, mode: Any, threads: int) -> Call:
        """Files to normalised float32 batches of 8, on threads."""
        torch.set_num_threads(threads)
        folder = Path(self.given.folder) / {"blip": "caption"}.get(family, family)
        spec = spec_from_transformers(json.loads((folder / "preprocessor_config.json").read_text("utf-8")))
        files = self.given.pictures[:pictures]

        def call() -> list[Any]:
            out: list[Any] = []
            batch: list[Any] = []
            for picture in read_images(files, spec, mode=mode, workers=threads):
                batch.append(picture)
                if len(batch) == 8:
                    out.append(normalize(batch, spec).numpy())
                    batch = []
            return out

        return call

    def _files(self, count: int) -> list[str]:
        if self.given.size == "tiny":
            count = min(count, 32)
        return (self.given.pictures * count)[:count]  # again and again, should there be fewer

    def _prepared(self, model: sightloop.Model, batch: int) -> list[Any]:
        """Resized uint8 images; the other sides are given normalised ones."""
        return [*model.read(self._files(batch), isolate=False)]


def _linear_layers(net: torch.nn.Module) -> list[Linear]:
    return [module for module in net.modules() if isinstance(module, Linear)]


def _kernel(layer: Linear) -> str:
    """What a layer multiplies with, in words."""
    if layer.kernel is None:
        return "plain"
    if layer.packed is not None:
        return "oneDNN packed"
    return "oneDNN" if callable(layer.kernel) and hasattr(layer.kernel, "__name__") else "by rows"


def _step(net: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Call:
    """A whole step as the training loop takes it; the loss."""
    change = optimizer.build_optimizer(net, optimizer.OptimizerConfig(lr=1e-6))

    def call() -> list[Any]:
        value = loss()
        value.backward()
        change.step()
        change.zero_grad(set_to_none=True)
        optimizer.clamp_parameters(net)
        return [value.detach().numpy()]

    return call
