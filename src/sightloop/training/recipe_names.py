"""Names and descriptions of the shipped recipes, and the checks of a run before torch is imported.

The values of a recipe are in `sightloop.training.recipes`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from sightloop.errors import UsageError

if TYPE_CHECKING:
    from sightloop.training.events import RunEnded, RunStarted

RECIPE_DESCRIPTIONS: dict[str, str] = {
    "blip_pretrain": "BLIP from scratch: ITC, ITM and LM (Li et al. 2022)",
    "clip_pretrain": "CLIP from scratch (Radford et al. 2021)",
    "siglip_pretrain": "SigLIP from scratch (Zhai et al. 2023)",
    "unicl_pretrain": "CLIP's towers on labels and captions (UniCL; Florence)",
    "masked_pretrain": "BLIP's towers on masked patches and tokens (MIM, MLM)",
    "captioner": "fine-tune a captioner (LM)",
    "filter": "fine-tune an image-text filter (ITC, ITM), calibrated",
    "retrieval": "fine-tune for image-text retrieval (ITC, ITM)",
    "vqa": "fine-tune for visual question answering",
    "dialogue": "fine-tune for visual dialogue, with attributes of answers",
    "blip2_stage1": "BLIP-2's Q-Former on a frozen tower (Li et al. 2023)",
    "blip2_stage2": "BLIP-2's Q-Former with a frozen language model",
    "paligemma_pretrain": "PaliGemma at 224 pixels (Beyer et al. 2024)",
    "paligemma_resolution": "PaliGemma at 448 pixels, with longer texts",
    "paligemma_transfer": "fine-tune PaliGemma on one task",
    "llava_projector": "LLaVA's projector alone (Liu et al. 2023)",
    "llava": "LLaVA's projector and language model",
    "florence": "fine-tune Florence-2 on captions and answers",
    "paligemma_detect": "fine-tune PaliGemma to detect objects",
    "florence_detect": "fine-tune Florence-2 to detect objects",
    "classify": "classifier on folders of images, a linear probe",
    "world": "small BLIP with all heads on rendered scenes",
    "world_dialogue": "small BLIP on dialogues about rendered scenes",
    "painter_world": "small painter on plain rendered scenes",
    "painter": "diffusion transformer that draws images of captions, from random weights",
    "nano": "small BLIP with all heads: the bundled model",
}


def check_recipe(name: str, settings: Sequence[str]) -> tuple[str, str]:
    """Checks a recipe and its changes before a run starts.

    Args:
        name: A shipped recipe, or a JSON file.
        settings: Changes of the recipe, such as "optimizer.lr=1e-4".

    Returns:
        The evaluation data, and the checkpoint that training starts from; "" for none.

    Raises:
        UsageError: No such recipe, an unknown setting, or a value of the wrong type.
    """
    if name not in RECIPE_DESCRIPTIONS and not os.path.isfile(name):
        close = get_close_matches(name, RECIPE_DESCRIPTIONS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(RECIPE_DESCRIPTIONS)}"
        raise UsageError(f"{name}: no such recipe or .json file; {hint}")
    from sightloop.training.config import apply_settings
    from sightloop.training.recipes import find_recipe

    recipe = apply_settings(find_recipe(name), settings)
    return recipe.evaluation.data or "", recipe.model.init_from or ""


def finished_run(folder: Path) -> tuple[RunStarted, RunEnded] | None:
    """As `log.finished_run`; importing this module alone takes no time."""
    from sightloop.training import log

    return log.finished_run(folder)


def check_training(recipe: str, data: Sequence[str], folder: Path, settings: Sequence[str]) -> None:
    """As `requirements.check_training`; importing this module alone takes no time.

    Raises:
        UsageError: recipe, settings, data and folder do not fit each other.
    """
    from sightloop.training import requirements

    requirements.check_training(recipe, data, folder, settings)
