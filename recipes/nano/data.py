"""The images that nano learns from besides Flickr8k's: python recipes/nano/data.py OUT SOURCE=FOLDER...

Writes a WebDataset for each source, with texts and questions made from labels, captions and boxes:

    flickr=FOLDER      train-*.tar of Flickr8k; questions about colors, counts, presence and actions, from the captions
    samples=FOLDER     one photograph for each ImageNet class (EliSchwartz/imagenet-sample-images)
    nette=FOLDER       Imagenette, of which the training part is taken (thunderInfy/imagenette)
    mini=FOLDER        mini-ImageNet (Deo0330/split_minidataset)
    clothing=FOLDER    clothing-dataset-small; every second photograph, the others are for tests
    coco128=FOLDER     128 photographs of COCO with labeled polygons
    coco2014=FOLDER    photographs of COCO train2014 without captions, all of them
    said=FOLDER        the photographs of samples, nette, mini, guessed and clothing.tar there that show no dog, without
                       their labels and with short captions for LM (Flickr8k has its own dogs)
    guessed=FOLDER     those of whose class the classifier of EfficientNet-Lite0 is sure, with texts made from it;
                       needs weights=FILE (efficientnet-lite0-57934424.pth), features=FOLDER and samples=FOLDER
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from words import ANIMALS, EVERYDAY, an, captions, questions

import sightloop
from sightloop.checkpoints.efficientnet import read_efficientnet
from sightloop.checkpoints.tensors import read_tensors
from sightloop.training.features import FeatureStore
from sightloop.types import Sample

SURE = 0.5  # least chance of the classifier's class
NETTE_EACH, MINI_EACH = 120, 10  # photographs of a class
COLORS = "red orange yellow green blue purple pink brown black white gray".split()
NUMBERS = "one two three four five six seven eight".split()
MANY = "dogs|men|women|children|people|boys|girls|kids"
PEOPLE = {"man", "woman", "boy", "girl", "child", "person", "baby", "player", "skateboarder", "biker"}
ABSENT = "dog cat horse car bicycle ball snow water beach boat man woman boy girl child bird tree motorcycle".split()
CLOTHES = {"t-shirt": "t-shirt", "longsleeve": "long sleeve shirt", "pants": "pair of pants", "shoes": "pair of shoes",
           "shorts": "pair of shorts", "outwear": "jacket"}  # fmt: skip

Row = tuple[str, bytes, dict[str, Any]]


def main(out: str, *sources: str) -> None:
    """Write OUT/NAME.tar for every source."""
    Path(out).mkdir(parents=True, exist_ok=True)
    for source in sources:
        name, _, folder = source.partition("=")
        if name in ("weights", "features") or (name == "samples" and "guessed" in SETTINGS):
            continue
        target = Path(out, f"{name}.tar")
        with tarfile.open(target.with_suffix(".part"), "w") as tar:
            count = 0
            for key, image, about in SOURCES[name](Path(folder)):
                count += 1
                for suffix, data in (("jpg", image), ("json", json.dumps(about).encode())):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        target.with_suffix(".part").rename(target)
        print(f"{target}: {count:,} images")


def flickr(folder: Path) -> Iterator[Row]:
    """Flickr8k's training part with questions."""
    random = np.random.default_rng(0)
    for sample in sightloop.open_dataset(str(folder / "train-*.tar")):
        assert isinstance(sample.image, bytes)
        asked = [{"question": q, "answer": a} for q, a in from_captions(list(sample.captions), random)]
        yield sample.key, sample.image, {"captions": list(sample.captions)} | ({"qa": asked} if asked else {})


def said(folder: Path) -> Iterator[Row]:
    """Labeled photographs with captions that LM may learn: what it is, in Flickr8k's manner."""
    for name in ("samples", "nette", "mini", "guessed", "clothing"):
        for sample in sightloop.open_dataset(str(folder / f"{name}.tar")):
            words = [
                question.answers[0] for question in sample.questions if question.question == "what is this?"
            ]
            if not words or words[0] == "dog":
                continue
            assert isinstance(sample.image, bytes)
            thing = an(words[0])
            texts = [f"{thing}.", f"{thing} is shown in the picture.", f"a close up of {thing}."]
            yield f"said-{sample.key}", sample.image, {"captions": texts}


def from_captions(texts: list[str], random: np.random.Generator) -> list[tuple[str, str]]:
    """Questions that the captions of one image answer; for colors and counts two captions must agree."""
    lower = [text.lower() for text in texts]
    whole = " ".join(lower)
    words = set(re.findall(r"[a-z]+", whole))
    found: list[tuple[str, str]] = []
    colors = Counter(
        pair
        for text in lower
        for pair in set(re.findall(rf"\b({'|'.join(COLORS)}) (?:and \w+ )?(shirt|jacket|dress|hat|coat|shorts|car|ball|"
                                   r"dog|bike|pants|collar|toy|suit|helmet|uniform|top|boat)\b", text))
    )  # fmt: skip
    for (color, thing), votes in colors.items():
        if votes > 1 and sum(other == thing for _, other in colors) == 1:
            be = "are" if thing in ("shorts", "pants") else "is"
            found += [(f"what color {be} the {thing}?", color)]
    counts = Counter(
        pair
        for text in lower
        for pair in set(re.findall(rf"\b({'|'.join(NUMBERS[1:])}) (?:\w+ )?({MANY})\b", text))
    )
    for (number, things), votes in counts.items():
        if votes > 1:
            found.append((f"how many {things} are there?", number))
    present = [word for word in ABSENT if re.search(rf"\b{word}s?\b", whole)]
    for word in present:
        if sum(bool(re.search(rf"\b{word}s?\b", text)) for text in lower) > 1:
            found.append((f"is there {'' if word in ('snow', 'water') else 'a '}{word}?", "yes"))
            absent = [other for other in ABSENT if other not in words and f"{other}s" not in words]
            if not words & PEOPLE or word not in PEOPLE:
                absent = [other for other in absent if other not in PEOPLE or not words & PEOPLE]
            other = absent[int(random.integers(len(absent)))]
            found.append((f"is there {'' if other in ('snow', 'water') else 'a '}{other}?", "no"))
    for animal in ("dog", "horse", "bird", "cat"):
        if sum(bool(re.search(rf"\b{animal}s?\b", text)) for text in lower) > 2:
            found += [
                ("what animal is it?", animal),
                ("what animal is this?", animal),
                ("is it an animal?", "yes"),
            ]
    actions = r"\b(man|woman|boy|girl|dog) (?:is )?(\w+ing)\b"
    doing = Counter(pair for text in lower for pair in set(re.findall(actions, text)))
    for (who, action), votes in doing.items():
        if votes > 1:
            found.append((f"what is the {who} doing?", action))
    return found


def _class_row(key: str, image: bytes, number: int, name: str, random: np.random.Generator) -> Row:
    asked = [{"question": q, "answer": a} for q, a in questions(number, name, random)]
    return key, image, {"captions": captions(name, EVERYDAY.get(number)), "qa": asked, "label": name}


def _classes(samples: Path) -> dict[str, tuple[int, str]]:
    """WordNet id -> (number, name), from the file names of the samples."""
    files = sorted(samples.glob("n*.JPEG"))
    return {file.stem[:9]: (number, file.stem[10:].replace("_", " ")) for number, file in enumerate(files)}


def samples(folder: Path) -> Iterator[Row]:
    """One photograph of each class."""
    random = np.random.default_rng(1)
    for wnid, (number, name) in _classes(folder).items():
        file = next(folder.glob(f"{wnid}_*.JPEG"))
        yield f"sample-{wnid}", file.read_bytes(), _class_row("", b"", number, name, random)[2]


def _of_classes(folders: list[Path], each: int) -> Iterator[Row]:
    known, random = _classes(SAMPLES), np.random.default_rng(2)
    for folder in folders:
        number, name = known[folder.name]
        for file in sorted(folder.iterdir())[:each]:
            yield _class_row(file.stem, file.read_bytes(), number, name, random)


def nette(folder: Path) -> Iterator[Row]:
    """Imagenette's training part."""
    yield from _of_classes(sorted((folder / "train").iterdir()), NETTE_EACH)


def mini(folder: Path) -> Iterator[Row]:
    """mini-ImageNet."""
    yield from _of_classes(
        sorted(p for part in ("train", "val") for p in (folder / part).iterdir()), MINI_EACH
    )


def clothing(folder: Path) -> Iterator[Row]:
    """Product photographs with their class."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        word = CLOTHES.get(part.name, part.name)
        for file in sorted(part.glob("*.jpg"))[::2]:
            asked = [
                {"question": q, "answer": word} for q in ("what is this?", "what piece of clothing is it?")
            ]
            asked.append({"question": "is it an animal?", "answer": "no"})
            texts = [
                f"{start} {an(name)}"
                for start in ("a photo of", "a close up of")
                for name in (word, part.name)
            ]
            about = {"captions": texts, "qa": asked, "label": part.name}
            yield f"clothing-{part.name}-{file.stem}", file.read_bytes(), about


def coco128(folder: Path) -> Iterator[Row]:
    """Labeled photographs of COCO: counts and presence."""
    random, boxes = np.random.default_rng(3), folder / "object_detection"
    names = re.findall(r"^ +\d+: (.+)$", (boxes / "config.yaml").read_text("utf-8"), re.MULTILINE)
    for file in sorted((folder / "images").rglob("*.jpg")):
        labels = boxes / "labels" / file.parent.name / f"{file.stem}.txt"
        lines = labels.read_text("utf-8").splitlines() if labels.is_file() else []
        counts = Counter(names[int(line.split()[0])] for line in lines)
        if not counts:
            continue
        asked = [(f"how many {name}s are there?", NUMBERS[n - 1]) for name, n in counts.items()
                 if n <= 5 and not name.endswith(("s", "sh", "ch", "person"))]  # fmt: skip
        for name in list(counts)[:3]:
            other = str(random.choice([each for each in names if each not in counts]))
            asked += [(f"is there {an(name)}?", "yes"), (f"is there {an(other)}?", "no")]
        listed = [an(name) for name, _ in counts.most_common(3)]
        text = listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"
        animal = [name for name in counts if name in {*ANIMALS.values()}]
        asked += [("what animal is it?", name) for name in animal[:1]]
        about = {"captions": [text, f"a photo of {text}", f"there is {text} in the photo"],
                 "qa": [{"question": q, "answer": a} for q, a in asked]}  # fmt: skip
        yield f"coco128-{file.stem}", file.read_bytes(), about


def coco2014(folder: Path) -> Iterator[Row]:
    """Photographs without captions."""
    for file in sorted(folder.glob("*.jpg")):
        yield file.stem, file.read_bytes(), {}


def guessed(folder: Path) -> Iterator[Row]:
    """Photographs of which the classifier is sure, if their class has an everyday word."""
    weights, features = SETTINGS["weights"], FeatureStore([SETTINGS["features"]])
    layers, tensors = read_efficientnet(weights), read_tensors([Path(weights)])
    names = [name for _, name in sorted(_classes(SAMPLES).values())]
    random = np.random.default_rng(4)
    for file in sorted(folder.glob("*.jpg")):
        trunk = torch.from_numpy(features.get(Sample(file.stem, file), 0).astype(np.float32))
        head = torch.nn.functional.conv2d(trunk[None], layers["head.weight"], layers["head.bias"])
        pooled = torch.nn.functional.relu6(head).mean((2, 3))
        logits = torch.nn.functional.linear(pooled, tensors["_fc.weight"], tensors["_fc.bias"])[0]
        chances, number = logits.softmax(0), int(logits.argmax())
        word = EVERYDAY.get(number)
        sure = sum(float(p) for n, p in enumerate(chances) if word is not None and EVERYDAY.get(n) == word)
        if word is not None and sure > SURE:
            about = _class_row("", b"", number, names[number] if chances[number] > SURE else word, random)[2]
            yield file.stem, file.read_bytes(), about


SOURCES = {"flickr": flickr, "samples": samples, "nette": nette, "mini": mini, "clothing": clothing, "coco128": coco128,
           "coco2014": coco2014, "guessed": guessed, "said": said}  # fmt: skip
SETTINGS = dict(each.partition("=")[::2] for each in sys.argv[2:])
SAMPLES = Path(SETTINGS.get("samples", "."))

if __name__ == "__main__":
    main(*sys.argv[1:])
