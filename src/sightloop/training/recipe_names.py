"""Names and descriptions of the shipped recipes, and the checks of a run before torch is imported.

The values of a recipe are in `sightloop.training.recipes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RECIPE_DESCRIPTIONS: dict[str, str] = {
    "blip_pretrain": "BLIP from scratch: ITC, ITM and LM (Li et al. 2022)",
    "clip_pretrain": "CLIP from scratch (Radford et al. 2021)",
    "siglip_pretrain": "SigLIP from scratch (Zhai et al. 2023)",
    "masked_pretrain": "BLIP's towers on masked patches and tokens (MIM, MLM)",
    "captioner": "fine-tune a captioner (LM)",
    "filter": "fine-tune an image-text filter (ITC, ITM), calibrated",
    "retrieval": "fine-tune for image-text retrieval (ITC, ITM)",
    "vqa": "fine-tune for visual question answering",
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
    "nano": "small BLIP with all heads: the bundled model",
}


def check_training(recipe: str, data: Sequence[str], folder: Path, settings: Sequence[str]) -> None:
    """As `requirements.check_training`; importing this module alone takes no time.

    Raises:
        UsageError: recipe, settings, data and folder do not fit each other.
    """
    from sightloop.training import requirements

    requirements.check_training(recipe, data, folder, settings)
