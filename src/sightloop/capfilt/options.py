"""Options of a CapFilt run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias, get_args

from sightloop.data.images.reader import BatchSize
from sightloop.errors import UsageError
from sightloop.tasks.decoding_options import Decoding
from sightloop.types import JsonDict

Task: TypeAlias = Literal["captions", "dialogue"]
Mode: TypeAlias = Literal["both", "captioner-only", "filter-only"]
KeepRule: TypeAlias = Literal["matching", "best", "top-k-itc"]
ShardFormat: TypeAlias = Literal["tar", "parquet"]
EngineName: TypeAlias = Literal["local", "ray"]

RULE = ("keep", "threshold", "top")


@dataclass(frozen=True, slots=True)
class CapFiltOptions:
    """Options of `bootstrap`.

    All of them but `engine`, `workers`, `batch_size`, `readers`, `isolate` and the devices' numbers are settings of
    the output: a run is resumed only with equal ones. `group` and `threads` are among them because they change the
    last bits of float32 sums.

    Attributes:
        task: "captions", or "dialogue": answers are written to the questions of dialogues, and a model that was trained
            for dialogues chooses the turns that are kept (LaMDA; see `capfilt.dialogues`).
        mode: "both"; "captioner-only" adds synthetic texts and filters nothing; "filter-only" writes none.
        keep: Which texts are kept. "matching": all with an ITM probability of at least `threshold`; "best": the best
            of those for each image; "top-k-itc": the `top` best of each image by ITC similarity, as in BLIP-2
            (Li et al. 2023, section 3.3).
        threshold: Least ITM probability of a matching text, in 0..1.
        top: Texts kept for each image by "top-k-itc", at least 1.
        ranker: Model that computes the similarity for "top-k-itc"; None for the filter model.
        captions: Synthetic texts for each image, or for each question.
        top_p: Nucleus sampling of synthetic texts; the draws depend on `seed` and the image alone.
        num_beams: Beam search instead of sampling, if above 1.
        min_tokens: Least length of a caption in tokens, EOS included; of answers there is none.
        max_tokens: Greatest length, likewise.
        prompt: Start of every synthetic text.
        seed: Seed of sampling.
        to: Format of the output shards.
        by_reference: Store the paths of images instead of their bytes; for Parquet, and images that are files.
        block: Samples in an output shard, at most.
        group: Images in one forward pass; None for 8 on a CPU and 32 elsewhere.
        threads: CPU threads of each worker; None for PyTorch's default.
        engine: "local" for processes of this machine, "ray" for actors of a Ray cluster.
        workers: Number of workers, each with its own copy of the models.
        batch_size: Decoded images that a worker holds ready for its models; None for `group`, "auto" for 64. It has no
            effect on results.
        readers: Decoder processes of each worker.
        isolate: Decode in separate processes, so that an image that crashes a decoder does not end the worker.
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        devices: One worker for each of these, in place of `workers` and `device`; all of one kind.
        dtype: Number format of the models.
        max_pixels: Images with more pixels are reported as failed.
    """

    task: Task = "captions"
    mode: Mode = "both"
    keep: KeepRule = "matching"
    threshold: float = 0.5
    top: int = 2
    ranker: str | None = None
    captions: int = 1
    top_p: float = 0.9
    num_beams: int = 1
    min_tokens: int = 5
    max_tokens: int = 20
    prompt: str | None = None
    seed: int = 0
    to: ShardFormat = "tar"
    by_reference: bool = False
    block: int = 1000
    group: int | None = None
    threads: int | None = None
    engine: EngineName = "local"
    workers: int = 1
    batch_size: BatchSize | None = None
    readers: int = 2
    isolate: bool = True
    device: str = "auto"
    devices: tuple[str, ...] = ()
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    max_pixels: int = 128 * 1024 * 1024

    def __post_init__(self) -> None:
        """Raises `UsageError` for a value out of range."""
        for name, allowed in (
            ("task", Task),
            ("mode", Mode),
            ("keep", KeepRule),
            ("to", ShardFormat),
            ("engine", EngineName),
        ):
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(f"{name}={getattr(self, name)!r}: must be {' or '.join(get_args(allowed))}")
        if self.by_reference and self.to != "parquet":
            raise UsageError(f"by_reference: to={self.to!r} stores the images; use to='parquet'")
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold}: must be from 0 to 1")
        counts = "top captions num_beams block group threads workers batch_size readers max_pixels"
        for name in counts.split():
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name}={value}: must be at least 1")
        if self.task == "dialogue":
            self._check_dialogue()
        if self.mode == "captioner-only" and self.keep != "matching":
            raise UsageError(f"keep={self.keep!r}: mode captioner-only filters nothing; use mode both")
        if self.ranker is not None and self.keep != "top-k-itc":
            raise UsageError("ranker: needs keep='top-k-itc'")
        if len({device.partition(":")[0] for device in self.devices}) > 1:
            raise UsageError(
                f"devices={','.join(self.devices)}: must be of one kind; results differ between kinds"
            )
        if self.devices:  # frozen: one worker for each
            object.__setattr__(self, "device", self.devices[0])
            object.__setattr__(self, "workers", len(self.devices))
        self.decoding()

    def _check_dialogue(self) -> None:
        for name, usable, why in (
            ("mode", self.mode != "captioner-only", "the turns of dialogues are filtered"),
            ("keep", self.keep == "matching", "of each turn the best answer that passes is kept"),
            ("prompt", self.prompt is None, "answers have none"),
            ("num_beams", self.num_beams == 1, "answers are sampled"),
        ):
            if not usable:
                raise UsageError(f"{name}={getattr(self, name)!r}: goes without task='dialogue', as {why}")

    @property
    def rule(self) -> JsonDict:
        """The options that decide, from the scores of a text, whether it is kept."""
        return {name: getattr(self, name) for name in RULE}

    def answering(self) -> JsonDict:
        """Options of `Model.chat` for the answers of a turn."""
        options: JsonDict = {"samples": self.captions, "top_p": self.top_p}
        return options | {"max_new_tokens": self.max_tokens, "seed": self.seed}

    def decoding(self) -> JsonDict:
        """The captioner's fields of `tasks.decoding_options.Decoding`.

        Raises:
            UsageError: A value is out of range.
        """
        least = self.min_tokens if self.task == "captions" else 0
        options: JsonDict = {"min_new_tokens": least, "max_new_tokens": self.max_tokens}
        options |= {"num_beams": self.num_beams} if self.num_beams > 1 else {"top_p": self.top_p}
        return asdict(Decoding(**options, num_return=self.captions, seed=self.seed))
