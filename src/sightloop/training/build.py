"""What a recipe trains, made ready: networks with their weights, the tokenizer, how images are prepared."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sightloop.checkpoints.blip2 import IGNORED, language_model_keys, stage2_config
from sightloop.checkpoints.hub import locate
from sightloop.checkpoints.key_map import load_weights
from sightloop.checkpoints.registry import FAMILIES
from sightloop.checkpoints.tensors import read_tensors
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.text.sentencepiece import load_sentencepiece
from sightloop.data.text.tokenizer import (
    Tokenizer,
    bert_tokenizer_from_vocab,
    clip_tokenizer_from_bpe,
    load_tokenizer,
)
from sightloop.data.text.train_tokenizer import train_bpe, train_sentencepiece, train_wordpiece
from sightloop.errors import SightloopError, UsageError
from sightloop.inference.load import NO_LIMIT, load
from sightloop.inference.prompting import IMAGE_PLACEHOLDER
from sightloop.models.blip import Blip, LmHead
from sightloop.models.blip2 import Blip2
from sightloop.models.florence import Florence
from sightloop.nn.attention import Linear
from sightloop.nn.init import initialize
from sightloop.nn.prepack import unpack, use_training_kernels
from sightloop.nn.regularization import set_regularization
from sightloop.towers.vit import VitConfig
from sightloop.training.config import ModelSettings, Recipe
from sightloop.training.dataloader import PromptFormat
from sightloop.training.model_sizes import SIZES, fitted
from sightloop.types import ImageSpec


@dataclass(frozen=True, slots=True, eq=False)
class TrainableModel:
    """A network with everything that its result folder needs."""

    name: str
    family: str
    network: Any
    tokenizer: Tokenizer
    image_spec: ImageSpec
    heads: nn.ModuleDict
    labels: tuple[str, ...]

    @property
    def forms(self) -> PromptFormat | None:
        """How it is asked, if it writes on from a prompt."""
        if not hasattr(self.network, "build_prefix"):
            return None
        config = self.network.config
        begin = (config.bos_id,) if isinstance(self.network, Florence) else ()
        finds, joint = (
            getattr(self.network, "region_formats", {}),
            getattr(self.network, "phrase_separator", ""),
        )
        return PromptFormat(self.network.prompts, config.end_id, begin, finds, joint)


class WordHead(LmHead):
    """BERT's head for hidden words, with the id that hides them."""

    def __init__(self, config: Any, mask_id: int) -> None:
        super().__init__(config)
        self.mask_id = mask_id


def build_model(recipe: Recipe, dataset: Dataset, folder: Path) -> TrainableModel:
    """The recipe's networks on the CPU, ready to learn. A learned vocabulary is kept in `folder` and found there again.

    Raises CheckpointError, TokenizerError or UsageError that say what is missing or does not fit.
    """
    settings = recipe.model
    if settings.init_from:
        loaded = load(settings.init_from, device="cpu")
        network, family, tokenizer, spec = loaded.network, loaded.family, loaded.tokenizer, loaded.image_spec
        unpack(network)
        if settings.image_size:
            network, spec = _resized(network, family, spec, settings.image_size)
        name = settings.init_from
    else:
        network, family, tokenizer, spec = _from_random(recipe, dataset, folder)
        name = recipe.name
    if settings.language:
        network, tokenizer = _before_language(network, settings, recipe.seed)
    if settings.vision:
        _start_vision(network, settings.vision)
    _check_terms(recipe, network)
    labels = _labels(dataset) if recipe.terms.get("classes") else ()
    if labels:
        _give_classes(network, labels, recipe.seed + 1)
    network.requires_grad_(True)
    heads = _heads(recipe, network, tokenizer)
    set_regularization(network, dropout=settings.dropout, drop_path=settings.drop_path)
    use_training_kernels(network)
    use_training_kernels(heads)
    return TrainableModel(name, family, network, tokenizer, spec, heads, labels)


def _before_language(first: Any, settings: ModelSettings, seed: int) -> tuple[Blip2, Tokenizer]:
    """BLIP-2's stage 2: the image tower and queries of a stage 1, a new projection, and a language model as
    `transformers` keeps it alone, with its tokenizer."""
    source = settings.language
    if not isinstance(first, Blip2) or first.config.language is not None:
        raise UsageError(
            f"model.language={source}: a BLIP-2 of stage 1 stands before it; name one as model.init_from (the "
            "model of a run of blip2_stage1)"
        )
    located = locate(source)
    tensors, about = read_tensors(located.weights, torch.float32), located.config or {}
    folder = Path(settings.vocabulary) if settings.vocabulary else located.folder
    most = about.get("max_position_embeddings", NO_LIMIT)
    tokenizer = load_sentencepiece(folder, max_length=most, extra_special_token=IMAGE_PLACEHOLDER)
    config = stage2_config(first.config, about, tensors, tokenizer.token_id(IMAGE_PLACEHOLDER))
    words = config.text.vocab
    if config.image_id >= words:
        raise UsageError(f"model.language={source}: its table of {words} words has no row left for images")
    with torch.device("meta"):
        network = Blip2(config)
    part = nn.ModuleDict({"language": network.language})
    if config.encoder is not None:
        part["encoder"] = network.encoder
    load_weights(part, tensors, language_model_keys(config, ""), ignore=IGNORED, source=located.name)
    network.vision, network.queries = first.vision, first.queries
    network.projection = Linear(config.queries.dim, config.text.dim)
    initialize(network.projection, seed)
    return network.eval(), tokenizer


def _from_random(recipe: Recipe, dataset: Dataset, folder: Path) -> tuple[Any, str, Tokenizer, ImageSpec]:
    settings = recipe.model
    if settings.size not in SIZES:
        raise UsageError(f"model.size={settings.size}: there are {', '.join(SIZES)}")
    family, config = SIZES[settings.size]
    if settings.image_size:
        config = _with_side(config, settings.image_size)
    tokenizer = _tokenizer(
        FAMILIES[family].tokenizer_of(config), settings, dataset, folder, config.text.positions
    )
    config = fitted(cast(Any, config), tokenizer.vocab_size, tokenizer.token_id)
    network: Any = FAMILIES[family].network(config)
    initialize(network, recipe.seed)
    if hasattr(network, "logit_bias"):
        # SigLIP's -10 is the odds of its batch of 32k; small batches that start there collapse to one point.
        network.logit_bias.data.fill_(-math.log(recipe.data.batch))
    side = config.vision.image_size
    image = FAMILIES[family].default_image(config)
    mean, std = tuple(image["image_mean"]), tuple(image["image_std"])
    return network, family, tokenizer, ImageSpec(resize=(side, side), mean=mean, std=std)


def _with_side(config: Any, side: int) -> Any:
    if side % config.vision.patch:
        raise UsageError(f"model.image_size={side}: no multiple of {config.vision.patch}, the patch")
    return replace(config, vision=replace(config.vision, image_size=side))


def _resized(network: Any, family: str, spec: ImageSpec, side: int) -> tuple[Any, ImageSpec]:
    """The network for images of another size: its table of positions is stretched (ViT, section 3.2)."""
    config = _with_side(network.config, side)
    new: Any = FAMILIES[family].network(config)
    tensors = network.state_dict()
    name = "vision.embed.position" if "vision.embed.position" in tensors else "vision.position"
    before, after = (c.vision.image_size // c.vision.patch for c in (network.config, config))
    first, table = tensors[name].split([len(tensors[name]) - before**2, before**2])  # a class token's, if any
    grid = table.T.reshape(1, -1, before, before)
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic", antialias=after < before)
    tensors[name] = torch.cat([first, grid.flatten(2)[0].T])
    new.load_state_dict(tensors)
    if spec.crop:
        return new, replace(spec, crop=(side, side), shortest_edge=side if spec.shortest_edge else None)
    return new, replace(spec, resize=(side, side))


def _tokenizer(
    kind: Any, settings: ModelSettings, dataset: Dataset, folder: Path, positions: int
) -> Tokenizer:
    given = Path(settings.vocabulary) if settings.vocabulary else folder / "vocabulary"
    if not settings.vocabulary and not given.exists():
        given.mkdir(parents=True)
        if kind == "clip":
            train_bpe(_texts(dataset), settings.vocab_size, given)
        elif kind == "pieces":
            train_sentencepiece(_texts(dataset), settings.vocab_size, given)
        else:
            train_wordpiece(_texts(dataset), settings.vocab_size, given / "vocab.txt")
    if not given.exists():
        raise UsageError(f"model.vocabulary={settings.vocabulary}: no such file or folder")
    words = given / "vocab.txt" if given.is_dir() else given
    whole = (given / "tokenizer.json").is_file() or (given / "tokenizer_config.json").is_file()
    if kind == "bert" and words.is_file() and not whole:
        return bert_tokenizer_from_vocab(words, max_length=positions)
    if kind == "clip" and given.is_file():
        return clip_tokenizer_from_bpe(given, max_length=positions)
    if kind == "pieces":
        return load_sentencepiece(given, max_length=positions, pad_to_max_length=True)
    return load_tokenizer(given, kind=kind, max_length=positions)


def _texts(dataset: Dataset) -> Iterator[str]:
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except SightloopError:
            continue  # named when its turn comes
        yield from sample.captions
        for question in sample.questions:
            yield question.question
            yield from question.answers


def _labels(dataset: Dataset) -> tuple[str, ...]:
    found: set[str] = set()
    for index in range(len(dataset)):
        try:
            label = dataset[index].label
        except SightloopError:
            continue
        if label is not None:
            found.add(label)
    if len(found) < 2:
        raise UsageError(
            "the objective `classes` needs data with at least two labels (a folder for each class)"
        )
    return tuple(sorted(found))


def _give_classes(network: Any, labels: tuple[str, ...], seed: int) -> None:
    """A new layer for the classes, unless the network has learned these very ones before."""
    if network.config.labels != labels:
        network.config = replace(network.config, labels=labels)
        network.classes = Linear(network.config.vision.dim, len(labels))
        initialize(network.classes, seed)


def _start_vision(network: Any, source: str) -> None:
    other = load(source, device="cpu").network
    unpack(other)
    if other.vision.config != network.vision.config:
        raise UsageError(
            f"model.vision={source}: its image tower is {other.vision.config}, not {network.vision.config}"
        )
    network.vision.load_state_dict(other.vision.state_dict())


def _check_terms(recipe: Recipe, network: Any) -> None:
    """Say at once when an objective asks for a part that the network lacks."""
    name = recipe.model.init_from or recipe.model.size
    is_blip, config = isinstance(network, Blip), network.config
    is_blip2 = isinstance(network, Blip2)
    judges = (is_blip or is_blip2) and config.embed_dim is not None and config.temperature
    writes = is_blip and config.decoder and config.decoder_memory_dim == config.vision.dim
    has = {
        "itc": judges and (is_blip2 or config.encoder),
        "itm": judges and config.matching,
        "lm": (config.writes or config.language is not None) if is_blip2 else writes,
        "vqa": is_blip and config.decoder and config.encoder and config.decoder_memory_dim == config.text.dim,
        "prompted": isinstance(network, Florence)
        or (hasattr(network, "build_prefix") and not config.start_ids),
        "clip": hasattr(network, "logit_scale"),
        "siglip": hasattr(network, "logit_bias"),
        "mlm": is_blip and config.encoder,
        "mim": isinstance(config.vision, VitConfig) and not config.vision.any_size,
        "classes": not is_blip2,
    }
    if recipe.data.regions and not {"boxes", "located"} & set(
        getattr(network, "region_formats", {}).values()
    ):
        raise UsageError(
            f"data.regions: {name} writes no boxes; start from a Florence-2 or a "
            "PaliGemma, or set data.regions=0"
        )
    if recipe.data.classes and not getattr(network, "phrase_separator", ""):
        raise UsageError(f"data.classes: {name} is asked for all things at once; leave them out")
    for term, weight in recipe.terms.items():
        if weight > 0 and not has[term]:
            raise UsageError(
                f"terms.{term}: {name} lacks a part that this objective trains; "
                f"set terms.{term}=0, or start from another model"
            )
    if recipe.data.micro_batch and any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
        raise UsageError(
            f"data.micro_batch: {name} has batch norm, which would see one chunk at a "
            "time; set data.micro_batch=0"
        )


def _heads(recipe: Recipe, network: Any, tokenizer: Tokenizer) -> nn.ModuleDict:
    """What only training needs."""
    heads = nn.ModuleDict()
    config = network.config
    if recipe.terms.get("mlm"):
        heads["mlm"] = WordHead(config.text, tokenizer.token_id("[MASK]"))
    if recipe.terms.get("mim"):
        heads["mim"] = Linear(config.vision.dim, 3 * config.vision.patch**2)
    initialize(heads, recipe.seed + 1)
    if "mlm" in heads:
        cast(WordHead, heads["mlm"]).words.weight = network.encoder.word.weight
    return heads
