"""A loaded checkpoint and its verbs: images and texts in, plain Python and NumPy out; batches change nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sightloop.checkpoints.catalog import models_for
from sightloop.data.images.reader import read_images
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.errors import ImageError, UnsupportedError, UsageError
from sightloop.inference import generation_config, prompting, regions
from sightloop.inference.arguments import (
    ImageInput,
    TextInput,
    as_images,
    as_pairs,
    as_strings,
    digest,
    duplicate_groups,
    prompts_from,
)
from sightloop.inference.batching import TEXTS_AT_ONCE, continued, groups, part_of
from sightloop.inference.chat import chat_stream
from sightloop.inference.image_encoding import encode_images
from sightloop.inference.regions import RegionQuery
from sightloop.inference.save import save
from sightloop.models.paligemma import MaskDecoder
from sightloop.tasks import answer_ranking, embed, match
from sightloop.tasks.generate import Decoding
from sightloop.types import (
    Box,
    Encoded,
    Floats32,
    ImageSource,
    ImageSpec,
    JsonDict,
    JsonMapping,
    Limits,
    Message,
    Pixels,
    Region,
)

# A pair that ITC did not bring into the top k, as the evaluation of the BLIP code fills its score matrix.
NOT_RANKED = -100.0

# Questions have short answers, of which BLIP writes the likeliest word by word.
_GREEDY = {"num_beams": 1}


class Probabilities(np.ndarray[Any, np.dtype[np.float32]]):
    """An array that says how its probabilities are to be read: "softmax" (rows sum to 1) or "sigmoid" (each alone)."""

    activation: embed.LogitActivation

    @classmethod
    def of(cls, values: Floats32, reading: embed.LogitActivation) -> Probabilities:
        """The same memory, with its reading."""
        out = values.view(cls)
        out.activation = reading
        return out

    def __array_finalize__(self, source: object) -> None:
        """A part of it, or a copy, is read in the same way."""
        self.activation = getattr(source, "activation", "softmax")


@dataclass(eq=False)
class Model:
    """What `sightloop.load` returns. Every verb takes one image or many; an image is a path, encoded bytes, a PIL
    image, an array, or `Pixels` from `read`. An image that cannot be read raises `ImageError`; a verb that the
    checkpoint lacks raises `UnsupportedError`.

    name: what was loaded. image_spec: how its images are prepared. batch_size: images at once (memory, not
    results, depends on it). decoding: how it writes where nobody says (`tasks.generate.Decoding`, `options`).
    masks: what makes masks of PaliGemma's segment words, None for other families or without its file.
    """

    name: str
    network: Any
    family: str
    tokenizer: Tokenizer
    image_spec: ImageSpec
    device: torch.device
    dtype: torch.dtype
    batch_size: int = 8
    decoding: JsonMapping = field(default_factory=JsonDict)
    masks: MaskDecoder | None = field(default=None, repr=False)
    _classes: tuple[tuple[Any, ...], Tensor] | None = field(default=None, repr=False)

    @property
    def capabilities(self) -> frozenset[str]:
        """What this checkpoint can do: the keys of `checkpoints.catalog.JOBS`."""
        return self.network.capabilities

    @property
    def activation(self) -> embed.LogitActivation:
        """How `classify` reads the logits of labels that it is told, unless it is told how."""
        return getattr(self.network, "activation", "softmax")

    def read(
        self,
        sources: Iterable[ImageSource],
        *,
        workers: int = 2,
        isolate: bool = True,
        limits: Limits | None = None,
    ) -> Iterator[Pixels | ImageError]:
        """Prepare images for this model, in order; one that cannot be read becomes an ImageError in its place.

        isolate: decode in child processes, which a hostile file may take down without harm to this one.
        """
        return read_images(
            sources, self.image_spec, workers=workers, isolate=isolate, limits=limits or Limits()
        )

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that it was fine-tuned for, which `classify` knows without being told; () for most."""
        return self.network.config.labels

    @torch.inference_mode()
    def encode(self, batch: Sequence[Pixels]) -> Encoded:
        """Prepared images of `read` through the image tower: tokens `[B, N, D]`, for what works below the verbs."""
        return encode_images(self, batch)

    def embed_images(self, images: ImageInput) -> Floats32:
        """float32 `[n, d]`, unit length; `[n, q, d]` of a BLIP-2, whose q queries have a vector each."""
        self._need("embed")
        rows = [embed.embed_images(self.network, self.encode(batch)) for batch in self._batches(images)]
        return self._stack(rows)

    def embed_texts(self, texts: TextInput) -> Floats32:
        """float32 `[n, d]`, unit length."""
        self._need("embed")
        return _numpy(self._embed_texts(as_strings(texts, "texts")))

    def similarity(self, images: ImageInput, texts: TextInput) -> Floats32:
        """Cosines, float32 `[n_images, n_texts]`; of several vectors an image, the nearest counts."""
        self._need("similarity")
        cosines = self.embed_images(images) @ self.embed_texts(texts).T
        return cosines if cosines.ndim == 2 else cosines.max(axis=1)

    def classify(
        self,
        images: ImageInput,
        labels: TextInput | None = None,
        templates: TextInput = ("a photo of a {}.",),
        *,
        activation: embed.LogitActivation | None = None,
    ) -> Probabilities:
        """Zero-shot probabilities, float32 `[n, len(labels)]` (Radford et al. 2021, section 3.1).

        reading: "softmax": which of the labels it is, rows sum to 1; "sigmoid": whether it is this label, each for
        itself, of models that were trained so. Without it: as the model was trained. The result says it, too.
        templates: each holds `{}` for the label; several are averaged in embedding space (section 3.1.4).
        Without labels: probabilities of the classes that the model was fine-tuned for (`self.labels`), by the layer
        that learned them, always a softmax; UsageError where there are none.
        """
        usual = self.activation
        if activation not in (None, "softmax", "sigmoid"):
            raise UsageError(f'activation="{activation}": must be "softmax" or "sigmoid"')
        if labels is None:
            if not self.labels:
                raise UsageError(f"labels: name them; {self.name} was not fine-tuned for classes of its own")
            usual = "softmax"
        if activation == "sigmoid" and usual == "softmax":
            raise UsageError(
                f'activation="sigmoid": {self.name} was trained to choose; its logits say nothing alone'
            )
        activation = activation or usual
        if labels is None:
            learned = [
                embed.label_probabilities(self.network, self.encode(batch)) for batch in self._batches(images)
            ]
            return Probabilities.of(self._stack(learned, width=len(self.labels)), activation)
        self._need("similarity" if self.labels else "classify")
        classes = self._class_embeddings(as_strings(labels, "labels"), as_strings(templates, "templates"))
        rows = [
            embed.class_probabilities(
                self.network, embed.embed_images(self.network, self.encode(batch)), classes, activation
            )
            for batch in self._batches(images)
        ]
        return Probabilities.of(self._stack(rows, width=classes.shape[0]), activation)

    def match(self, images: ImageInput, texts: TextInput) -> Floats32:
        """ITM probability of each pair, float32 `[n]`; one image goes with all texts, one text with all images.

        Each distinct image is encoded once, and its texts are scored together against it. Of a judge that was set to
        count ITC too (`match_cosine` in its config), the probability by both.
        """
        self._need("match")
        pictures, strings = as_pairs(images, as_strings(texts, "texts"), "texts")
        tokens = self._tokens(strings)
        out = np.zeros(len(strings), dtype=np.float32)
        for _, image, rows_of in self._distinct(pictures):
            for part, rows in groups(rows_of):
                logits = match.match_logits(self.network, part_of(image, part), *self._rows(tokens, rows))
                out[rows] = _numpy(match.match_probability(logits))
        return out

    def rank(self, images: ImageInput, texts: TextInput, k: int = 16) -> Floats32:
        """Retrieval scores, float32 `[n_images, n_texts]`: ITC first, ITM over the k best texts of each image.

        score = ITM logit of "match" + ITC similarity; `NOT_RANKED` (-100) where the text was not among the k best,
        as the evaluation of the BLIP code has it. Sort a row to rank the texts of an image.
        """
        self._need("rank")
        if k < 1:
            raise UsageError(f"k={k}: must be at least 1")
        strings = as_strings(texts, "texts")
        tokens, embedded = self._tokens(strings), self._embed_texts(strings)
        rows: list[Tensor] = []
        for batch in self._batches(images):
            image = self.encode(batch)
            with torch.inference_mode():
                similarity = embed.similarities(embed.embed_images(self.network, image), embedded)
            best, index = similarity.topk(min(k, len(strings)), dim=1)
            scores = torch.full_like(similarity, NOT_RANKED)
            for part, chosen in groups(list(index.cpu().numpy())):
                logits = match.match_logits(self.network, part_of(image, part), *self._rows(tokens, chosen))
                places = torch.from_numpy(chosen).to(self.device).view(part.stop - part.start, -1)
                scores[part] = scores[part].scatter(1, places, logits[:, 1].view(places.shape))
            rows.append(scores.scatter_add(1, index, best))
        return self._stack(rows, len(strings))

    def caption(
        self,
        images: ImageInput,
        prompt: TextInput | None = None,
        *,
        length: Literal["short", "detailed", "long"] | None = None,
        region: Box | None = None,
        **decoding: Any,
    ) -> list[str]:
        """One caption an image (`num_return` of them, together). A prompt is continued, and part of the caption.

        prompt: one for all images, or one an image. length, and region (a box in pixels, of which the caption then
        is): for models that were trained for them, in place of a prompt. decoding: the fields of
        `tasks.generate.Decoding`; what is left out is as `options` says.
        """
        self._need("caption")
        if length is not None or region is not None:
            return regions.caption(self, images, prompt, length, region, **decoding)
        options = self.options(decoding)
        prompts = None if prompt is None else as_strings(prompt, "prompt")
        out: list[str] = []
        done = 0
        for batch in self._batches(images):
            mine = None if prompts is None else prompts_from(prompts, done, len(batch))
            keys = [digest(picture.values.tobytes()) for picture in batch]
            if self._prompted:
                asked = [
                    prompting.format_prompt(self, "caption", text) for text in mine or [None] * len(batch)
                ]
                seen = [[one] for one in prompting.encode_images(self, batch)]
                found = prompting.generate_texts(self, seen, asked, options, keys)
            else:
                found = continued(self, self.encode(batch), mine, keys, options)
            for texts in found:
                out.extend(texts)
            done += len(batch)
        if prompts is not None and len(prompts) not in (1, done):
            raise UsageError(f"prompt: {len(prompts)} prompts for {done} images; give one, or one an image")
        return out

    def answer(
        self,
        images: ImageInput,
        questions: TextInput,
        candidates: Sequence[str] | None = None,
        *,
        top_candidates: int = 128,
        **decoding: Any,
    ) -> list[str]:
        """Answers to questions about images: pairs, or one image with many questions, or one question for all.

        candidates: choose among these instead of writing: `top_candidates` of them by their first word, then by the
        likelihood of the whole answer (Li et al. 2022, section 5.3). decoding: as for `caption`.
        """
        self._need("answer")
        options = self.options(decoding, {} if self._prompted else _GREEDY)
        if self._prompted:
            if candidates is not None:
                raise UnsupportedError(f"{self.name} cannot choose among candidates; leave them out")
            return prompting.generate_answers(
                self, *as_pairs(images, as_strings(questions, "questions"), "questions"), options
            )
        choices = None if candidates is None else as_strings(candidates, "candidates")
        answers = None if choices is None else self._tokens(choices, first=self.network.config.start_id)
        pictures, strings = as_pairs(images, as_strings(questions, "questions"), "questions")
        tokens = self._tokens(strings)
        out: list[list[str]] = [[] for _ in strings]
        for batch, image, rows_of in self._distinct(pictures):
            owner = {int(row): b for b, mine in enumerate(rows_of) for row in mine}
            for part, rows in groups(rows_of):
                with torch.inference_mode():
                    question: Encoded = self.network.encode_text(
                        part_of(image, part), *self._rows(tokens, rows)
                    )
                if choices is not None and answers is not None:
                    picked = answer_ranking.rank_answers(
                        self.network.decoder, question, *answers, top=top_candidates
                    )
                    found = [[choices[i]] for i in picked]
                else:
                    keys = [
                        digest(batch[owner[row]].values.tobytes() + strings[row].encode("utf-8", "replace"))
                        for row in rows.tolist()
                    ]
                    found = continued(self, question, None, keys, options)
                for row, texts in zip(rows.tolist(), found, strict=True):
                    out[row] = texts
        return [text for texts in out for text in texts]

    def detect(
        self,
        images: ImageInput,
        phrases: TextInput | None = None,
        *,
        describe: bool = False,
        region: Box | None = None,
        **decoding: Any,
    ) -> list[list[Region]]:
        """The things in each image: all that the model finds, or with phrases all that each of them names; with a
        region (a box in pixels), what that box holds.

        describe: labels are descriptions instead of names. Boxes are in pixels of the upright image. decoding: as for
        `caption`; a text of regions may have 1,024 tokens where nobody says.
        """
        self._need("detect")
        return regions.detect(self, images, phrases, describe=describe, region=region, **decoding)

    def locate(self, images: ImageInput, phrases: TextInput, **decoding: Any) -> list[list[Region]]:
        """Boxes of what each phrase refers to, or the phrases in it: pairs, or one of either with all of the other."""
        self._need("locate")
        return regions.find_each(self, "locate", images, phrases, **decoding)

    def segment(
        self, images: ImageInput, phrases: RegionQuery | Sequence[RegionQuery], **decoding: Any
    ) -> list[list[Region]]:
        """Outlines of what each phrase refers to, or of what a box (left, top, right, bottom) holds: pairs, or one of
        either with all of the other."""
        self._need("segment")
        return regions.find_each(self, "segment", images, phrases, **decoding)

    def read_text(
        self, images: ImageInput, *, region: Box | None = None, **decoding: Any
    ) -> list[list[Region]]:
        """The texts written in each image: labels, with four corners each as polygon, and the box that holds them;
        with a region (a box in pixels), the text in that box."""
        self._need("read")
        return regions.read_text(self, images, region, **decoding)

    def chat(self, messages: Sequence[Message], stream: bool = False, **decoding: Any) -> Any:
        """The answer to the last of the messages, in the model's own prompt form; images stand in the messages.

        Returns str; with `stream` an iterator of its pieces, as they are written (with beams: all at the end).
        decoding: as for `caption`; 512 tokens at most where nobody says. UsageError for messages out of order.
        """
        self._need("chat")
        pieces = chat_stream(self, messages, decoding)
        return pieces if stream else "".join(pieces)

    def save(
        self, folder: str | PathLike[str], *, layout: Literal["sightloop", "transformers"] = "sightloop"
    ) -> None:
        """Write a folder that `load` reads back bit for bit, or, with layout="transformers", one for `transformers`.

        The folder must not exist yet, or be empty (UsageError); it appears whole or not at all. A BLIP with a caption
        head and a matching head becomes two folders for `transformers`, `captioning` and `retrieval`.
        """
        save(self, folder, layout=layout)

    # -- below: batching; no verb of its own ------------------------------------------------------------------------

    def _need(self, job: str) -> None:
        if job not in self.capabilities:
            mine = ", ".join(sorted(self.capabilities)) or "nothing that is known here"
            others = " or ".join(models_for(job)[:2])
            raise UnsupportedError(f"{self.name} cannot {job}; it can: {mine}. For {job}, load {others}")

    def _batches(self, images: ImageInput) -> Iterator[list[Pixels]]:
        batch: list[Pixels] = []
        for picture in self.read(as_images(images), isolate=False):
            if isinstance(picture, ImageError):
                raise picture
            batch.append(picture)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _distinct(
        self, pictures: Sequence[ImageSource]
    ) -> Iterator[tuple[list[Pixels], Encoded, list[NDArray[np.int64]]]]:
        """Each distinct image once, in batches: pixels, encoded, and for each image where it stands in the list."""
        groups = [np.array(rows, dtype=np.int64) for rows in duplicate_groups(pictures)]
        done = 0
        for batch in self._batches([pictures[rows[0]] for rows in groups]):
            yield batch, self.encode(batch), groups[done : done + len(batch)]
            done += len(batch)

    def _tokens(self, texts: list[str], *, first: int | None = None) -> tuple[Tensor, Tensor]:
        """ids `[n, L]` and lengths `[n]`; first: the id to put in place of the first one."""
        tokens = self.tokenizer.encode(texts)
        ids = torch.from_numpy(tokens.ids).to(self.device)
        if first is not None:
            ids[:, 0] = first
        return ids, torch.from_numpy(tokens.lengths).to(self.device)

    def _rows(self, tokens: tuple[Tensor, Tensor], rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Some of the texts, cut to the longest of them."""
        index = torch.from_numpy(rows).to(self.device)
        lengths = tokens[1][index]
        return tokens[0][index, : int(lengths.max())], lengths

    def _embed_texts(self, texts: list[str]) -> Tensor:
        """`[n, P]`, in batches of like length: what is cut off is padding only."""
        tokens = self._tokens(texts)
        order = np.argsort(tokens[1].cpu().numpy(), kind="stable")
        out: Tensor | None = None
        for rows in np.split(order, range(TEXTS_AT_ONCE, len(order), TEXTS_AT_ONCE)):
            part = embed.embed_texts(self.network, *self._rows(tokens, rows))
            if out is None:
                out = part.new_empty(len(texts), part.shape[1])
            out[torch.from_numpy(rows).to(self.device)] = part
        if out is None:
            raise UsageError("texts: none were given")
        return out

    def _class_embeddings(self, labels: list[str], templates: list[str]) -> Tensor:
        for template in templates:
            if "{}" not in template:
                raise UsageError(f'template "{template}": must hold {{}} where the label goes')
        key = (tuple(labels), tuple(templates))
        if self._classes is None or self._classes[0] != key:
            texts = [template.replace("{}", label) for label in labels for template in templates]
            self._classes = (key, embed.ensemble(self._embed_texts(texts), len(templates)))
        return self._classes[1]

    def options(self, given: JsonMapping, usual: JsonMapping | None = None) -> Decoding:
        """How it writes, the same for every verb: as the caller says and, where he does not, as the verb does of its
        own (`usual`) and then the checkpoint; see `inference.generation_config`."""
        return generation_config.decoding_options(self.decoding, usual or {}, given)

    @property
    def _prompted(self) -> bool:
        """Whether the network reads images among words (`inference.prompting`)."""
        return hasattr(self.network, "prompts")

    def _stack(self, rows: list[Tensor], width: int = 0) -> Floats32:
        return _numpy(torch.cat(rows)) if rows else np.zeros((0, width), dtype=np.float32)


def _numpy(values: Tensor) -> Floats32:
    return values.float().cpu().numpy()
