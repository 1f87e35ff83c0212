"""Check of drawings against a policy: words of the prompts, and concepts that a judge sees in the images.

Concepts and thresholds are in a file that one can read (`ranking.policy`), every score is kept, and what is refused is
left out, counted and said; no image is replaced by another. The scores are cosines of a CLIP, whose useful thresholds
differ between judges and texts: set them on images of one's own.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath

import torch
from PIL import Image

from sightloop.errors import UsageError
from sightloop.inference.arrays import as_numpy
from sightloop.inference.judges import Judge, Judges
from sightloop.protocols import Embedder, require
from sightloop.ranking.policy import Policy, read_policy
from sightloop.tasks import embed
from sightloop.types import Floats32


@dataclass(frozen=True)
class DrawPolicy:
    """A policy with its judge.

    Args:
        policy: words and concepts.
        judge: compares images with the concepts; None without concepts.
    """

    policy: Policy
    judge: Judge | None

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises UsageError for the first prompt with a word of the policy."""
        for prompt in prompts:
            if reason := self.policy.refuse_text(prompt):
                raise UsageError(f"texts: {prompt[:60]!r} is not drawn: {reason}")

    def keep_allowed(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The images that show none of the concepts; a UserWarning counts the others by concept.

        Each image's `info` gets "policy": concept -> cosine.
        """
        if self.judge is None:
            return list(images)
        allowed, counts = list[Image.Image](), Counter[str]()
        for image, cosines in zip(images, self._cosines(self.judge, images).tolist(), strict=True):
            concepts = self.policy.concepts
            image.info["policy"] = {c.text: cosine for c, cosine in zip(concepts, cosines, strict=True)}
            refused = [c.text for c, cosine in zip(concepts, cosines, strict=True) if cosine > c.threshold]
            counts.update(refused)
            if not refused:
                allowed.append(image)
        if len(allowed) < len(images):
            seen = ", ".join(f"{text!r} {count}" for text, count in counts.most_common())
            warnings.warn(
                f"policy: {len(images) - len(allowed)} of {len(images)} drawn images are left out, for: {seen} "
                f"(cosines of {self.judge.name} above the policy's thresholds)",
                UserWarning,
                stacklevel=4,
            )
        return allowed

    @torch.inference_mode()
    def _cosines(self, judge: Judge, images: Sequence[Image.Image]) -> Floats32:
        """Cosines of images and concepts, float32 `[n, concepts]`."""
        network = require(judge.network, Embedder)
        texts = judge.tokenize([concept.text for concept in self.policy.concepts]).embed(network)
        batches = judge.preprocessor.batches(images)
        rows = [
            embed.similarities(embed.embed_images(network, judge.encode(batch)), texts) for batch in batches
        ]
        return as_numpy(torch.cat(rows))


def open_policy(source: object, judges: Judges, own: Judge) -> DrawPolicy:
    """A policy of a file or a `Policy`, its judge loaded; None: one that allows everything.

    Raises:
        UsageError: the file is wrong, or the judge embeds no images.
    """
    source = Policy() if source is None else source
    if not isinstance(source, Policy):
        if not isinstance(source, (str, PathLike)):
            raise UsageError(f"policy={source!r}: must be a file or a Policy")
        source = read_policy(fspath(source), images=True)
    judge = judges.choose(source.judge, own) if source.concepts else None
    if judge is not None and "similarity" not in judge.capabilities:
        raise UsageError(f"policy: {judge.name} does not embed images and texts; name a CLIP as its judge")
    return DrawPolicy(source, judge)
