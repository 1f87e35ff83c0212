"""The settings of a training run, as frozen dataclasses: from JSON and `--set`, checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sightloop.data.images.augment import Augment
from sightloop.errors import UsageError
from sightloop.training.config_parser import from_dict, set_option
from sightloop.training.optimizer import OptimizerConfig
from sightloop.training.schedule import ScheduleConfig
from sightloop.types import JsonDict, JsonMapping

OBJECTIVES = ("itc", "itm", "lm", "vqa", "prompted", "clip", "siglip", "mlm", "mim", "classes")


# What becomes of a part that is switched off when something in it is set.
_MADE = {"data.augment": lambda: dataclasses.asdict(Augment())}


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What is trained.

    start: a checkpoint that `load` reads; empty for random weights of `size`, a name in `training.model_sizes`.
    vision: a checkpoint whose image tower (of the same shape) takes the place of the random one. language: an OPT or a
    T5 as `transformers` keeps it, which `start`, a BLIP-2 of stage 1, goes on before (stage 2).
    vocabulary: with random weights, a `vocab.txt` or a folder with tokenizer files; empty to learn `words` word pieces
    from the training texts. image_size: pixels a side, 0 for the model's own.
    frozen: patterns of parameters that stay as they are. lora: patterns of linear layers that get a LoRA of `lora_rank`
    and `lora_alpha` while all else is frozen; merged into the result. dropout, drop_path: 0 to 1, while training.
    """

    init_from: str = ""
    size: str = ""
    vision: str = ""
    language: str = ""
    vocabulary: str = ""
    vocab_size: int = 4000
    image_size: int = 0
    frozen: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    lora_rank: int = 8
    lora_alpha: float = 16.0
    dropout: float = 0.0
    drop_path: float = 0.0


@dataclass(frozen=True, slots=True)
class DataSettings:
    """How samples become batches.

    batch: images a step over all processes and chunks. chunk: images at once on one device, 0 for all; the gradient
    is that of the whole batch whatever the chunk. texts, questions: how many of an image's captions and questions
    one visit draws; ITM and MLM read the first caption only. prompt: words put before every caption, not learned.
    max_tokens: longer texts are cut. hidden_words: the share of words in captions that networks do not get to see (they
    become as in MLM), though the decoder still has to write them: against learning few captions by heart.
    regions: how many of an image's things one visit has written down, each with its label and box, behind the prompt
    that asks for them (Florence-2, PaliGemma; as many as `max_tokens` holds); 0 for none. Images without any have no
    such text. names: only things of these names, which are then asked of every image; empty for all that there are.
    augment: None for the plain resize of evaluation; boxes follow crops and flips. cache: decode once, keep images
    of this many pixels a side in memory, 0 for none. workers: threads that decode.
    """

    batch: int = 64
    micro_batch: int = 0
    texts: int = 1
    questions: int = 1
    regions: int = 0
    classes: tuple[str, ...] = ()
    prompt: str = ""
    max_tokens: int = 40
    caption_dropout: float = 0.0
    augment: Augment | None = field(default_factory=Augment)
    cache: int = 0
    workers: int = 2


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """The momentum teacher of ITC: momentum 0 for none; queue: past features kept as negatives; alpha: the weight of
    soft targets, reached linearly over `alpha_epochs` (BLIP's released code: 0.995, 57,600, 0.4, 2)."""

    momentum: float = 0.995
    queue: int = 57_600
    alpha: float = 0.4
    alpha_epochs: float = 2.0


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """data: what `open_dataset` reads, empty for none. every: steps between, 0 for the end only. samples: how many
    images at most. num_beams, max_tokens: of the captions written. show: how many of them are logged. leaks:
    look at the start whether these images or captions are in the training data too."""

    data: str = ""
    every: int = 0
    samples: int = 200
    num_beams: int = 1
    max_tokens: int = 20
    show: int = 8
    leaks: bool = True


@dataclass(frozen=True, slots=True)
class Recipe:
    """One training run.

    terms: objective -> weight. epochs: passes over the data, or `steps` where that is not 0. precision: "float32";
    "medium": float32 with products in bfloat16 where the machine has them; "bfloat16": autocast. recompute: activation
    checkpointing. shard: each of several processes keeps a part of weights and moments (`sharding`); a run may go on
    with or without. ema: momentum of the averaged weights that are evaluated and kept, 0 for none. save_every: steps
    between checkpoints, 0 for once an epoch; keep: how many stay, beside the best. match_weight: how much more a true
    pair counts in ITM than a false one. hard_negatives: the share of ITM's wrong pairs that are drawn by ITC's
    similarities, 1 in the papers; the others are drawn evenly from the batch, so that the judge also meets texts that
    are wholly wrong. calibrate: at the end ITM's threshold, and for BLIP what ITC counts beside it, is set on the
    evaluation data or, without, on images that are kept out of the training (`calibration`); `start` must not know
    them either. masked: the share of patches (MIM) and of words (MLM) to hide.
    """

    name: str
    terms: Mapping[str, float]
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    epochs: float = 10.0
    steps: int = 0
    seed: int = 0
    precision: Literal["float32", "medium", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    shard: bool = False
    ema: float = 0.0
    save_every: int = 0
    keep_last: int = 2
    label_smoothing: float = 0.1
    match_weight: float = 1.0
    hard_negatives: float = 1.0
    calibrate: bool = False
    masked_patches: float = 0.6
    masked_words: float = 0.15


def apply_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """The recipe with `path=value` settings applied, such as `optimizer.lr=1e-4` or `terms.vqa=0.5`.

    A value is JSON, or a plain word where text is expected. Raises UsageError for an unknown name (with the nearest
    ones) or a value of the wrong type, before anything else happens.
    """
    data = to_json(recipe)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write it as name=value, such as optimizer.lr=1e-4")
        set_option(data, path.strip(), text.strip(), made=_MADE, free=("terms",))
    return from_json(data)


def to_json(recipe: Recipe) -> JsonDict:
    """Plain values that JSON can hold, and `from_json` reads back equal."""
    return json.loads(json.dumps(dataclasses.asdict(recipe) | {"terms": dict(recipe.terms)}))


def from_json(data: JsonMapping) -> Recipe:
    """A recipe from plain values; UsageError names what is unknown, ill-typed or out of range."""
    recipe: Recipe = from_dict(Recipe, data, "")
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """What types cannot say."""
    unknown = sorted(set(recipe.terms) - set(OBJECTIVES))
    wrong = {
        f"terms: {', '.join(unknown)} is no objective; there are {', '.join(OBJECTIVES)}": bool(unknown),
        "terms: at least one objective needs a weight above 0": not any(w > 0 for w in recipe.terms.values()),
        "terms: a weight must not be below 0": any(w < 0 for w in recipe.terms.values()),
        "model.init_from, model.size: one of them is needed": not (
            recipe.model.init_from or recipe.model.size
        ),
        "data.batch: must be at least 2, as images are told from each other": recipe.data.batch < 2,
        "data.micro_batch: must not be below 0": recipe.data.micro_batch < 0,
        "data.texts, data.questions: must be at least 1, or 0 with data.regions": (
            min(recipe.data.texts, recipe.data.questions) < (not recipe.data.regions)
        ),
        "data.regions: must not be below 0": recipe.data.regions < 0,
        "data.regions: only the objective `prompted` learns to write boxes; give it a weight": (
            recipe.data.regions > 0 and not recipe.terms.get("prompted")
        ),
        "data.regions: boxes do not follow the shears and turns of RandAugment; set data.augment.randaugment=null, or "
        "data.augment=null": (
            recipe.data.regions > 0
            and recipe.data.augment is not None
            and recipe.data.augment.randaugment is not None
        ),
        "data.caption_dropout: must be in [0, 1)": not 0 <= recipe.data.caption_dropout < 1,
        "data.workers: must be at least 1": recipe.data.workers < 1,
        "data.max_tokens: must be at least 3": recipe.data.max_tokens < 3,
        "teacher.momentum: must be in [0, 1)": not 0 <= recipe.teacher.momentum < 1,
        "teacher.queue: must not be below 0": recipe.teacher.queue < 0,
        "ema: must be in [0, 1)": not 0 <= recipe.ema < 1,
        "steps, epochs: one of them must be above 0": recipe.steps <= 0 and recipe.epochs <= 0,
        "keep: must be at least 1": recipe.keep_last < 1,
        "hard_negatives: must be from 0 to 1": not 0 <= recipe.hard_negatives <= 1,
        "smoothing: must be in [0, 1)": not 0 <= recipe.label_smoothing < 1,
        "masked_patches, masked_words: must be between 0 and 1": not (
            0 < recipe.masked_patches < 1 and 0 < recipe.masked_words < 1
        ),
        "optimizer.lr: must be above 0": recipe.optimizer.lr <= 0,
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(text)
