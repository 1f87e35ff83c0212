"""What is compared: every case as data. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

Side = Literal["sightloop", "transformers", "open_clip"]
Unit = Literal["s", "pictures/s", "texts/s", "MB"]

TOKENS = 20
ANSWER_TOKENS = 10
PICTURES = 128  # prepared in one call
FILES = 256  # embedded in one call
ONE_STEP = 0.0151  # 1 of 255, divided by the smallest standard deviation (0.2613)
TEXTS = 16  # judged against one image; questions about one image


@dataclass(frozen=True, slots=True)
class Job:
    """One side's part: a method of its class in `ours`, `peer_transformers` or `peer_open_clip`, with its arguments.

    work "process" is a fresh Python process instead, see `processes`. label: how this way of using the peer is
    called where there are several.
    """

    side: Side
    work: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def called(self) -> str:
        """The side, and which way of using it."""
        return f"{self.side}, {self.label}" if self.label else self.side


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that both sides do. items: how many of the unit one call does (unit "s" and "MB": not divided).

    wanted: the least speed-up over each peer that sightloop sets itself; limit: the most that its own figure may be.
    Neither is asserted. rounds: at most so many, for what hardly varies. cold: the first run counts. near: the
    difference of outputs up to which both sides said the same.
    """

    name: str
    title: str
    unit: Unit
    items: int
    ours: Job
    theirs: tuple[Job, ...]
    wanted: tuple[float | None, ...] = ()
    limit: float | None = None
    rounds: int | None = None
    cold: bool = False
    near: float = 1e-4

    def goal(self, peer: int) -> float | None:
        """The speed-up wanted over `theirs[peer]`."""
        return self.wanted[peer] if peer < len(self.wanted) else None


def every_case() -> list[Case]:
    """All cases, in the order in which they run: those of one checkpoint together."""
    return [
        *_captions(),
        *_encoders(),
        *_auto(),
        *_judging(),
        *_questions(),
        *_bootstrap(),
        *_clip(),
        *_pixels(),
        *_processes(),
        *_training(),
    ]


def quick_cases() -> list[Case]:
    """Those of a run of a few minutes: every kind of inference, without questions, training and processes."""
    chosen = ("caption-*", "judge-*", "clip-*", "pixels-*-t2", "start-import", "start-help")
    return choose(every_case(), chosen)


def choose(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """The cases whose name matches any of the shell patterns, or begins with one. ValueError for one without any."""
    if not patterns:
        return list(cases)
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in cases):
            raise ValueError(f"{pattern}: no such case; there are {', '.join(case.name for case in cases)}")
    return [case for case in cases if any(_matches(case, pattern) for pattern in patterns)]


def _matches(case: Case, pattern: str) -> bool:
    return case.name.startswith(pattern) or fnmatchcase(case.name, pattern)


def _both(work: str, **options: Any) -> tuple[Job, tuple[Job]]:
    return Job("sightloop", work, options), (Job("transformers", work, options),)


def _captions() -> Iterator[Case]:
    goals = {(1, 1): 1.2, (1, 3): 1.5, (8, 1): 1.2, (8, 3): 2.5}
    for (batch, beams), goal in goals.items():
        how = "greedy" if beams == 1 else f"beam {beams}"
        ours, theirs = _both("caption", batch=batch, beams=beams, tokens=TOKENS)
        yield Case(
            f"caption-b{batch}-{how.replace(' ', '')}",
            f"caption {batch} image{'s' if batch > 1 else ''}, {how}, {TOKENS} tokens, from the file",
            "s",
            1,
            ours,
            theirs,
            (goal,),
        )


def _encoders() -> Iterator[Case]:
    for batch in (1, 8):
        yield Case(
            f"encode-blip-b{batch}",
            f"BLIP image tower, batch {batch}",
            "pictures/s",
            batch,
            *_both("encode_blip", batch=batch),
        )


def _auto() -> Iterator[Case]:
    """dtype="auto" beside the peer in float32 and in bfloat16; outputs then differ by the rounding of bfloat16."""
    jobs: tuple[tuple[str, str, Unit, str, dict[str, Any]], ...] = (
        ("encode-b8", "BLIP image tower, batch 8", "pictures/s", "encode_blip", {"batch": 8}),
        *(
            (
                f"caption-b{batch}-{'greedy' if beams == 1 else f'beam{beams}'}",
                f"caption {batch}, beams {beams}",
                "s",
                "caption",
                {"batch": batch, "beams": beams, "tokens": TOKENS},
            )
            for batch, beams in ((1, 1), (1, 3), (8, 3))
        ),
    )
    for name, title, unit, work, options in jobs:
        goals = (2.5 if work == "encode_blip" else 2.0, 1.3)
        yield Case(
            f"auto-{name}",
            f'{title}, dtype="auto"',
            unit,
            options["batch"] if unit == "pictures/s" else 1,
            Job("sightloop", work, options | {"dtype": "auto"}),
            tuple(
                Job("transformers", work, options | {"dtype": dtype}, dtype)
                for dtype in ("float32", "bfloat16")
            ),
            goals,
            near=0.1,
        )


def _judging() -> Iterator[Case]:
    whole, repeated = _both("judge", texts=TEXTS)
    yield Case(
        f"judge-{TEXTS}",
        f"ITM: {TEXTS} texts against one image, from the file",
        "s",
        1,
        whole,
        (Job("transformers", "judge", repeated[0].options, "image repeated"),),
        (8.0,),
    )
    yield Case(
        f"judge-{TEXTS}-texts",
        f"ITM: {TEXTS} texts against one encoded image",
        "s",
        1,
        Job("sightloop", "judge_texts", {"texts": TEXTS}),
        (Job("transformers", "judge_texts", {"texts": TEXTS}, "encoded once, expanded"),),
        (2.5,),
    )


def _questions() -> Iterator[Case]:
    yield Case(
        "ask-1",
        f"VQA: 1 question, {ANSWER_TOKENS} tokens, from the file",
        "s",
        1,
        *_both("ask", questions=1, tokens=ANSWER_TOKENS),
    )
    options = {"questions": TEXTS, "tokens": ANSWER_TOKENS}
    yield Case(
        f"ask-{TEXTS}",
        f"VQA: {TEXTS} questions about one image, {ANSWER_TOKENS} tokens",
        "s",
        1,
        Job("sightloop", "ask", options),
        (
            Job("transformers", "ask", options, "image repeated"),
            Job("transformers", "ask_encoded", options, "encoded once, expanded"),
        ),
    )


def _bootstrap() -> Iterator[Case]:
    ours, theirs = _both("bootstrap", pictures=16, batch=8)
    yield Case(
        "bootstrap-b8",
        "CapFilt: 16 files, a nucleus sample each, web text and sample judged, batch 8",
        "pictures/s",
        16,
        ours,
        theirs,
        (2.0,),
        rounds=3,
    )


def _clip() -> Iterator[Case]:
    for batch in (1, 32):
        options = {"batch": batch}
        yield Case(
            f"clip-images-b{batch}",
            f"CLIP B/32 images, batch {batch}",
            "pictures/s",
            batch,
            Job("sightloop", "embed_pixels", options),
            (Job("transformers", "embed_pixels", options), Job("open_clip", "embed_pixels", options)),
            (1.0, 1.0),
        )
    ours, theirs = _both("embed_files", batch=32)
    yield Case(
        "clip-files-b32", "CLIP B/32 images from files, batch 32", "pictures/s", 32, ours, theirs, (1.0,)
    )
    whole = {"batch": FILES}
    yield Case(
        "clip-files-alone",
        f"CLIP B/32 images from {FILES} files, beside the model alone",
        "pictures/s",
        FILES,
        Job("sightloop", "embed_files", whole),
        (Job("sightloop", "embed_pixels", whole, "the model alone"),),
        (0.95,),
        rounds=3,
    )
    options = {"texts": 64}
    yield Case(
        "clip-texts-b64",
        "CLIP B/32 texts at caption length, batch 64",
        "texts/s",
        64,
        Job("sightloop", "embed_texts", options),
        (
            Job("transformers", "embed_texts", options | {"padding": "max_length"}, "padded to 77"),
            Job("open_clip", "embed_texts", options),
            Job("transformers", "embed_texts", options | {"padding": "longest"}, "texts cut to the longest"),
        ),
        (3.0, 3.0, 1.1),
    )


def _pixels() -> Iterator[Case]:
    for family, size in (("clip", 224), ("blip", 384)):
        for mode, goal in (("exact", 1.3), ("fast", 2.5)):
            for threads in (1, 2):
                options = {"family": family, "pictures": PICTURES, "threads": threads}
                yield Case(
                    f"pixels-{family}-{mode}-t{threads}",
                    f"640 x 480 JPEG to {family.upper()}'s {size}, {mode}, {threads} thread{'s' * (threads > 1)}",
                    "pictures/s",
                    PICTURES,
                    Job("sightloop", "pixels", {**options, "mode": mode}),
                    (Job("transformers", "pixels", options, "Pillow"),),
                    (goal,) if threads == 2 else (),
                    near=0.0 if mode == "exact" else ONE_STEP,
                )


def _processes() -> Iterator[Case]:
    def process(side: Side, probe: str, figure: str, **options: Any) -> Job:
        return Job(side, "process", {"probe": probe, "figure": figure, **options})

    yield Case(
        "start-import",
        "import the package",
        "s",
        1,
        process("sightloop", "import", "seconds"),
        (process("transformers", "import", "seconds"),),
        limit=0.1,
    )
    yield Case("start-help", "sightloop --help", "s", 1, process("sightloop", "help", "wall"), (), limit=0.3)
    yield Case(
        "start-load",
        "import and load BLIP base",
        "s",
        1,
        process("sightloop", "caption", "ready", batch=0, beams=1),
        (process("transformers", "caption", "ready", batch=0, beams=1),),
        rounds=3,
    )
    for batch, beams in ((1, 1), (8, 3)):
        options = {"batch": batch, "beams": beams, "tokens": TOKENS}
        yield Case(
            f"memory-b{batch}",
            f"peak memory: load, caption {batch}" + (f", beam {beams}" if beams > 1 else ""),
            "MB",
            1,
            process("sightloop", "caption", "peak_mb", **options),
            (process("transformers", "caption", "peak_mb", **options),),
            rounds=1,
            cold=True,
        )


def _training() -> Iterator[Case]:
    clip, blip = {"batch": 64}, {"batch": 8}
    yield Case(
        "train-clip-b64",
        "CLIP B/32 training step, batch 64, texts at caption length",
        "s",
        1,
        Job("sightloop", "train_clip", clip),
        (
            Job("open_clip", "train_clip", clip),
            Job("transformers", "train_clip", clip | {"padding": "max_length"}, "padded to 77"),
            Job("transformers", "train_clip", clip | {"padding": "longest"}, "padded to the longest"),
        ),
        (1.3, 1.3),
        near=1e-3,
    )
    yield Case(
        "train-blip-b8",
        "BLIP caption fine-tuning step, batch 8",
        "s",
        1,
        Job("sightloop", "train_caption", blip),
        (Job("transformers", "train_caption", blip, "padded to the longest"),),
        (1.2,),
        near=1e-3,
    )
