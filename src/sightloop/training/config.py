"""Settings of a training run: frozen dataclasses, read from JSON and `--set`, validated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sightloop.data.images.augment import Augment
from sightloop.errors import UsageError, refuse_string
from sightloop.training.config_parser import from_dict, set_option
from sightloop.training.optimizer_config import OptimizerConfig
from sightloop.training.schedule import ScheduleConfig
from sightloop.types import JsonDict, JsonMapping

OBJECTIVES = (
    "itc",
    "itm",
    "lm",
    "vqa",
    "prompted",
    "clip",
    "siglip",
    "mlm",
    "mim",
    "classes",
    "dialogue",
    "attributes",
    "reply",
    "flow",
)


# Defaults of a group that is None when one of its settings is set.
_DEFAULTS = {"data.augment": lambda: dataclasses.asdict(Augment())}


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The model and its first weights. One of `init_from` and `size` is required.

    Args:
        init_from: checkpoint that `sightloop.load` reads; "" for random weights.
        size: name in `training.model_sizes.SIZES`, for random weights.
        fusion: where image and text of a BLIP `size` meet: "late", two towers and an MLP on their vectors; "cross",
            BLIP's; "both", co-attention (METER); "early", one stack (ViLT). Each has as many weights as BLIP.
        vision: checkpoint of an image tower of the same shape, loaded over the first weights; "" for none.
        language: OPT or T5 in the layout of `transformers`, appended to a BLIP-2 of stage 1 (stage 2); "" for none.
        vocabulary: `vocab.txt` or folder with tokenizer files, for random weights; "" to learn a vocabulary from the
            training texts.
        vocab_size: tokens of a learned vocabulary.
        image_size: pixels a side; 0 for the model's own.
        frozen: patterns of parameters that are not trained (`training.optimizer`).
        lora: patterns of linear layers that get a LoRA; all other parameters are frozen. Merged into the result.
        lora_rank: rank of the LoRA, at least 1.
        lora_alpha: scale of the LoRA: its output is multiplied by alpha / rank.
        dropout: probability while training, 0..1.
        drop_path: probability of stochastic depth while training, 0..1.
    """

    init_from: str = ""
    size: str = ""
    fusion: Literal["late", "cross", "both", "early"] = "cross"
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
    """Batches: size, texts a sample, augmentation.

    Args:
        batch: images a step, over all processes and micro-batches; at least 2.
        micro_batch: images in one forward pass on a device, 0 for all. The gradient is that of the whole batch.
        texts: captions drawn from each image, at least 1 (0 with `regions`). ITM and MLM read the first one only.
        label_texts: templates with "{}" that make texts of the label of an image without captions (UniCL), such as
            "a photo of a {}."; images and texts of one label match, in whatever template. () if labels are no texts.
        questions: questions drawn from each image, at least 1 (0 with `regions`).
        rounds: rounds drawn from the dialogues about each image, at least 1.
        wrong_answers: wrong answers of each round, drawn from its candidates, at least 1 (3 in BLIP).
        dialogue_captions: share of the images beside which a dialogue's caption is read, 0..1.
        regions: regions drawn from each image, written with label and box as the answer to a detection prompt, as many
            as `max_tokens` holds (Florence-2, PaliGemma); 0 for none.
        classes: labels of the regions to learn, requested of every image; () for the labels of each image.
        prompt: text before every caption; it gets no loss.
        max_tokens: longer texts are truncated; at least 3.
        caption_dropout: share of the input words of captions that are masked as in MLM, 0 up to but without 1; the
            decoder's targets stay. Regularization for few captions.
        augment: random crops, flips, RandAugment; None for the resize of evaluation. Boxes are mapped with the image.
        cache: decoded images are kept in memory at this length of the shorter side in pixels; 0 for no cache.
        workers: decoding threads, at least 1.
        features: folders of cached features of a frozen trunk, which are read instead of images
            (`training.features`); () to read images.
        write_labeled: LM learns the captions of images with a class label too; false where they are made from it.
    """

    batch: int = 64
    micro_batch: int = 0
    texts: int = 1
    label_texts: tuple[str, ...] = ()
    questions: int = 1
    rounds: int = 1
    wrong_answers: int = 3
    dialogue_captions: float = 1.0
    regions: int = 0
    classes: tuple[str, ...] = ()
    prompt: str = ""
    max_tokens: int = 40
    caption_dropout: float = 0.0
    augment: Augment | None = field(default_factory=Augment)
    cache: int = 0
    workers: int = 2
    features: tuple[str, ...] = ()
    write_labeled: bool = True


@dataclass(frozen=True, slots=True)
class TeacherSettings:
    """Momentum teacher of ITC (ALBEF, section 3.2). The defaults are those of BLIP's released code.

    Args:
        momentum: of the EMA, 0 up to but without 1; 0 for no teacher.
        queue: past features kept as negatives; 0 for none.
        alpha: weight of the teacher's soft targets, 0..1.
        alpha_epochs: epochs over which `alpha` is reached, linearly from 0.
    """

    momentum: float = 0.995
    queue: int = 57_600
    alpha: float = 0.4
    alpha_epochs: float = 2.0


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Evaluation during a run.

    Args:
        data: dataset as `open_dataset` reads it; "" for no evaluation.
        every: steps between evaluations; 0 for one at the end.
        samples: greatest number of images.
        num_beams: beams of the captions.
        max_tokens: new tokens of a caption.
        show: captions that are logged.
        leaks: look for these images and captions in the training data at the start, and warn.
    """

    data: str = ""
    every: int = 0
    samples: int = 200
    num_beams: int = 1
    max_tokens: int = 20
    show: int = 8
    leaks: bool = True


@dataclass(frozen=True, slots=True)
class Recipe:
    """Recipe of a training run.

    Args:
        name: of the recipe.
        terms: objective -> weight of its loss, at least 0; keys of `OBJECTIVES`.
        model: the model and its first weights.
        data: batches.
        teacher: momentum teacher of ITC.
        optimizer: AdamW.
        schedule: learning rate over the steps.
        evaluation: evaluation during the run.
        epochs: passes over the data, unless `steps` is set.
        steps: optimizer steps; 0 for `epochs`.
        seed: of first weights, shuffling, augmentation and all draws.
        precision: "float32"; "medium": float32 with matrix products in bfloat16 if the device has them; "bfloat16":
            autocast.
        compile: compile the blocks with torch.compile.
        activation_checkpointing: recompute activations in the backward pass, to save memory.
        shard: shard weights and moments over the processes (FSDP2). A run may be resumed with or without.
        ema: momentum of averaged weights, which are evaluated and saved as the result; 0 for none.
        save_every: steps between checkpoints; 0 for one an epoch.
        keep_last: checkpoints kept besides the best; at least 1.
        label_smoothing: of LM, VQA and classes, 0 up to but without 1.
        match_weight: weight of a true pair in ITM relative to a false one.
        hard_negatives: share of ITM's false pairs that are drawn by ITC similarity, 0..1 (1 in the papers); the others
            are drawn uniformly from the batch.
        calibrate: fit ITM's threshold, and for BLIP the weight of the ITC cosine, at the end: on the evaluation data,
            or on images held out of the training, which `model.init_from` must not have learned either.
        masked_patches: share of patches that MIM hides, between 0 and 1.
        masked_words: share of words that MLM masks, between 0 and 1.
        text_dropout: share of images that the flow learns without their text, for classifier-free guidance, 0..1.
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
    text_dropout: float = 0.1


def apply_settings(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with settings applied.

    Args:
        recipe: unchanged.
        settings: `path=value` each, such as `optimizer.lr=1e-4` or `terms.vqa=0.5`. A value is JSON, or text.

    Raises:
        UsageError: unknown name (the message gives the nearest one), or a value of the wrong type or out of range.
    """
    refuse_string("settings", settings)
    data = to_json(recipe)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting}: write it as name=value, such as optimizer.lr=1e-4")
        set_option(data, path.strip(), text.strip(), defaults=_DEFAULTS, free=("terms",))
    return from_json(data)


def to_json(recipe: Recipe) -> JsonDict:
    """JSON values of a recipe, the inverse of `from_json`."""
    return json.loads(json.dumps(dataclasses.asdict(recipe) | {"terms": dict(recipe.terms)}))


def from_json(data: JsonMapping) -> Recipe:
    """A recipe from JSON values.

    Raises:
        UsageError: a setting is unknown, of the wrong type or out of range.
    """
    recipe = from_dict(Recipe, data, "")
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """Checks ranges, and settings that depend on each other."""
    unknown = sorted(set(recipe.terms) - set(OBJECTIVES))
    wrong = {
        f"terms: {', '.join(unknown)} is no objective; choose from {', '.join(OBJECTIVES)}": bool(unknown),
        "terms: at least one objective needs a weight above 0": not any(w > 0 for w in recipe.terms.values()),
        "terms: a weight must not be below 0": any(w < 0 for w in recipe.terms.values()),
        "model.init_from, model.size: one of them is needed": not (
            recipe.model.init_from or recipe.model.size
        ),
        f"model.fusion={recipe.model.fusion}: a checkpoint has its own; set model.init_from= and a BLIP model.size": (
            recipe.model.fusion != "cross" and bool(recipe.model.init_from)
        ),
        "data.batch: must be at least 2, as a contrast needs negatives": recipe.data.batch < 2,
        "data.micro_batch: must not be below 0": recipe.data.micro_batch < 0,
        "data.texts, data.questions: must be at least 1, or 0 with data.regions": (
            min(recipe.data.texts, recipe.data.questions) < (not recipe.data.regions)
        ),
        'data.label_texts: each template needs one {}, such as ["a photo of a {}."]': any(
            template.count("{}") != 1 for template in recipe.data.label_texts
        ),
        "data.regions: must not be below 0": recipe.data.regions < 0,
        "data.regions: only the objective `prompted` learns boxes; give it a weight": (
            recipe.data.regions > 0 and not recipe.terms.get("prompted")
        ),
        "data.regions: RandAugment does not map boxes; set data.augment.randaugment=null, or "
        "data.augment=null": (
            recipe.data.regions > 0
            and recipe.data.augment is not None
            and recipe.data.augment.randaugment is not None
        ),
        "data.caption_dropout: must be in [0, 1)": not 0 <= recipe.data.caption_dropout < 1,
        "data.dialogue_captions: must be in [0, 1]": not 0 <= recipe.data.dialogue_captions <= 1,
        "terms.attributes: is learned beside `dialogue`; give that a weight above 0": (
            recipe.terms.get("attributes", 0) > 0 and not recipe.terms.get("dialogue")
        ),
        "data.workers: must be at least 1": recipe.data.workers < 1,
        "data.max_tokens: must be at least 3": recipe.data.max_tokens < 3,
        "teacher.momentum: must be in [0, 1)": not 0 <= recipe.teacher.momentum < 1,
        "teacher.queue: must not be below 0": recipe.teacher.queue < 0,
        "ema: must be in [0, 1)": not 0 <= recipe.ema < 1,
        "steps, epochs: one of them must be above 0": recipe.steps <= 0 and recipe.epochs <= 0,
        "keep_last: must be at least 1": recipe.keep_last < 1,
        "hard_negatives: must be from 0 to 1": not 0 <= recipe.hard_negatives <= 1,
        "text_dropout: must be from 0 to 1": not 0 <= recipe.text_dropout <= 1,
        "label_smoothing: must be in [0, 1)": not 0 <= recipe.label_smoothing < 1,
        "masked_patches, masked_words: must be between 0 and 1": not (
            0 < recipe.masked_patches < 1 and 0 < recipe.masked_words < 1
        ),
        "optimizer.lr: must be above 0": recipe.optimizer.lr <= 0,
    }
    for text, is_wrong in wrong.items():
        if is_wrong:
            raise UsageError(text)
    _check_bounds(recipe)


def _check_bounds(recipe: Recipe) -> None:
    """Checks least values of numbers."""
    model, data, evaluation = recipe.model, recipe.data, recipe.evaluation
    least_one = {
        "evaluation.samples": evaluation.samples,
        "evaluation.num_beams": evaluation.num_beams,
        "evaluation.max_tokens": evaluation.max_tokens,
        "data.rounds": data.rounds,
        "data.wrong_answers": data.wrong_answers,
        "model.vocab_size": model.vocab_size,
        "model.lora_rank": model.lora_rank,
    }
    least_zero = {
        "steps": recipe.steps,
        "epochs": recipe.epochs,
        "save_every": recipe.save_every,
        "match_weight": recipe.match_weight,
        "evaluation.every": evaluation.every,
        "evaluation.show": evaluation.show,
        "data.texts": data.texts,
        "data.questions": data.questions,
        "data.cache": data.cache,
        "model.image_size": model.image_size,
    }
    for least, numbers in ((1, least_one), (0, least_zero)):
        for name, number in numbers.items():
            if number < least:
                raise UsageError(f"{name}={number}: must be at least {least}")
