"""Builder of the network, tokenizer and image preprocessing that a recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from sightloop.checkpoints.hub import locate
from sightloop.checkpoints.registry import FAMILIES
from sightloop.data.datasets.dataset import Dataset
from sightloop.data.text.load import load_tokenizer_of_kind
from sightloop.data.text.tokenizer import Tokenizer
from sightloop.data.text.train_tokenizer import train_bpe, train_sentencepiece, train_wordpiece
from sightloop.errors import SightloopError, UsageError
from sightloop.inference.load import load
from sightloop.models.blip import BlipConfig
from sightloop.nn.attention import Linear
from sightloop.nn.init import initialize
from sightloop.nn.prepack import unpack, use_training_kernels
from sightloop.nn.regularization import set_regularization
from sightloop.protocols import (
    BiasNetwork,
    LabelClassifier,
    Network,
    NetworkConfig,
    PromptedNetwork,
    RegionNetwork,
    require,
)
from sightloop.ranking.dialogue_network import DialogueNetwork
from sightloop.towers.dit import DitConfig
from sightloop.towers.efficientnet import EfficientNet, EfficientNetConfig
from sightloop.towers.text import TextTower
from sightloop.towers.vit import VitConfig
from sightloop.training.config import ModelSettings, Recipe
from sightloop.training.dataloader import PromptFormat
from sightloop.training.dialogue_rows import dialogue_attributes
from sightloop.training.heads import WordHead
from sightloop.training.label_texts import LabelTexts
from sightloop.training.model_sizes import SIZES, SizedConfig, fit_to_tokenizer, with_fusion
from sightloop.types import IMAGE_PLACEHOLDER, ImageSpec, TokenizerKind

ConfigT = TypeVar("ConfigT", bound=NetworkConfig)


@dataclass(frozen=True, slots=True, eq=False)
class TrainableModel:
    """A network with everything that a checkpoint of it needs.

    Args:
        name: of the model.
        family: of the network, a key of `checkpoints.registry.FAMILIES`.
        network: the network, on the CPU.
        tokenizer: of its texts.
        image_spec: preprocessing of its images.
        heads: modules that only training needs.
        labels: class names, () if the recipe learns no classes.
        attributes: names of those of answers; None if the recipe learns no dialogues.
    """

    name: str
    family: str
    network: nn.Module
    tokenizer: Tokenizer
    image_spec: ImageSpec
    heads: nn.ModuleDict
    labels: tuple[str, ...]
    attributes: tuple[str, ...] | None = None

    @property
    def prompts(self) -> PromptFormat | None:
        """Prompts and answers as a prompted network expects them; None for other networks."""
        network = self.network
        if not isinstance(network, PromptedNetwork):
            return None
        end_id, begin = network.config.end_id, network.answer_start
        if not isinstance(network, RegionNetwork):
            return PromptFormat(network.prompts, end_id, begin)
        return PromptFormat(network.prompts, end_id, begin, network.region_formats, network.phrase_separator)


def build_model(recipe: Recipe, dataset: Dataset, folder: Path) -> TrainableModel:
    """Builds a recipe's networks on the CPU, with their first weights.

    Args:
        recipe: its `model` settings choose the checkpoint, or the size for random weights.
        dataset: texts for a learned vocabulary, names of classes.
        folder: of the run; a learned vocabulary is saved here, and read again on resume.

    Raises:
        CheckpointError, TokenizerError: a checkpoint or vocabulary is missing or damaged.
        UsageError: settings, data and network do not fit each other.
    """
    settings = recipe.model
    if settings.init_from:
        loaded = load(settings.init_from, device="cpu")
        network, family, tokenizer, spec = loaded.module, loaded.family, loaded.tokenizer, loaded.image_spec
        unpack(network)
        if settings.image_size:
            network, spec = _resized(network, family, spec, settings.image_size)
        name = settings.init_from
    else:
        network, family, tokenizer, spec = _from_random(recipe, dataset, folder)
        name = recipe.name
    if settings.language:
        network, tokenizer = _add_language(network, family, settings, recipe.seed)
    if settings.vision:
        _load_vision(network, family, settings.vision)
    _check_objectives(recipe, network)
    labels = _labels(dataset) if recipe.terms.get("classes") else ()
    if labels and require(network, Network).config.labels != labels:
        initialize(require(network, LabelClassifier).add_label_head(labels), recipe.seed + 1)
    attributes = _prepare_dialogue(recipe, dataset, network)
    network.requires_grad_(True)
    heads = _heads(recipe, network, tokenizer)
    set_regularization(network, dropout=settings.dropout, drop_path=settings.drop_path)
    use_training_kernels(network)
    use_training_kernels(heads)
    return TrainableModel(name, family, network, tokenizer, spec, heads, labels, attributes)


def _add_language(
    network: nn.Module, family: str, settings: ModelSettings, seed: int
) -> tuple[nn.Module, Tokenizer]:
    """Stage 2 of BLIP-2: a language model after the queries of a stage 1."""
    add = FAMILIES[family].add_language_model
    if add is None:
        raise UsageError(
            f"model.language={settings.language}: needs a BLIP-2 of stage 1; set model.init_from to one (the "
            "result of blip2_stage1)"
        )
    located = locate(settings.language)
    tokenizer = load_tokenizer_of_kind(
        Path(settings.vocabulary) if settings.vocabulary else located.folder,
        "language",
        max_length=(located.config or {}).get("max_position_embeddings", 0),
    )
    return add(network, located, tokenizer.token_id(IMAGE_PLACEHOLDER), seed), tokenizer


def _from_random(
    recipe: Recipe, dataset: Dataset, folder: Path
) -> tuple[nn.Module, str, Tokenizer, ImageSpec]:
    settings = recipe.model
    if settings.size not in SIZES:
        raise UsageError(f"model.size={settings.size}: no such size; choose from {', '.join(SIZES)}")
    family, config = SIZES[settings.size]
    if settings.fusion != "cross":
        config = _with_fusion(config, settings)
    if settings.image_size:
        config = _with_image_size(config, settings.image_size)
    kind, texts = FAMILIES[family].tokenizer_of(config), _texts(dataset, LabelTexts(recipe.data.label_texts))
    tokenizer = _tokenizer(kind, settings, texts, folder, config.text.positions)
    config = fit_to_tokenizer(config, tokenizer.vocab_size, tokenizer.token_id)
    network = FAMILIES[family].network(config)
    initialize(network, recipe.seed)
    if isinstance(network, BiasNetwork):
        # SigLIP starts at -10, near -ln of its batch of 32k; small batches that start there collapse to one point.
        network.logit_bias.data.fill_(-math.log(recipe.data.batch))
    side = config.vision.image_size
    image = FAMILIES[family].default_image(config)
    mean, std = tuple(image["image_mean"]), tuple(image["image_std"])
    return network, family, tokenizer, ImageSpec(resize=(side, side), mean=mean, std=std)


def _with_fusion(config: SizedConfig, settings: ModelSettings) -> BlipConfig:
    if not isinstance(config, BlipConfig):
        raise UsageError(
            f"model.fusion={settings.fusion}: {settings.size} is no BLIP; choose a model.size of BLIP, or "
            "model.fusion=cross"
        )
    return with_fusion(config, settings.fusion)


def _with_image_size(config: ConfigT, side: int) -> ConfigT:
    vision = config.vision
    if not isinstance(vision, (VitConfig, EfficientNetConfig, DitConfig)):
        raise UsageError(f"model.image_size={side}: this image tower has one size; set model.image_size=0")
    if side % vision.patch:
        raise UsageError(f"model.image_size={side}: must be a multiple of {vision.patch}, the patch size")
    return replace(config, vision=replace(vision, image_size=side))


def _resized(network: nn.Module, family: str, spec: ImageSpec, side: int) -> tuple[nn.Module, ImageSpec]:
    """The network for images of another size, its position embeddings interpolated (ViT, section 3.2)."""
    old_config = require(network, Network).config
    config = _with_image_size(old_config, side)
    new = FAMILIES[family].network(config)
    tensors = network.state_dict()
    name = "vision.embed.position" if "vision.embed.position" in tensors else "vision.position"
    before, after = (c.vision.image_size // c.vision.patch for c in (old_config, config))  # patches a side
    # [1, D] of the class token or [0, D], and [before^2, D] of the patches
    first, table = tensors[name].split([len(tensors[name]) - before**2, before**2])
    grid = table.T.reshape(1, -1, before, before)  # [1, D, before, before]
    grid = nn.functional.interpolate(grid, size=(after, after), mode="bicubic", antialias=after < before)
    tensors[name] = torch.cat([first, grid.flatten(2)[0].T])  # [after^2 (+ 1), D]
    new.load_state_dict(tensors)
    if spec.crop:
        return new, replace(spec, crop=(side, side), shortest_edge=side if spec.shortest_edge else None)
    return new, replace(spec, resize=(side, side))


def _tokenizer(
    kind: TokenizerKind, settings: ModelSettings, texts: Iterator[str], folder: Path, positions: int
) -> Tokenizer:
    path = Path(settings.vocabulary) if settings.vocabulary else folder / "vocabulary"
    if not settings.vocabulary and not path.exists():
        path.mkdir(parents=True)
        if kind == "clip":
            train_bpe(texts, settings.vocab_size, path)
        elif kind == "pieces":
            train_sentencepiece(texts, settings.vocab_size, path)
        else:
            train_wordpiece(texts, settings.vocab_size, path / "vocab.txt")
    if not path.exists():
        raise UsageError(f"model.vocabulary={settings.vocabulary}: no such file or folder")
    return load_tokenizer_of_kind(path, kind, max_length=positions)


def _texts(dataset: Dataset, source: LabelTexts) -> Iterator[str]:
    candidates: set[str] = set()  # of dialogues; each counts once
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except SightloopError:
            continue  # reported when a batch needs it
        yield from source.texts(sample)
        for question in sample.questions:
            yield question.question
            yield from question.answers
        for dialogue in sample.dialogues:
            yield dialogue.caption
            for one in dialogue.rounds:
                yield one.question
                yield f"{one.answer or ''}."  # as a dialogue is read
                yield from (text for text in one.candidates if text not in candidates)
                candidates.update(one.candidates)


def _prepare_dialogue(recipe: Recipe, dataset: Dataset, network: nn.Module) -> tuple[str, ...] | None:
    """Names of the attributes of answers that a recipe of dialogues learns, for which the network gets a head."""
    if not recipe.terms.get("dialogue") and not recipe.terms.get("reply"):
        return None
    names = dialogue_attributes(dataset) if recipe.terms.get("attributes") else ()
    head = require(network, DialogueNetwork).learn_dialogue(names)
    if head is not None:
        initialize(head, recipe.seed + 1)
    return names


def _labels(dataset: Dataset) -> tuple[str, ...]:
    labels: set[str] = set()
    for index in range(len(dataset)):
        try:
            label = dataset[index].label
        except SightloopError:
            continue
        if label is not None:
            labels.add(label)
    if len(labels) < 2:
        raise UsageError(
            "the objective `classes` needs data with at least two labels (a folder for each class)"
        )
    return tuple(sorted(labels))


def _load_vision(network: nn.Module, family: str, source: str) -> None:
    tower, read = network.get_submodule("vision"), FAMILIES[family].read_vision
    if isinstance(tower, EfficientNet) and read is not None and source.endswith(".pth"):
        tower.load_state_dict(tower.state_dict() | read(source))
        return
    other = load(source, device="cpu").module
    unpack(other)
    tower, config = require(other, Network).config.vision, require(network, Network).config.vision
    if tower != config:
        raise UsageError(f"model.vision={source}: its image tower is {tower}, the model's is {config}")
    network.get_submodule("vision").load_state_dict(other.get_submodule("vision").state_dict())


def _check_objectives(recipe: Recipe, network: nn.Module) -> None:
    """Raises UsageError if an objective needs a part that the network lacks."""
    name = recipe.model.init_from or recipe.model.size
    if recipe.data.regions and not (
        isinstance(network, RegionNetwork) and {"boxes", "located"} & {*network.region_formats.values()}
    ):
        raise UsageError(
            f"data.regions: {name} generates no boxes; set model.init_from to a Florence-2 or "
            "PaliGemma, or data.regions=0"
        )
    if recipe.data.classes and not (isinstance(network, RegionNetwork) and network.phrase_separator):
        raise UsageError(f"data.classes: {name} detects all objects at once; leave data.classes out")
    objectives = require(network, Network).objectives
    for term, weight in recipe.terms.items():
        if weight > 0 and term not in objectives:
            raise UsageError(
                f"terms.{term}: {name} lacks a part that this objective trains; "
                f"set terms.{term}=0, or choose another model"
            )
    if recipe.data.micro_batch and any(isinstance(part, nn.BatchNorm2d) for part in network.modules()):
        raise UsageError(
            f"data.micro_batch: {name} has batch norm, which depends on the whole batch; "
            "set data.micro_batch=0"
        )


def _heads(recipe: Recipe, network: nn.Module, tokenizer: Tokenizer) -> nn.ModuleDict:
    """Modules that only training needs: BERT's head for `mlm`, a linear head for `mim`."""
    heads = nn.ModuleDict()
    encoder = require(network.get_submodule("encoder"), TextTower) if recipe.terms.get("mlm") else None
    if encoder is not None:
        heads["mlm"] = WordHead(encoder.config, tokenizer.token_id("[MASK]"))
    if recipe.terms.get("mim"):
        vision = require(network, Network).config.vision
        heads["mim"] = Linear(vision.dim, 3 * vision.patch**2)
    initialize(heads, recipe.seed + 1)
    if encoder is not None:
        require(heads["mlm"], WordHead).words.weight = encoder.word_weight
    return heads
