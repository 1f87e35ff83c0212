"""transformers' side of every case, at its best: inference mode, caches, SDPA where a class has it, batches."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.utils.logging
from PIL import Image
from torch.nn.functional import normalize
from transformers import (
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPModel,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.materials import Materials

transformers.utils.logging.disable_progress_bar()

Call = Callable[[], Any]

_KINDS: dict[str, Any] = {
    "caption": BlipForConditionalGeneration,
    "match": BlipForImageTextRetrieval,
    "answer": BlipForQuestionAnswering,
    "clip": CLIPModel,
}


class Loaded:
    """A model with its tokenizer and its image processor."""

    def __init__(self, folder: Path, name: str, dtype: str = "float32") -> None:
        kind = _KINDS[name]
        try:
            self.model = kind.from_pretrained(folder / name, attn_implementation="sdpa", dtype=dtype).eval()
        except ValueError:  # a class that has no SDPA
            self.model = kind.from_pretrained(folder / name, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / name)
        self.processor = processor(folder / name)

    def pixels(self, files: list[str]) -> torch.Tensor:
        """Normalised pixels `[B, 3, S, S]` of some files, in the model's dtype."""
        return read(self.processor, files).to(self.model.dtype)


def processor(folder: Path) -> Any:
    """The Pillow-backed image processor of a checkpoint."""
    kind = CLIPImageProcessorPil if folder.name == "clip" else BlipImageProcessorPil
    return kind.from_pretrained(folder)


def read(processor: Any, files: list[str]) -> torch.Tensor:
    """Normalised pixels `[B, 3, S, S]` of some files."""
    images = [Image.open(file).convert("RGB") for file in files]
    return processor(images, return_tensors="pt")["pixel_values"]


class Transformers:
    """One checkpoint is held at a time."""

    def __init__(self, materials: Materials) -> None:
        self.given = materials
        self.held: tuple[tuple[str, str], Loaded] | None = None

    def _load(self, name: str, dtype: str = "float32") -> Loaded:
        if self.held is None or self.held[0] != (name, dtype):
            self.held = None
            self.held = ((name, dtype), Loaded(Path(self.given.folder), name, dtype))
        return self.held[1]

    def caption(self, batch: int, beams: int, tokens: int, dtype: str = "float32") -> Call:
        """Files to captions."""
        loaded, files = self._load("caption", dtype), self.given.pictures[:batch]
        options = {"num_beams": beams, "min_new_tokens": tokens, "max_new_tokens": tokens, "use_cache": True}

        def call() -> list[str]:
            ids = loaded.model.generate(pixel_values=loaded.pixels(files), do_sample=False, **options)
            return _texts(loaded, ids)

        return torch.inference_mode()(call)

    def encode_blip(self, batch: int, dtype: str = "float32") -> Call:
        """Prepared pixels to image tokens."""
        loaded = self._load("caption", dtype)
        pixels = loaded.pixels(self.given.pictures[:batch])
        return torch.inference_mode()(
            lambda: loaded.model.vision_model(pixel_values=pixels)[0].float().numpy()
        )

    def judge(self, texts: int) -> Call:
        """A file and texts to ITM probabilities, the image given once for each text."""
        loaded, captions = self._load("match"), self.given.captions[:texts]
        file = self.given.pictures[0]

        def call() -> Any:
            pixels = loaded.pixels([file]).expand(texts, -1, -1, -1)
            tokens = loaded.tokenizer(captions, padding=True, return_tensors="pt")
            found = loaded.model(
                pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            return found.itm_score.softmax(dim=-1)[:, 1].numpy()

        return torch.inference_mode()(call)

    def judge_texts(self, texts: int) -> Call:
        """An encoded image and texts to ITM probabilities, the image's tokens expanded by hand."""
        loaded, captions = self._load("match"), self.given.captions[:texts]
        with torch.inference_mode():
            image = loaded.model.vision_model(pixel_values=loaded.pixels(self.given.pictures[:1]))[0]
        image = image.expand(texts, -1, -1)
        seen = torch.ones(image.shape[:2], dtype=torch.long)

        def call() -> Any:
            tokens = loaded.tokenizer(captions, padding=True, return_tensors="pt")
            states = loaded.model.text_encoder(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=image,
                encoder_attention_mask=seen,
            ).last_hidden_state
            return loaded.model.itm_head(states[:, 0]).softmax(dim=-1)[:, 1].numpy()

        return torch.inference_mode()(call)

    def ask(self, questions: int, tokens: int) -> Call:
        """A file and questions to answers, the image given once for each question."""
        loaded, file, texts = self._load("answer"), self.given.pictures[0], self.given.questions[:questions]

        def call() -> list[str]:
            pixels = loaded.pixels([file]).expand(questions, -1, -1, -1)
            ids = loaded.model.generate(
                pixel_values=pixels,
                **loaded.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
            return _texts(loaded, ids)

        return torch.inference_mode()(call)

    def ask_encoded(self, questions: int, tokens: int) -> Call:
        """A file and questions to answers, by a caller who takes `generate` apart to encode the image once."""
        loaded, file, texts = self._load("answer"), self.given.pictures[0], self.given.questions[:questions]
        model, ids = loaded.model, loaded.model.config.text_config

        def call() -> list[str]:
            image = model.vision_model(pixel_values=loaded.pixels([file]))[0].expand(questions, -1, -1)
            inputs = loaded.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
            states = model.text_encoder(
                **inputs,
                encoder_hidden_states=image,
                encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
            ).last_hidden_state
            found = model.text_decoder.generate(
                input_ids=torch.full((questions, 1), ids.bos_token_id),
                eos_token_id=ids.sep_token_id,
                pad_token_id=ids.pad_token_id,
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
            return _texts(loaded, found)

        return torch.inference_mode()(call)

    def bootstrap(self, pictures: int, batch: int) -> Call:
        """Files with a web text each: a nucleus sample written, then web texts and samples judged, batch by batch.
        Nothing is stored. Gives the web texts' ITM probabilities."""
        writer, judge = (Loaded(Path(self.given.folder), name) for name in ("caption", "match"))
        files = self.given.pictures[:pictures]
        web = list(islice(cycle(self.given.captions), len(files)))
        how = {"do_sample": True, "top_p": 0.9, "top_k": 0, "min_new_tokens": 5, "max_new_tokens": 20}

        def match(pixels: torch.Tensor, texts: list[str]) -> Any:
            tokens = judge.tokenizer(texts, padding=True, return_tensors="pt")
            found = judge.model(
                pixel_values=pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            )
            return found.itm_score.softmax(dim=-1)[:, 1].numpy()

        def call() -> Any:
            found: list[Any] = []
            for start in range(0, len(files), batch):
                pixels = writer.pixels(files[start : start + batch])
                written = _texts(writer, writer.model.generate(pixel_values=pixels, **how))
                found.append(match(pixels, web[start : start + batch]))
                match(pixels, written)
            return np.concatenate(found)[None]

        return torch.inference_mode()(call)

    def embed_pixels(self, batch: int) -> Call:
        """Prepared pixels to CLIP embeddings."""
        loaded = self._load("clip")
        pixels = loaded.pixels(self._files(batch))
        return torch.inference_mode()(lambda: _unit(loaded.model.get_image_features(pixel_values=pixels)))

    def embed_files(self, batch: int) -> Call:
        """Files to CLIP embeddings."""
        loaded, files = self._load("clip"), self._files(batch)
        return torch.inference_mode()(
            lambda: _unit(loaded.model.get_image_features(pixel_values=loaded.pixels(files)))
        )

    def embed_texts(self, texts: int, padding: str) -> Call:
        """Texts to CLIP embeddings; padding: to "max_length" (77) or to the "longest"."""
        loaded, captions = self._load("clip"), self.given.captions[:texts]
        options = {"padding": padding, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        return torch.inference_mode()(
            lambda: _unit(loaded.model.get_text_features(**loaded.tokenizer(captions, **options)))
        )

    def train_clip(self, batch: int, padding: str) -> Call:
        """Prepared pixels and tokens to a step of CLIP's objective."""
        loaded, pixels = self._trained("clip", batch)
        options = {"padding": padding, "truncation": True, "max_length": 77, "return_tensors": "pt"}
        tokens = loaded.tokenizer(self.given.captions[:batch], **options)
        return step(loaded.model, lambda: loaded.model(pixel_values=pixels, **tokens, return_loss=True).loss)

    def train_caption(self, batch: int) -> Call:
        """Prepared pixels and tokens to a step of the captioner's fine-tuning; padding is no label."""
        loaded, pixels = self._trained("caption", batch)
        tokens = loaded.tokenizer(self.given.captions[:batch], padding=True, return_tensors="pt")
        ids, mask = tokens.input_ids, tokens.attention_mask
        ids[:, 0] = loaded.model.config.text_config.bos_token_id
        labels = ids.masked_fill(mask == 0, -100)
        given = {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}
        return step(loaded.model, lambda: loaded.model(**given).loss)

    def _trained(self, name: str, batch: int) -> tuple[Loaded, torch.Tensor]:
        """A model of its own, which a training may change, and normalised pixels."""
        self.held = None
        loaded = Loaded(Path(self.given.folder), name)
        loaded.model.train()
        return loaded, loaded.pixels(self._files(batch))

    def pixels(self, family: str, pictures: int, threads: int) -> Call:
        """Files to normalised float32 batches of 8, one image after the other or on threads."""
        torch.set_num_threads(threads)
        prepare = processor(Path(self.given.folder) / {"blip": "caption"}.get(family, family))
        files = self.given.pictures[:pictures]
        pool = ThreadPoolExecutor(threads)

        def call() -> list[Any]:
            batches = [files[i : i + 8] for i in range(0, len(files), 8)]
            if threads == 1:
                return [read(prepare, batch).numpy() for batch in batches]
            parts = [*pool.map(lambda file: read(prepare, [file]), files)]
            return [torch.cat(parts[i : i + 8]).numpy() for i in range(0, len(files), 8)]

        return call

    def _files(self, count: int) -> list[str]:
        return (self.given.pictures * count)[:count]


def step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Call:
    """Forward, backward and the fused AdamW over a model's own loss; the loss."""
    change = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def call() -> list[Any]:
        value = loss()
        value.backward()
        change.step()
        change.zero_grad(set_to_none=True)
        return [value.detach().numpy()]

    return call


def _texts(loaded: Loaded, ids: torch.Tensor) -> list[str]:
    return [text.strip() for text in loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def _unit(found: Any) -> Any:
    features = found if isinstance(found, torch.Tensor) else found.pooler_output
    return normalize(features, dim=-1).numpy()
