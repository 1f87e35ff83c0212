"""The shipped recipes by name; a recipe is saved as JSON and changed by `--set a.b=value`."""

from __future__ import annotations

import json
from pathlib import Path

from sightloop.data.images.augment import Augment
from sightloop.errors import UsageError
from sightloop.training.config import DataSettings, ModelSettings, Recipe, TeacherSettings, from_json
from sightloop.training.optimizer_config import OptimizerConfig
from sightloop.training.schedule import ScheduleConfig


def find_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a JSON file, such as the `recipe.json` of a run.

    Raises:
        UsageError: no such name, or the file cannot be read or holds no recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        try:
            data = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{name}: cannot be read as JSON ({error})") from error
        if isinstance(data, dict) and "terms" not in data:
            data = data.get("recipe")  # recipe.json of a run: {"recipe": ..., "data": ...}
        if not isinstance(data, dict):
            raise UsageError(f"{name}: holds no recipe; a run's recipe.json shows what one looks like")
        try:
            return from_json(data)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    raise UsageError(f"{name}: no such recipe; choose from {', '.join(RECIPES)}, or name a .json file")


_NO_TEACHER = TeacherSettings(momentum=0.0, queue=0, alpha=0.0)
_BLIP_SCHEDULE = ScheduleConfig("blip", warmup_steps=3000, start=1e-6, floor=1e-6)
_CLIP_ADAM = OptimizerConfig(lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
_GEMMA_ADAM = OptimizerConfig(lr=1e-5, clip_norm=1.0, weight_decay=0.0)
_PALIGEMMA, _FLORENCE = "google/paligemma-3b-pt-224", "florence-community/Florence-2-base"
_PROJECTOR_ADAM, _LLAVA_ADAM = (OptimizerConfig(lr=lr, weight_decay=0.0) for lr in (1e-3, 2e-5))
_LLAVA, _LLAVA_TOWERS = "llava-hf/llava-1.5-7b-hf", ("vision.*", "language.*")
_QUERIES_ADAM = OptimizerConfig(lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05)
# Prompts of UniCL's labels: the two that Florence's paper names (section 3.1), and others of CLIP's.
_LABEL_TEXTS = (
    "a photo of the {}.",
    "a cropped photo of the {}.",
    "a photo of a {}.",
    "a cropped photo of a {}.",
    "a good photo of the {}.",
    "a close-up photo of the {}.",
    "a photo of one {}.",
)
_CROP_ONLY, _FINE_TUNING = Augment(scale=(0.9, 1.0), flip=0.0, randaugment=None), Augment(scale=(0.5, 1.0))
_STRONG = Augment(scale=(0.4, 1.0), randaugment=(1, 5))


def _prompted(
    name: str,
    max_tokens: int,
    warmup: int,
    optimizer: OptimizerConfig,
    model: ModelSettings,
    *,
    regions: int = 0,
) -> Recipe:
    """Fine-tuning of a prompted network: on captions and questions, or on regions alone."""
    texts = 0 if regions else 1
    return Recipe(
        name,
        {"prompted": 1.0},
        model=model,
        data=DataSettings(
            batch=32, texts=texts, questions=texts, regions=regions, max_tokens=max_tokens, augment=None
        ),
        teacher=_NO_TEACHER,
        optimizer=optimizer,
        schedule=ScheduleConfig("cosine", warmup_steps=warmup),
        label_smoothing=0.0,
        epochs=1,
    )


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        # Li et al. 2022, section 4.1, with the values of the released code.
        Recipe(
            "blip_pretrain",
            {"itc": 1.0, "itm": 1.0, "lm": 1.0},
            model=ModelSettings(size="blip-base", vocab_size=30_522),
            data=DataSettings(batch=600, max_tokens=30),
            optimizer=OptimizerConfig(lr=3e-4, weight_decay=0.05, decay_on="all"),
            schedule=_BLIP_SCHEDULE,
            epochs=20,
        ),
        # Radford et al. 2021, table 18 and section 2.5, at open_clip's usual batch for one machine.
        Recipe(
            "clip_pretrain",
            {"clip": 1.0},
            model=ModelSettings(size="clip-vit-b-32", vocab_size=49_408),
            data=DataSettings(batch=1024, max_tokens=77, augment=_CROP_ONLY),
            teacher=_NO_TEACHER,
            optimizer=_CLIP_ADAM,
            schedule=ScheduleConfig("cosine", warmup_steps=2000),
            epochs=32,
        ),
        # Zhai et al. 2023, sections 3 and 4: sigmoid loss, beta2 0.95.
        Recipe(
            "siglip_pretrain",
            {"siglip": 1.0},
            model=ModelSettings(size="siglip-base", vocab_size=32_000),
            data=DataSettings(batch=1024, max_tokens=64, augment=_CROP_ONLY),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-4),
            schedule=ScheduleConfig("cosine", warmup_steps=2000),
            epochs=32,
        ),
        # Yuan et al. 2021 (Florence), sections 2.2 and 3.1, on CLIP's towers: images with labels and with captions.
        # Stage 2 goes on without the templates: --set model.init_from=RUN/model 'data.label_texts=["{}"]'.
        Recipe(
            "unicl_pretrain",
            {"clip": 1.0},
            model=ModelSettings(size="clip-vit-b-16", vocab_size=49_408),
            data=DataSettings(batch=1024, max_tokens=76, label_texts=_LABEL_TEXTS, augment=_CROP_ONLY),
            teacher=_NO_TEACHER,
            optimizer=_CLIP_ADAM,
            schedule=ScheduleConfig("cosine", warmup_steps=2000),
            epochs=32,
        ),
        # SimMIM's and BERT's masking, on BLIP's towers.
        Recipe(
            "masked_pretrain",
            {"mim": 1.0, "mlm": 1.0},
            model=ModelSettings(size="blip-base", vocab_size=30_522),
            data=DataSettings(batch=256),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=2e-4, betas=(0.9, 0.98), clip_norm=3.0),
            schedule=ScheduleConfig("cosine", warmup_steps=1000, final=0.01),
            epochs=20,
        ),
        # The two fine-tunings of CapFilt (section 3.3), from one pre-trained model.
        Recipe(
            "captioner",
            {"lm": 1.0},
            model=ModelSettings(init_from="nano"),
            data=DataSettings(batch=32, augment=_FINE_TUNING),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=1e-4, clip_norm=1.0),
            schedule=ScheduleConfig("cosine", warmup_steps=10),
            epochs=5,
        ),
        # A few clean pairs are overfitted soon: the regularization here gained .02 of ROC area (nano's LOG.md).
        Recipe(
            "filter",
            {"itc": 1.0, "itm": 1.0},
            model=ModelSettings(init_from="nano", dropout=0.1, drop_path=0.1),
            data=DataSettings(batch=32, caption_dropout=0.15, augment=Augment(scale=(0.4, 1.0))),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=2e-5, clip_norm=1.0),
            schedule=ScheduleConfig("cosine", warmup_steps=10),
            epochs=5,
            ema=0.99,
            # Wrong web texts are unrelated to the image: uniform negatives, and 0.5 as the balanced threshold.
            match_weight=2.0,
            hard_negatives=0.0,
            calibrate=True,
        ),
        # Li et al. 2022, table 14: retrieval and VQA fine-tuning.
        Recipe(
            "retrieval",
            {"itc": 1.0, "itm": 1.0},
            model=ModelSettings(init_from="nano"),
            data=DataSettings(batch=64, max_tokens=35, augment=_FINE_TUNING),
            teacher=TeacherSettings(queue=8192, alpha_epochs=0.0),
            optimizer=OptimizerConfig(lr=1e-4, clip_norm=1.0),
            schedule=ScheduleConfig("cosine"),
            epochs=6,
        ),
        Recipe(
            "vqa",
            {"vqa": 1.0},
            model=ModelSettings(init_from="nano"),
            data=DataSettings(batch=32, questions=4, augment=_FINE_TUNING),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=1e-4, clip_norm=1.0),
            schedule=ScheduleConfig("cosine", warmup_steps=10),
            epochs=10,
        ),
        # Li et al. 2022, section 5.5: one true answer to three wrong ones. BLIP itself: 2e-5, batch 240, 20 epochs.
        # Beside it LaMDA's attributes where the data has them, and the decoder, which learns to write the answers.
        Recipe(
            "dialogue",
            {"dialogue": 1.0, "attributes": 0.5, "reply": 1.0},
            model=ModelSettings(init_from="nano"),
            data=DataSettings(batch=32, max_tokens=64, dialogue_captions=0.8, augment=_FINE_TUNING),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=1e-4, clip_norm=1.0),
            schedule=ScheduleConfig("cosine", warmup_steps=10),
            epochs=10,
            label_smoothing=0.0,
        ),
        # Li et al. 2023, section 3.4: the queries are trained on a frozen image tower (set model.vision)...
        Recipe(
            "blip2_stage1",
            {"itc": 1.0, "itm": 1.0, "lm": 1.0},
            model=ModelSettings(size="blip2-vit-g", vocab_size=30_522, frozen=("vision.*",)),
            data=DataSettings(batch=1680, max_tokens=32, augment=_FINE_TUNING),
            teacher=_NO_TEACHER,
            optimizer=_QUERIES_ADAM,
            schedule=ScheduleConfig("cosine", warmup_steps=2000, final=0.1),
            steps=250_000,
        ),
        # ... and then in front of a frozen language model (T5 also has an encoder, `encoder.*`): from your own
        # stage 1 with model.init_from=RUN/model model.language=facebook/opt-2.7b.
        Recipe(
            "blip2_stage2",
            {"lm": 1.0},
            model=ModelSettings(init_from="Salesforce/blip2-opt-2.7b", frozen=_LLAVA_TOWERS),
            data=DataSettings(batch=1520, max_tokens=32, augment=_FINE_TUNING),
            teacher=_NO_TEACHER,
            optimizer=_QUERIES_ADAM,
            schedule=ScheduleConfig("cosine", warmup_steps=2000, final=0.5),
            steps=80_000,
            label_smoothing=0.0,
        ),
        # Beyer et al. 2024, section 3.2: 224 pixels; then a higher resolution with longer texts; then one task.
        _prompted("paligemma_pretrain", 128, 1000, _GEMMA_ADAM, ModelSettings(init_from=_PALIGEMMA)),
        _prompted(
            "paligemma_resolution", 512, 100, _GEMMA_ADAM, ModelSettings(init_from=_PALIGEMMA, image_size=448)
        ),
        _prompted("paligemma_transfer", 128, 10, _GEMMA_ADAM, ModelSettings(init_from=_PALIGEMMA)),
        # Liu et al. 2023 (2310.03744): the projector alone, then it and the language model. Florence: all but vision.
        _prompted(
            "llava_projector",
            2048,
            65,
            _PROJECTOR_ADAM,
            ModelSettings(init_from=_LLAVA, frozen=_LLAVA_TOWERS),
        ),
        _prompted("llava", 2048, 156, _LLAVA_ADAM, ModelSettings(init_from=_LLAVA, frozen=_LLAVA_TOWERS[:1])),
        _prompted(
            "florence",
            256,
            10,
            OptimizerConfig(lr=1e-6),
            ModelSettings(init_from=_FLORENCE, frozen=("vision.*",)),
        ),
        # Labeled boxes alone: of COCO's JSON, YOLO's labels, JSON lines.
        _prompted("paligemma_detect", 512, 10, _GEMMA_ADAM, ModelSettings(init_from=_PALIGEMMA), regions=60),
        _prompted(
            "florence_detect",
            512,
            10,
            OptimizerConfig(lr=1e-6),
            ModelSettings(init_from=_FLORENCE),
            regions=60,
        ),
        # A linear probe; --set model.frozen= optimizer.lr=1e-3 trains the whole tower.
        Recipe(
            "classify",
            {"classes": 1.0},
            model=ModelSettings(init_from="nano", frozen=("*",)),
            data=DataSettings(batch=64, augment=_CROP_ONLY),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=1e-2, clip_norm=1.0),
            schedule=ScheduleConfig("cosine"),
            epochs=20,
        ),
        # Rendered scenes of 64 pixels, all heads, minutes on two cores.
        Recipe(
            "world",
            {"itc": 1.0, "itm": 1.0, "lm": 1.0, "vqa": 1.0},
            model=ModelSettings(size="world", vocab_size=1000),
            data=DataSettings(
                batch=64, questions=2, max_tokens=30, cache=64, augment=Augment((0.9, 1.0), randaugment=None)
            ),
            teacher=TeacherSettings(queue=0, alpha_epochs=4.0),
            optimizer=OptimizerConfig(lr=1e-3, clip_norm=1.0, weight_decay=0.02),
            schedule=ScheduleConfig("cosine", warmup_steps=100, final=0.01),
            epochs=20,
        ),
        # The same with dialogues to come: room for their text. Then `dialogue` with model.init_from=RUN/model.
        Recipe(
            "world_dialogue",
            {"lm": 1.0, "vqa": 1.0, "dialogue": 1.0, "attributes": 0.5, "reply": 1.0},
            model=ModelSettings(size="world-dialogue", vocab_size=400),
            data=DataSettings(batch=32, questions=3, max_tokens=64, cache=64, workers=1, augment=None),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=1e-3, clip_norm=1.0, weight_decay=0.02),
            schedule=ScheduleConfig("cosine", warmup_steps=50, final=0.01),
            precision="bfloat16",
            label_smoothing=0.0,
            steps=1200,
        ),
        # Plain rendered scenes of 64 pixels (`sightloop synthetic --scenes plain`): .22 s a step on one thread of an
        # Intel with AMX.
        Recipe(
            "painter_world",
            {"flow": 1.0},
            model=ModelSettings(size="painter-world", vocab_size=200),
            data=DataSettings(batch=48, max_tokens=24, cache=64, workers=1, augment=None),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=2e-3, betas=(0.9, 0.99), clip_norm=1.0, weight_decay=0.0),
            schedule=ScheduleConfig("cosine", warmup_steps=100, final=0.02),
            precision="bfloat16",
            ema=0.998,
            steps=7000,
            save_every=200,
        ),
        # The painter on images and captions of one's own, 64 pixels (model.image_size=128 for larger ones): a rate and
        # EMA between those of DiT (Peebles and Xie 2023, section 4: 1e-4, 0.9999, batch 256) and short runs.
        Recipe(
            "painter",
            {"flow": 1.0},
            model=ModelSettings(size="painter-64", vocab_size=4000),
            data=DataSettings(batch=128, max_tokens=32, augment=_CROP_ONLY),
            teacher=_NO_TEACHER,
            optimizer=OptimizerConfig(lr=3e-4, betas=(0.9, 0.99), clip_norm=1.0, weight_decay=0.0),
            schedule=ScheduleConfig("constant", warmup_steps=500),
            precision="bfloat16",
            ema=0.999,
            epochs=100,
        ),
        # The bundled model; recipes/nano/LOG.md has the settings of its runs and the experiments.
        Recipe(
            "nano",
            {"itc": 1.0, "itm": 1.0, "lm": 1.0, "vqa": 1.0},
            model=ModelSettings(size="blip-lite0", vocab_size=4000, dropout=0.1),
            data=DataSettings(batch=128, texts=2, max_tokens=24, workers=1, augment=_STRONG),
            teacher=TeacherSettings(momentum=0.0, queue=0, alpha_epochs=4.0),
            optimizer=OptimizerConfig(lr=9e-4, betas=(0.9, 0.98), clip_norm=1.0, weight_decay=0.1),
            schedule=ScheduleConfig("cosine", warmup_steps=20, final=0.1),
            precision="bfloat16",
            ema=0.97,
            match_weight=2.0,
            hard_negatives=0.5,
            epochs=50,
        ),
    )
}
