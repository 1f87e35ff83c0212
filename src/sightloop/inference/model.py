"""A loaded checkpoint and its verbs: images and texts in, plain Python and NumPy out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from sightloop.data.images.reader import BatchSize, BatchSizer
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.data.video.pixels import ANSWERING
from sightloop.errors import ImageError, UsageError
from sightloop.inference import class_texts, sampled_verbs, videos
from sightloop.inference.answering import ANSWER_DEFAULTS, answer_questions
from sightloop.inference.arguments import ImageInput, TextInput, VisualSource, as_list, as_pairs, as_strings
from sightloop.inference.arrays import Probabilities, as_numpy, stack
from sightloop.inference.capability import need_capability, unsupported
from sightloop.inference.chat import chat_stream
from sightloop.inference.device_memory import Sizers
from sightloop.inference.dialogue import judge_dialogue
from sightloop.inference.display import model_html, public_names, show_decoding_options
from sightloop.inference.drawing import Drawer, draw_images, open_policy
from sightloop.inference.explanation import Explainer, ExplainOptions
from sightloop.inference.image_encoding import ImageEncoder
from sightloop.inference.image_encoding import Preprocessor as Preprocessor
from sightloop.inference.judges import Judges
from sightloop.inference.matching import TokenizedTexts, match_probabilities, match_scores, rank_scores
from sightloop.inference.regions import RegionFinder, RegionQuery
from sightloop.inference.save import save
from sightloop.inference.text_generation import TextGenerator, flatten
from sightloop.models.paligemma import MaskDecoder
from sightloop.protocols import Embedder, ImageNetwork, LabelClassifier, Matcher, Network, require
from sightloop.ranking.dialogue_network import AnswerScores
from sightloop.ranking.options import Ranking
from sightloop.tasks.decoding_options import Decoding
from sightloop.types import (
    Box,
    Dialogue,
    Encoded,
    Floats32,
    ImageSource,
    ImageSpec,
    Integers,
    JsonDict,
    JsonMapping,
    Limits,
    LogitActivation,
    Message,
    Pixels,
    Region,
)


@dataclass(eq=False)
class Model:
    """A loaded checkpoint, as `sightloop.load` returns it.

    Every verb takes one image or many. An image is a path, encoded bytes, a PIL image, an array, or `Pixels` from
    `read`; embed, classify, match, rank, caption and answer also take a `Video` (`data.video.pixels`). Results do
    not depend on the batch that an image was in. A verb that the checkpoint lacks raises `UnsupportedError`, an image
    that cannot be read `ImageError`, numbers that are NaN or infinite `CheckpointError`.

    Args:
        name: what was loaded.
        family: of its network, a key of `checkpoints.registry.FAMILIES`.
        network: the weights.
        tokenizer: the checkpoint's.
        image_spec: preprocessing of images.
        device: of the network.
        dtype: of weights and activations.
        batch_size: images at once, or "auto": as many as fit the memory; results do not depend on it.
        decoding: the checkpoint's decoding options (generation_config.json).
        masks: decoder of segmentation tokens (PaliGemma), None without.
        judges: models that rank this one's texts.
    """

    name: str
    family: str
    network: Network = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    image_spec: ImageSpec = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    batch_size: BatchSize = 8
    decoding: JsonMapping = field(default_factory=JsonDict, repr=False)
    masks: MaskDecoder | None = field(default=None, repr=False)
    judges: Judges = field(default_factory=Judges, repr=False)
    _classes: class_texts.ClassTexts = field(default_factory=class_texts.ClassTexts, repr=False)
    _sizers: Sizers = field(default_factory=Sizers, repr=False)

    @property
    def sizer(self) -> BatchSizer:
        """What finds the size of batches, one for each value of `batch_size`."""
        return self._sizers.of(self.batch_size, self.device)

    @property
    def preprocessor(self) -> Preprocessor:
        """Reader of images."""
        return Preprocessor(self.image_spec, self.sizer, videos.default_sampling(self.network))

    @property
    def encoder(self) -> ImageEncoder:
        """Image tower with its preprocessor. Raises UnsupportedError for a network that reads no images."""
        if not isinstance(self.network, ImageNetwork):
            raise unsupported(self.name, self.capabilities, "read images")
        return ImageEncoder(self.network, self.preprocessor, self.device, self.dtype)

    @property
    def drawer(self) -> Drawer:
        """What draws, of a network that can."""
        own = self.network, self.tokenizer, self.image_spec, self.device, self.dtype
        return Drawer(self.name, *own, self.sizer.default)

    @property
    def generator(self) -> TextGenerator:
        """Text generator."""
        return TextGenerator(self.network, self.tokenizer, self.device, self.decoding)

    @property
    def module(self) -> nn.Module:
        """The network as a torch module."""
        return require(self.network, nn.Module)

    @property
    def capabilities(self) -> frozenset[str]:
        """What this checkpoint can do: keys of `checkpoints.catalog.CAPABILITIES`."""
        return self.network.capabilities

    @property
    def activation(self) -> LogitActivation:
        """Default activation of `classify` for given labels: softmax, or sigmoid for SigLIP."""
        return self.network.activation if isinstance(self.network, Embedder) else "softmax"

    @property
    def labels(self) -> tuple[str, ...]:
        """The fine-tuned classes, which `classify` predicts if no labels are given; () for most checkpoints."""
        return self.network.config.labels

    def read(
        self,
        sources: Iterable[VisualSource],
        *,
        workers: int = 2,
        isolate: bool = True,
        limits: Limits | None = None,
    ) -> Iterator[Pixels | ImageError]:
        """Images preprocessed for this model, uint8 `[3, H, W]` each, in order, or in their place an ImageError.

        Args:
            sources: the images.
            workers: threads or child processes that decode.
            isolate: decode in child processes, which a hostile file may take down without harm to this one.
            limits: bounds on each image.
        """
        return self.preprocessor.read(sources, workers=workers, isolate=isolate, limits=limits)

    @torch.inference_mode()
    def encode(self, batch: Sequence[Pixels]) -> Encoded:
        """Image tokens `[B, N, D]` of preprocessed images."""
        return self.encoder.encode(batch)

    def tokenize(self, texts: Sequence[str], *, first_id: int | None = None) -> TokenizedTexts:
        """Token ids `[n, L]` of texts on the network's device; first_id replaces every first token."""
        return TokenizedTexts(self.tokenizer, texts, self.device, first_id=first_id)

    def match_scores(
        self, image: Encoded, texts: TokenizedTexts, rows_of: Sequence[Integers]
    ) -> list[Floats32]:
        """ITM logits (no match, match) of B encoded images with their own texts.

        Args:
            image: of `encode`.
            texts: of `tokenize`.
            rows_of: for each image the rows of its n texts, int64 `[n]`.

        Returns:
            For each image float32 `[n, 2]`.
        """
        return match_scores(require(self.network, Matcher), image, texts, rows_of)

    def options(self, decoding: JsonMapping, verb_defaults: JsonMapping | None = None) -> Decoding:
        """Decoding options: the caller's, else the verb's, else the checkpoint's."""
        return self.generator.options(decoding, verb_defaults)

    def embed_images(self, images: ImageInput) -> Floats32:
        """Image embeddings, float32 `[n, d]`, unit length; `[n, Q, d]` of a BLIP-2, a vector for each query."""
        self._need("embed")
        return stack([as_numpy(rows) for rows in videos.embed_all(self.encoder, self.sizer, images)])

    def embed_texts(self, texts: TextInput) -> Floats32:
        """Text embeddings, float32 `[n, d]`, unit length."""
        self._need("embed")
        return as_numpy(self._text_embeddings(as_strings(texts, "texts")))

    def embed_video(
        self, video: videos.VideoInput, by: videos.VideoPart = "frame", seconds: float = 1.0
    ) -> videos.VideoEmbeddings:
        """Vectors `[n, P]` with times of a video's frames, so many seconds apart, or of its scenes: means of theirs."""
        self._need("embed")
        return videos.embed_parts(self.encoder, require(self.network, Embedder), video, by, seconds)

    def similarity(self, images: ImageInput, texts: TextInput) -> Floats32:
        """Cosines, float32 `[n_images, n_texts]`; of several vectors an image, the nearest counts."""
        self._need("similarity")
        cosines = self.embed_images(images) @ self.embed_texts(texts).T
        return cosines if cosines.ndim == 2 else cosines.max(axis=1)

    def classify(
        self,
        images: ImageInput,
        labels: Sequence[str] | None = None,
        templates: TextInput = ("a photo of a {}.",),
        *,
        activation: LogitActivation | None = None,
    ) -> Probabilities:
        """Class probabilities: zero-shot for given labels (Radford et al. 2021, section 3.1), else fine-tuned ones.

        Args:
            images: one or many.
            labels: the classes; None for `self.labels`, which the model was fine-tuned for (always a softmax).
            templates: sentences with "{}" for the label; several are averaged in embedding space (section 3.1.4).
            activation: "softmax": which label it is, rows sum to 1; "sigmoid": whether it is this label, each alone,
                for models that were trained so. None: as the model was trained.

        Returns:
            float32 `[n, len(labels)]`, with its `activation`.
        """
        if labels is None and not self.labels:
            raise UsageError(f"labels: {self.name} was not fine-tuned on classes; give labels")
        activation = class_texts.choose_activation(
            self.name, activation, "softmax" if labels is None else self.activation
        )
        if labels is None:
            head = require(self.network, LabelClassifier)
            encoded = map(self.encode, self.preprocessor.batches(images))
            return class_texts.label_probabilities(head, encoded, len(self.labels), self.dtype)
        self._need("similarity" if self.labels else "classify")
        names, sentences = as_list(labels, "labels"), as_strings(templates, "templates")
        classes = self._classes.embeddings(names, sentences, self._text_embeddings)
        vectors = videos.embed_all(self.encoder, self.sizer, images)
        return class_texts.class_probabilities(require(self.network, Embedder), vectors, classes, activation)

    def match(self, images: ImageInput, texts: TextInput) -> Floats32:
        """Probability that image and text match (ITM), float32 `[n]`: pairs, or one of either with all of the other.

        With `match_cosine` in its config, the probability by ITM and ITC together. Each image is encoded once.
        """
        self._need("match")
        sources, strings = as_pairs(images, as_strings(texts, "texts"), "texts")
        batches = ((image, rows) for _, image, rows in self.encoder.distinct_batches(sources))
        return match_probabilities(require(self.network, Matcher), batches, self.tokenize(strings))

    def explain(
        self,
        image: ImageSource,
        text: TextInput,
        word: str | None = None,
        *,
        layer: int | None = None,
        head: int | None = None,
        crops: bool = True,
    ) -> Any:
        """What the score of a text looks at: Grad-CAM of the attention to patches, over crops (`explanation.HeatMap`).

        Explains `match` by the ITM head's cross-attention; of two towers, `similarity` by the image tower's attention.

        Args:
            image, text: one image, and one text or several.
            word: a word or phrase of the text, for what it alone looks at (BLIP's ITM).
            layer: index of the attention layer; default: number 0.6 L of L layers.
            head: index of an attention head; default: the mean of all.
            crops: whether thirteen crops of the image count too: a finer map, at fourteen times the work.

        Returns:
            `HeatMap`, float32 `[H, W]` in pixels of the upright image, at least 0, sums to 1; a list for several texts.
        """
        score = "match" if "match" in self.capabilities else "similarity"
        self._need(score)
        options = ExplainOptions(as_strings(text, "text"), word, layer, head, crops)
        maps = Explainer(self.name, self.encoder, self.tokenizer, score).explain(image, options)
        return maps[0] if isinstance(text, str) else maps

    def rank(self, images: ImageInput, texts: TextInput, k: int = 16) -> Floats32:
        """Retrieval scores, float32 `[n_images, n_texts]`: ITC over all texts, ITM over the k best of each image.

        The score is the ITM logit of "match" plus the ITC similarity; `NOT_RANKED` (-100) for texts that are not among
        the k best, as in the evaluation of the BLIP code. Sort a row to rank the texts of an image.
        """
        self._need("rank")
        if k < 1:
            raise UsageError(f"k={k}: must be at least 1")
        tokens = self.tokenize(as_strings(texts, "texts"))
        batches = map(self.encode, self.preprocessor.batches(images))
        matcher, embedder = require(self.network, Matcher), require(self.network, Embedder)
        rows = [rank_scores(matcher, embedder, image, tokens, k) for image in batches]
        return stack(rows, len(tokens.lengths))

    def caption(
        self,
        images: ImageInput,
        prompt: TextInput | None = None,
        *,
        length: Literal["short", "detailed", "long"] | None = None,
        region: Box | None = None,
        **options: Any,
    ) -> list[str]:
        """Captions, one an image (`num_return` of them, together).

        Args:
            images: one or many.
            prompt: words that the caption starts with, one for all images or one an image.
            length: how detailed, for models that were trained for it (Florence-2), in place of a prompt.
            region: box in pixels whose content is described, likewise.
            options: fields of `tasks.decoding.Decoding`, the checkpoint's own where left out; with `samples=16` so
                many are drawn and ranked, which has options too (`ranking.options.Ranking`), and with
                `details=True` each string is a `RankedText`, which has every candidate with its scores.
        """
        self._need("caption")
        ranking, details, own = sampled_verbs.split_options(options)
        sampled_verbs.check_caption_options(prompt, length, region, ranking)
        decoding = self.options(own)
        if length is not None or region is not None:
            return self._regions.caption(images, length=length, region=region, options=decoding)
        prompts = None if prompt is None else as_strings(prompt, "prompt")
        if ranking is not None:
            ranked = self._sampled(ranking).caption(images, prompts, decoding)
            return sampled_verbs.results(ranked, details=details)
        return flatten(
            sampled_verbs.write_all_captions(self.encoder, self.generator, images, prompts, decoding)
        )

    def answer(
        self,
        images: ImageInput,
        questions: TextInput,
        candidates: Sequence[str] | None = None,
        *,
        top_candidates: int = 128,
        **options: Any,
    ) -> list[str]:
        """Answers to questions about images: pairs, or one of either with all of the other.

        Args:
            images: one or many.
            questions: one or many.
            candidates: answers to choose among, by likelihood (Li et al. 2022, section 5.3); None to write freely.
            top_candidates: how many, by the likelihood of their first word, are scored whole.
            options: as for `caption`.
        """
        self._need("answer")
        generator, (ranking, details, own) = self.generator, sampled_verbs.split_options(options)
        decoding = self.options(own, {} if generator.is_prompted else ANSWER_DEFAULTS)
        choices = None if candidates is None else as_list(candidates, "candidates")
        sources, strings = as_pairs(images, as_strings(questions, "questions"), "questions")
        encoder = self.encoder.sampling(ANSWERING)
        if ranking is not None:
            if choices is not None:
                raise UsageError("samples: draws answers; leave candidates out")
            ranked = self._sampled(ranking).answer(sources, strings, decoding)
            return sampled_verbs.results(ranked, details=details)
        return flatten(
            answer_questions(encoder, generator, sources, strings, choices, decoding, top=top_candidates)
        )

    def judge_answers(
        self, image: ImageSource, dialogue: Dialogue, history: int | None = None
    ) -> list[AnswerScores]:
        """Of the candidates of each round, read with `history` rounds before it: log-odds of being true, attributes."""
        return judge_dialogue(self, self.tokenizer, image, dialogue, history)

    def detect(
        self,
        images: ImageInput,
        phrases: TextInput | None = None,
        *,
        describe: bool = False,
        region: Box | None = None,
        **decoding: Any,
    ) -> list[list[Region]]:
        """Objects in each image.

        Args:
            images: one or many.
            phrases: names of objects; None for all that the model finds.
            describe: labels are descriptions instead of names.
            region: box in pixels; what it holds is named.
            decoding: as for `caption`; 1,024 new tokens unless said.

        Returns:
            For each image its regions, boxes in pixels of the upright image.
        """
        self._need("detect")
        return self._regions.detect(images, phrases, describe=describe, region=region, decoding=decoding)

    def locate(self, images: ImageInput, phrases: TextInput, **decoding: Any) -> list[list[Region]]:
        """Boxes of what each phrase refers to, or of the phrases in it; pairs, or one of either with all others."""
        self._need("locate")
        return self._regions.find_each("locate", images, phrases, decoding)

    def segment(
        self, images: ImageInput, phrases: RegionQuery | Sequence[RegionQuery], **decoding: Any
    ) -> list[list[Region]]:
        """Outlines of what each phrase refers to, or of what each box holds: pairs, or one of either with all of the
        other."""
        self._need("segment")
        return self._regions.find_each("segment", images, phrases, decoding)

    def read_text(
        self, images: ImageInput, *, region: Box | None = None, **decoding: Any
    ) -> list[list[Region]]:
        """Text in each image, or in a box of it (OCR): label, four corners as a polygon, and their bounding box."""
        self._need("read")
        return self._regions.read_text(images, region, decoding)

    def chat(self, messages: Sequence[Message], stream: bool = False, **options: Any) -> Any:
        """The answer to the last message, in the model's own chat template; images are part of the messages.

        Without a template the last message is a question about the last image; a model that was trained for dialogues
        reads the earlier messages too, and the system message as caption.

        Args:
            messages: the conversation; the last message is the user's.
            stream: return an iterator over pieces as they are generated (with beams or samples: all at the end).
            options: as for `caption`; with a template 512 new tokens unless said.
        """
        self._need("chat")
        ranking, details, own = sampled_verbs.split_options(options)
        if ranking is not None:
            best = self._sampled(ranking).reply(messages, own)
            return iter([str(best)]) if stream else sampled_verbs.results([best], details=details)[0]
        pieces = chat_stream(self.encoder, self.generator, messages, own)
        return pieces if stream else "".join(pieces)

    def draw(
        self,
        texts: TextInput,
        n: int = 1,
        *,
        seed: int = 0,
        keep: int | None = None,
        judge: Any = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of texts, the best of each text first: `keep` of the `n` that are drawn.

        An image depends on its text, number, seed and settings, not on its batch (rounding aside). Its `info` has
        "prompt", "number", "seed", "model" and "settings", with a judge also "judge" and "scores".

        Args:
            texts: one or many.
            n, seed: images drawn of each text; seed of the noise.
            keep: images kept of each text, None for the best one if there is a judge, else for all.
            judge: model, or what `load` takes, whose ITM (else ITC) orders the images of a text.
            settings: fields of `types.DrawSettings`, the checkpoint's own where left out; `init=` an image to start
                from; `policy=` a file of what is left out; `on_step=` a function of evaluations done and their number.
        """
        self._need("draw")
        prompts = as_strings(texts, "texts")
        chosen = None if judge is None else self.judges.choose(judge, self)
        settings["policy"] = open_policy(settings.get("policy"), self.judges, self)
        return draw_images(self.drawer, prompts, settings, n=n, keep=keep, seed=seed, judge=chosen)

    def save(
        self, folder: str | PathLike[str], *, layout: Literal["sightloop", "transformers"] = "sightloop"
    ) -> None:
        """Writes a folder that `load` reads back bit for bit, or, with layout="transformers", one for `transformers`.

        The folder must not exist yet, or be empty (UsageError); it appears whole or not at all. A BLIP with a caption
        head and a matching head becomes two folders for `transformers`, `captioning` and `retrieval`.
        """
        save(self, folder, layout=layout)

    def _repr_html_(self) -> str:
        return model_html(self)

    def __dir__(self) -> list[str]:
        return public_names(self)

    def _need(self, capability: str) -> None:
        need_capability(self.name, self.capabilities, capability)

    def _sampled(self, ranking: Ranking) -> sampled_verbs.SampledVerbs:
        judge = self.judges.choose(ranking.judge, self)
        return sampled_verbs.SampledVerbs(self, judge, self.encoder, self.generator, ranking)

    @property
    def _regions(self) -> RegionFinder:
        return RegionFinder(self.name, self.encoder.sampling(None), self.generator, self.masks)

    def _text_embeddings(self, texts: list[str]) -> Tensor:
        return self.tokenize(texts).embed(require(self.network, Embedder))


show_decoding_options(Model)
