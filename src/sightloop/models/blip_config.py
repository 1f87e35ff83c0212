"""Sizes and parts of BLIP (`models.blip`)."""

from __future__ import annotations

from dataclasses import dataclass

from sightloop.models.fusion import FusionKind, fits
from sightloop.protocols import ImageTowerConfig
from sightloop.towers.text import TextConfig
from sightloop.towers.vit import VitConfig


@dataclass(frozen=True, slots=True)
class BlipConfig:
    """Sizes of BLIP's towers, which parts there are, and the special tokens.

    Args:
        vision: the image tower's config: a vision transformer, or an EfficientNet-Lite0.
        text: config of the text encoder and, with another memory, of the text decoder.
        decoder_memory_dim: width of the decoder's memory: image tokens, or in VQA the question's states.
        encoder: whether there is a text encoder.
        decoder: whether there is a text decoder.
        matching: whether there is an ITM head.
        embed_dim: width of the ITC space, None without the projections.
        temperature: whether there is a learned ITC temperature.
        shared: encoder and decoder share all parameters but those of self-attention (the paper's table 3).
        tied_words: the LM head's matrix is the token embedding.
        start_id: id that the decoder reads first ([DEC]).
        end_id: id of EOS ([SEP]).
        pad_id: id of padding.
        encoder_start: id that the text encoder reads first beside an image ([ENC] in the original code); None to keep
            [CLS], as `transformers` does.
        answers: the one decoder captions images and answers questions from their states; it reads both, so image and
            text tower have one width.
        labels: names of fine-tuned classes; a linear head on the class token's state tells them apart.
        match_cosine: weight of the ITC cosine that is added to the ITM logit of "match"; 0 in the paper, set by
            `training.calibration`.
        fusion: how image and text meet; "cross" is BLIP's. For the others `shared` means the embeddings alone.
        fusion_layers: co-attention layers of "both", 0 for the others.
        decoder_layers: layers of the text decoder, 0 for as many as the encoder's.
        dialogue: ITM was trained to tell whether an answer is true in a dialogue (section 5.5).
        attributes: names of what a linear head on ITM's state says of an answer, such as "sensible".

    Raises:
        ValueError: `answers` without encoder and decoder of one width; parts that do not fit the fusion.
    """

    vision: ImageTowerConfig
    text: TextConfig
    decoder_memory_dim: int | None
    encoder: bool
    decoder: bool
    matching: bool
    embed_dim: int | None
    temperature: bool
    shared: bool
    tied_words: bool
    start_id: int
    end_id: int
    pad_id: int
    encoder_start: int | None
    answers: bool = False
    labels: tuple[str, ...] = ()
    match_cosine: float = 0.0
    fusion: FusionKind = "cross"
    fusion_layers: int = 0
    decoder_layers: int = 0
    dialogue: bool = False
    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        widths = {self.vision.dim, self.text.dim, self.decoder_memory_dim}
        if self.answers and (len(widths) > 1 or not (self.encoder and self.decoder)):
            here = f"{self.vision.dim}, {self.text.dim} and {self.decoder_memory_dim}"
            raise ValueError(f"answers: needs an encoder, a decoder and one width of all, not {here}")
        towers = self.encoder and self.embed_dim is not None and self.text.memory_dim is None
        is_stem = isinstance(self.vision, VitConfig) and not self.vision.layers
        is_patches = is_stem and self.vision.dim == self.text.dim
        if not fits(self.fusion, self.fusion_layers, towers=towers, is_patches=is_patches):
            raise ValueError(f"fusion {self.fusion}: does not fit the other parts")
