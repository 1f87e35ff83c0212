"""Protocols of what a network can do. A family's `nn.Module` satisfies those that its parts allow.

Networks are narrowed with `require(network, Matcher)` after a look at their `capabilities` or `objectives`. Shape
letters as in `types`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from sightloop.types import DrawSettings, Encoded, LogitActivation, Message, Size

if TYPE_CHECKING:
    from torch import Tensor, nn

P = TypeVar("P")


class ImageTowerConfig(Protocol):
    """Sizes of an image tower.

    Attributes:
        image_size: pixels a side; 0 if any size goes.
        patch: pixels between neighboring output positions.
        dim: width of the pooled state.
        has_class_token: whether the first output token is a class token.
    """

    @property
    def image_size(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def has_class_token(self) -> bool: ...
    def build(self) -> nn.Module: ...


class TextTowerConfig(Protocol):
    """Sizes of a text tower.

    Attributes:
        vocab: rows of the token embedding.
        positions: greatest number of tokens; 0 if there is no limit.
        dim: width of the states.
    """

    @property
    def vocab(self) -> int: ...
    @property
    def positions(self) -> int: ...
    @property
    def dim(self) -> int: ...


class NetworkConfig(Protocol):
    """Config of a network.

    Attributes:
        vision: the image tower's, or that of the tower that draws.
        text: of the tower that reads what a caller writes.
        labels: names of fine-tuned classes, () if there are none.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vision(self) -> ImageTowerConfig: ...
    @property
    def text(self) -> TextTowerConfig: ...
    @property
    def labels(self) -> tuple[str, ...]: ...


@runtime_checkable
class Network(Protocol):
    """Network of any family.

    Attributes:
        config: its sizes.
        capabilities: the verbs that this checkpoint's parts allow; keys of `checkpoints.catalog.CAPABILITIES`.
        objectives: the training objectives that its parts allow; of `training.config.OBJECTIVES`.
    """

    @property
    def config(self) -> NetworkConfig: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def objectives(self) -> frozenset[str]: ...


@runtime_checkable
class ImageNetwork(Protocol):
    """Network that reads images: each one but those that draw.

    Methods:
        encode_image: pixels `[B, 3, H, W]` -> tokens `[B, N, D]`, pooled `[B, D]` or None.
    """

    @property
    def config(self) -> NetworkConfig: ...
    def encode_image(self, pixels: Tensor) -> Encoded: ...


@runtime_checkable
class TiledNetwork(Protocol):
    """Network that reads an image as tiles (LLaVA 1.6).

    Methods:
        encode_tiles: pixels `[B, 3, (1 + tiles) * S, S]` and their layout -> tokens `[B, N, D]`.
    """

    def encode_tiles(self, pixels: Tensor, grid: tuple[int, int, int, int]) -> Encoded: ...


@runtime_checkable
class Embedder(Protocol):
    """Network that embeds images and texts as unit vectors of one space.

    Attributes:
        activation: how the logits of zero-shot classes are read.
        embeds_first_token: whether an image's embedding depends on its first token alone.
        embed_dim: P, 0 without the projections.

    Methods:
        embed_image: B encoded images -> `[B, P]`, or `[B, Q, P]` for several vectors an image.
        embed_text: ids `[R, L]`, lengths `[R]` -> `[R, P]`.
        class_logits: cosines of any shape -> logits of the same shape.
    """

    @property
    def activation(self) -> LogitActivation: ...
    @property
    def embeds_first_token(self) -> bool: ...
    @property
    def embed_dim(self) -> int: ...
    def embed_image(self, image: Encoded) -> Tensor: ...
    def embed_text(self, ids: Tensor, lengths: Tensor) -> Tensor: ...
    def class_logits(self, similarity: Tensor) -> Tensor: ...


@runtime_checkable
class LabelClassifier(Protocol):
    """Network that can be fine-tuned for classes.

    Methods:
        label_logits: B encoded images -> `[B, C]`.
        add_label_head: replaces the head by one for these classes and returns it, to be initialized.
    """

    def label_logits(self, image: Encoded) -> Tensor: ...
    def add_label_head(self, labels: tuple[str, ...]) -> nn.Module: ...


@runtime_checkable
class Matcher(Protocol):
    """Network with an ITM head.

    Attributes:
        pad_id: id of padding.
        match_cosine: weight of the ITC cosine in the logit of "match"; None if it cannot be added.

    Methods:
        match_logits: ids `[R, L]`, lengths `[R]` over B images, R a multiple of B, the texts of one image together ->
            `[R, 2]`, (no match, match).
        calibrate_match: subtracts a threshold from the logit of "match", and sets the weight of the ITC cosine.
    """

    @property
    def pad_id(self) -> int: ...
    @property
    def match_cosine(self) -> float | None: ...
    def match_logits(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Tensor: ...
    def calibrate_match(self, threshold: float, match_cosine: float) -> None: ...


@runtime_checkable
class EmbeddingMatcher(Protocol):
    """Embedder and matcher whose ITM head may judge from the vectors of ITC alone (late fusion).

    Attributes:
        matches_embeddings: whether it does.

    Methods:
        match_embeddings: unit vectors of B images `[B, P]` and of their texts `[R, P]`, those of one image together ->
            `[R, 2]`, as `match_logits`.
    """

    @property
    def matches_embeddings(self) -> bool: ...
    def match_embeddings(self, image: Tensor, text: Tensor) -> Tensor: ...


class WatchedAttention(Protocol):
    """Attention layer whose weights can be seen.

    Attributes:
        watcher: sees the attention weights `[B, H, Q, N]` and returns those to use; None for none.
    """

    watcher: Callable[[Tensor], Tensor] | None


class PatchAttention(NamedTuple):
    """Attention layers through which a score reads the patches of an image.

    Attributes:
        layers: in the order of the forward pass.
        rows: what asks: the words of the "text", the image's "class" token (the first row), or learned "queries".
        skip: image tokens before the patches (1 for a class token).
    """

    layers: Sequence[WatchedAttention]
    rows: Literal["text", "class", "queries"]
    skip: int


@runtime_checkable
class AttentiveTower(Protocol):
    """Image tower whose pooled state reads patches by attention."""

    def patch_attention(self) -> PatchAttention | None: ...


@runtime_checkable
class Explainable(Protocol):
    """Network whose scores can be traced to patches.

    Methods:
        patch_attention: of the score "match" (ITM) or "similarity" (cosine); None if that is not known.
    """

    def patch_attention(self, score: Literal["match", "similarity"]) -> PatchAttention | None: ...


class DecoderState(Protocol):
    """What a text decoder keeps between steps.

    Methods:
        select: row i continues from row `rows[i]`, `[R']`.
    """

    def select(self, rows: Tensor) -> None: ...


StateT = TypeVar("StateT", bound=DecoderState)


class TextDecoder(Protocol[StateT]):
    """Autoregressive text decoder over memories.

    Methods:
        start: a state with one row a memory, tokens `[B, N, D]`, for up to `capacity` tokens a row.
        next_logits: appends ids `[R, L]` to the rows -> logits `[R, V]` of the token after them.
        all_logits: appends ids `[R, L]` -> logits `[R, L, V]` of the token after each of them.
    """

    def start(self, memory: Encoded, capacity: int) -> StateT: ...
    def next_logits(self, ids: Tensor, state: StateT) -> Tensor: ...
    def all_logits(self, ids: Tensor, state: StateT) -> Tensor: ...


class DecoderConfig(NetworkConfig, Protocol):
    """Config of a network with its own decoder.

    Attributes:
        start_id: first id that the decoder reads.
        end_id: EOS.
    """

    @property
    def start_id(self) -> int: ...
    @property
    def end_id(self) -> int: ...


@runtime_checkable
class DecoderNetwork(Protocol):
    """Network whose decoder cross-attends to image tokens, or to a question's states (BLIP).

    Methods:
        encode_text: ids `[R, L]`, lengths `[R]`, read beside B images, R a multiple of B -> states `[R, L, D]`.
    """

    @property
    def config(self) -> DecoderConfig: ...
    @property
    def decoder(self) -> TextDecoder[Any]: ...
    def encode_text(self, image: Encoded, ids: Tensor, lengths: Tensor) -> Encoded: ...


class PromptedConfig(NetworkConfig, Protocol):
    """Config of a network that is prompted.

    Attributes:
        image_id: id of one image token in a prompt; it may lie beyond the vocabulary.
        start_ids: ids that its texts start from; () if they continue the prompt.
        end_id: EOS.
    """

    @property
    def image_id(self) -> int: ...
    @property
    def start_ids(self) -> tuple[int, ...]: ...
    @property
    def end_id(self) -> int: ...


@runtime_checkable
class PromptedNetwork(Protocol):
    """Network that reads images among the words of a prompt (BLIP-2, Florence-2, PaliGemma, LLaVA).

    Attributes:
        prompts: task -> its prompt, with IMAGE_PLACEHOLDER for the image and "{}" for the caller's words; "prompt" is
            the form of free words.
        answer_start: ids that every answer begins with, after `config.start_ids`.
        language: the decoder that continues the prompt, or reads what an encoder made of it.

    Methods:
        build_prefix: image tokens `[K, D]` of all rows in order, ids `[R, L]`, padded in front where valid_mask
            `[R, L]` is False -> what `language` starts from.
    """

    @property
    def config(self) -> PromptedConfig: ...
    @property
    def prompts(self) -> Mapping[str, str]: ...
    @property
    def answer_start(self) -> tuple[int, ...]: ...
    @property
    def language(self) -> TextDecoder[Any]: ...
    def build_prefix(self, image_tokens: Tensor, ids: Tensor, valid_mask: Tensor) -> Encoded: ...


@runtime_checkable
class ChatNetwork(Protocol):
    """Network with a chat template.

    Methods:
        render_chat: the prompt of a conversation, with IMAGE_PLACEHOLDER for each image.
    """

    def render_chat(self, messages: Sequence[Message]) -> str: ...


@runtime_checkable
class RegionNetwork(Protocol):
    """Prompted network that writes regions as location tokens (Florence-2, PaliGemma).

    Attributes:
        region_formats: task -> the format of its text, a key of `tasks.region_parser.PARSERS`.
        phrase_separator: what joins several phrases in one prompt; "" if it takes one at a time.
        ignored_phrases: phrases whose boxes are left out; None for the usual ones.
    """

    @property
    def region_formats(self) -> Mapping[str, str]: ...
    @property
    def phrase_separator(self) -> str: ...
    @property
    def ignored_phrases(self) -> Sequence[str] | None: ...


# Networks that draw.


class Sampler(Protocol):
    """Solver of one batch of drawings, from noise to latents; what it remembers between steps is its own.

    Attributes:
        times: time of each evaluation of the network, float `[n]`, as `DrawNetwork.denoise` reads it.

    Methods:
        begin: noise `[B, C, h, w]`, and the latents of images to start from or None -> latents of the first evaluation.
        scale: latents -> what the network reads of them at evaluation `index`.
        step: latents and prediction of evaluation `index`, and what draws further noise `[B, C, h, w]`, from each
            image's own generator -> latents of the next evaluation, after the last one the result.
    """

    @property
    def times(self) -> Tensor: ...
    def begin(self, noise: Tensor, clean: Tensor | None) -> Tensor: ...
    def scale(self, latents: Tensor, index: int) -> Tensor: ...
    def step(
        self, latents: Tensor, prediction: Tensor, index: int, draw_noise: Callable[[], Tensor]
    ) -> Tensor: ...


@runtime_checkable
class DrawNetwork(Protocol):
    """Network that draws images of texts, by denoising latents (Ho et al. 2020; Liu et al. 2022).

    Pixels are those of its `ImageSpec`, normalized; latents are the pixels themselves, or an autoencoder's.

    Attributes:
        draw_defaults: size, steps, guidance and sampler where a caller names none.
        samplers: names of the samplers it has; other names are refused.

    Methods:
        encode_prompts: ids `[R, L]`, lengths `[R]` -> tokens `[R, N, D]`, mask `[R, N]`, pooled `[R, D]`, as `denoise`
            reads them. Guidance leads away from the empty text, or from the caller's `negative`.
        latent_shape: (height, width) in pixels -> (C, h, w). Raises UsageError for a size that cannot be drawn.
        denoise: latents `[B, C, h, w]`, times `[B]` and B encoded prompts -> the prediction `[B, C, h, w]` that its
            samplers expect (noise, velocity or flow).
        decode_latents: `[B, C, h, w]` -> pixels `[B, 3, H, W]`.
        encode_pixels: `[B, 3, H, W]` -> latents `[B, C, h, w]`.
    """

    @property
    def draw_defaults(self) -> DrawSettings: ...
    @property
    def samplers(self) -> tuple[str, ...]: ...
    def encode_prompts(self, ids: Tensor, lengths: Tensor) -> Encoded: ...
    def latent_shape(self, size: Size) -> tuple[int, int, int]: ...
    def denoise(self, latents: Tensor, times: Tensor, prompts: Encoded) -> Tensor: ...
    def decode_latents(self, latents: Tensor) -> Tensor: ...
    def encode_pixels(self, pixels: Tensor) -> Tensor: ...


@runtime_checkable
class FlowNetwork(Protocol):
    """Drawing network whose prediction is the rectified flow, noise less image, at times from 1 (noise) to 0 (image).

    It is sampled and trained by `tasks.denoise` and `objectives.flow`.

    Methods:
        time_shift: (height, width) in pixels -> s of Esser et al. 2024, equation 23; 1 for none.
    """

    def time_shift(self, size: Size) -> float: ...


@runtime_checkable
class ScheduledNetwork(Protocol):
    """Drawing network with samplers of its own, beside whose noise schedule it was trained.

    Methods:
        build_sampler: a new sampler for these settings.
    """

    def build_sampler(self, settings: DrawSettings) -> Sampler: ...


# Networks in training.


@runtime_checkable
class TemperatureNetwork(Protocol):
    """Network whose ITC similarities are divided by a learned temperature, scalar."""

    @property
    def temperature(self) -> Tensor: ...


@runtime_checkable
class ScaleNetwork(Protocol):
    """Network whose cosines are multiplied by exp(logit_scale), scalar (CLIP, SigLIP)."""

    @property
    def logit_scale(self) -> Tensor: ...


@runtime_checkable
class BiasNetwork(Protocol):
    """Network with a learned bias on every pair's logit, scalar (SigLIP)."""

    @property
    def logit_bias(self) -> Tensor: ...


@runtime_checkable
class LanguageModelingNetwork(Protocol):
    """Network that learns to write captions or answers.

    Methods:
        frame_text: ids `[R, L]`, lengths `[R]` of tokenized texts -> ids and lengths as the decoder reads them.
        decoder_states: ids `[R, L]` over B memories, R a multiple of B -> states `[R, L, D]`.
        lm_logits: states `[..., D]` -> `[..., V]`.
    """

    def frame_text(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]: ...
    def decoder_states(self, memory: Encoded, ids: Tensor) -> Tensor: ...
    def lm_logits(self, states: Tensor) -> Tensor: ...


def require(network: object, protocol: type[P]) -> P:
    """The network as one of the protocols above. Raises TypeError if it lacks a member."""
    if not isinstance(network, protocol):
        raise TypeError(f"{type(network).__name__} is no {protocol.__name__}")
    return network
