"""What both sides are given: checkpoints with random weights at official sizes, real images, real captions.

Written once into a cache folder, by a process of its own (`python -m benchmarks.materials FOLDER SIZE`), with
`transformers`, as hub checkpoints are. Nothing that is there already is touched.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks import photographs

Size = Literal["official", "tiny"]

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
VERSION = 2  # of what is written; a change of this file that changes them raises it
PICTURES = 128
CAPTIONS = 64
# Of one length in tokens: the reference looks at the padding of questions, sightloop does not.
QUESTIONS = [
    f"what colour is the {thing}?"
    for thing in "car dog hat shirt sky door bag ground wall table water horse bike boat sign bird".split()
]


@dataclass(frozen=True, slots=True)
class Materials:
    """folder: holds the checkpoints `caption`, `match`, `answer` and `clip`. images: paths of 640 x 480 JPEGs.

    notes: what is not as it should be (generated images instead of real ones, ...).
    """

    folder: str
    size: Size
    pictures: list[str]
    captions: list[str]
    questions: list[str]
    notes: list[str]


def prepare(cache: Path, size: Size, data: Path | None = None) -> Materials:
    """The materials in `cache`, written first where they are absent; that takes a minute and 4 GB for "official".

    Args:
        cache: Folder for all of them.
        size: Of the networks.
        data: Folder with photographs and captions (`benchmarks.photographs`); None for those of the packages.
    """
    folder = cache / f"{size}-{VERSION}"
    key = "" if data is None else "-" + hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8]
    listed = folder / f"materials{key}.json"
    if not listed.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.materials", str(folder), size, key]
        subprocess.run([*command, *([] if data is None else [str(data)])], check=True)
    return Materials(**json.loads(listed.read_text("utf-8")))


def write(folder: Path, size: Size, key: str, data: Path | None) -> Materials:
    """Write everything into `folder`; parts that are there whole stay. key: ends the names of what depends on data."""
    notes: list[str] = []
    shutil.rmtree(folder / f"pictures{key}", ignore_errors=True)
    pictures = _pictures(folder / f"pictures{key}", data, 8 if size == "tiny" else PICTURES, notes)
    captions = photographs.captions(data, CAPTIONS, notes)
    for name, build in _CHECKPOINTS.items():
        _whole(folder / name, lambda place, build=build: build(place, size))
    materials = Materials(str(folder), size, pictures, captions, QUESTIONS, notes)
    listed = folder / f"materials{key}.json.partial"
    listed.write_text(json.dumps(asdict(materials)), "utf-8")
    os.replace(listed, folder / f"materials{key}.json")
    return materials


def _whole(place: Path, fill: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all."""
    if place.is_dir():
        return
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    print(f"benchmarks: writing {place}", file=sys.stderr)
    fill(partial)
    os.replace(partial, place)


def _pictures(place: Path, data: Path | None, count: int, notes: list[str]) -> list[str]:
    """Photographs of 640 x 480, stored as JPEG."""

    def fill(folder: Path) -> None:
        for i, image in enumerate(photographs.photographs(data, count, notes)):
            image.save(folder / f"{i:03}.jpg", quality=90)

    _whole(place, fill)
    return [str(path) for path in sorted(place.glob("*.jpg"))]


# -- checkpoints: only the process that writes comes here; it has transformers -----------------------------------


def _blip_config(size: Size) -> Any:
    from transformers import BlipConfig

    ids = {"bos_token_id": 30522, "pad_token_id": 0, "sep_token_id": 102, "eos_token_id": 2}
    if size == "official":  # blip-image-captioning-base and its siblings; the rest are the class's defaults
        vision, text = {"image_size": 384}, {"num_attention_heads": 12}
    else:
        small = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
        vision, text = {"image_size": 64, "patch_size": 16, **small}, small
    return BlipConfig(vision_config=vision, text_config={"vocab_size": 30524, **text, **ids})


def _clip_config(size: Size) -> Any:
    from transformers import CLIPConfig

    ids = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    if size == "official":  # clip-vit-base-patch32: the class's defaults
        return CLIPConfig(text_config=ids)
    # open_clip's image heads are 64 wide, and its text heads too here.
    small = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    return CLIPConfig(
        vision_config={"image_size": 64, "patch_size": 32, **small},
        text_config={**small, **ids},
        projection_dim=64,
    )


def _blip(kind: str, place: Path, size: Size) -> None:
    import transformers
    from transformers import BertTokenizerFast
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    config = _blip_config(size)
    side = config.vision_config.image_size
    (place / "vocab.txt").write_text("\n".join(_bert_words()) + "\n", "utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(place)
    _save(place, getattr(transformers, kind)(config), tokenizer)
    BlipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(place)


def _clip(place: Path, size: Size) -> None:
    from transformers import CLIPModel, CLIPTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    config = _clip_config(size)
    side = config.vision_config.image_size
    words, merges = _clip_words()
    _save(place, CLIPModel(config), CLIPTokenizerFast(vocab=words, merges=merges))
    CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    ).save_pretrained(place)


_CHECKPOINTS: dict[str, Callable[[Path, Size], None]] = {
    "caption": lambda place, size: _blip("BlipForConditionalGeneration", place, size),
    "match": lambda place, size: _blip("BlipForImageTextRetrieval", place, size),
    "answer": lambda place, size: _blip("BlipForQuestionAnswering", place, size),
    "clip": _clip,
}


def _save(place: Path, model: Any, tokenizer: Any) -> None:
    """Weights of variance 1 / fan-in, so that signals keep their size and the next token is seldom a near tie."""
    import torch
    import transformers.utils.logging

    transformers.utils.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)


def _bert_words() -> list[str]:
    """BERT's vocabulary, or one with the same special ids in which every ASCII text can be written."""
    path = SHARED / "tokenizers" / "bert_base_uncased_vocab.txt"
    if path.is_file():
        return path.read_text("utf-8").splitlines()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789?.,!'-"
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += list(dict.fromkeys([*photographs.words(), *letters, *(f"##{letter}" for letter in letters)]))
    return words + [f"[unused{i}]" for i in range(99, 99 + 30522 - len(words))]


def _clip_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges, ours or open_clip's copy; else single bytes and whole words, to the same ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = _clip_merges() or _word_merges(photographs.words())
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(pair) for pair in merges]
    words += [f"<|unused{i}|>" for i in range(49406 - len(words))]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges


def _clip_merges() -> list[tuple[str, str]] | None:
    from importlib.util import find_spec

    places = [SHARED / "tokenizers" / "bpe_simple_vocab_16e6.txt.gz"]
    open_clip = find_spec("open_clip")
    if open_clip is not None and open_clip.origin is not None:
        places.append(Path(open_clip.origin).with_name("bpe_simple_vocab_16e6.txt.gz"))
    for path in places:
        if path.is_file():
            lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
            return [(first, second) for first, second in (line.split() for line in lines)]
    return None


def _word_merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make one token of each word, letter after letter."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        whole = letters[0]
        for letter in letters[1:]:
            merges[(whole, letter)] = None
            whole += letter
    return list(merges)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    named = Path(sys.argv[4]) if len(sys.argv) > 4 else None
    write(Path(sys.argv[1]), sys.argv[2], sys.argv[3], named)  # type: ignore[arg-type]
