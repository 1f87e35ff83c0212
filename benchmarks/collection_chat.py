"""Thirty questions to a collection: `python -m benchmarks.collection_chat -d dev-000.tar --index INDEX`.

INDEX holds the images of the dataset, whose captions are the known answers. Ten questions ask for the image of one
caption, ten how many images show something (right from the number of images of which at least two captions name it to
that of which one does), ten for what no caption of the collection names. A second list counts how often all things that
no caption names are declined, and how often things that captions do name are. Where the images alone do not tell,
captions of the index are evidence, so that this measures the conversation more than the model.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

import sightloop
from sightloop.dialogue.collection_chat import CollectionChat, GroundedAnswer
from sightloop.types import Sample

_OF_A_KIND = 10
# Objects that photographs show, some of them in no caption of a collection.
_THINGS = (
    "accordion, airplane, ambulance, anchor, aquarium, bagpipe, banana, barn, bear, bee, broccoli, bulldozer, cactus, "
    "calculator, camel, candle, canoe, cassette, castle, cat, chandelier, chess board, chimpanzee, computer keyboard, "
    "crab, crocodile, desk lamp, dinosaur, dolphin, donut, drill, elephant, espresso machine, fire engine, flamingo, "
    "fountain pen, fox, giraffe, globe, goat, goldfish, gorilla, hammer, harp, hedgehog, helicopter, hippopotamus, "
    "kangaroo, koala, laptop, lemon, lighthouse, lion, lobster, microscope, microwave, mushroom, octopus, ostrich, "
    "oven, panda, parrot, peacock, penguin, piano, pineapple, pizza, printer, pyramid, rhinoceros, rocket, safe, "
    "saxophone, scorpion, sewing machine, shark, snail, snake, spider, strawberry, submarine, sushi, syringe, tank, "
    "teapot, telephone, telescope, tiger, toaster, toilet, tractor, trombone, turtle, typewriter, vacuum cleaner, "
    "violin, volcano, washing machine, whale, wheelbarrow, windmill, zebra"
).split(", ")


def named_counts(samples: Sequence[Sample], least: int) -> Counter[str]:
    """Word without its s -> images of which at least so many captions have it."""
    counts = Counter[str]()
    for sample in samples:
        words = Counter(
            word
            for text in sample.captions
            for word in {stem(w) for w in re.findall(r"[a-z]+", text.lower())}
        )
        counts.update(word for word, count in words.items() if count >= least)
    return counts


def stem(word: str) -> str:
    """A word without the ending of a plural."""
    return re.sub(r"(?<=..)(?:(?<=[sxh])es|s)$", "", word)


def is_named(thing: str, texts: str) -> bool:
    """Whether a text has the last word of a thing, also in the plural."""
    return re.search(rf"\b{re.escape(thing.split()[-1])}(?:e?s)?\b", texts) is not None


def ask(chat: CollectionChat, question: str, ids: set[str]) -> GroundedAnswer:
    """An answer; AssertionError if it cites an image that the collection does not have, or none and finds some."""
    answer = chat.ask(question)
    assert all(citation.name in ids for citation in answer.citations), answer
    assert answer.declined or answer.citations, answer
    return answer


def main() -> None:
    """Asks, and prints the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-d", "--data", required=True)
    parser.add_argument("--index", required=True)
    parser.add_argument("-m", "--model", default="nano")
    parser.add_argument("--cut", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    samples = list(sightloop.open_dataset(options.data))
    index, model = sightloop.open_index(options.index), sightloop.load(options.model)
    index.use_model(model)
    index.use_judge(model)
    random = np.random.default_rng(options.seed)
    chat = CollectionChat(index, model, cut=options.cut, rerank=16)
    names = {hit.name for hit in index.search("a photo", len(index)).hits}
    texts = " ".join(text.lower() for sample in samples for text in sample.captions)

    print("which image (a person's caption of it)")
    found = 0
    for i in random.permutation(len(samples))[:_OF_A_KIND].tolist():
        answer = ask(chat, f"find {samples[i].captions[0].rstrip(' .')}", names)
        hit = any(samples[i].key in citation.name for citation in answer.citations)
        found += hit
        print(f"  {'right' if hit else 'declined' if answer.declined else 'wrong'}: {samples[i].captions[0]}")
    print("how many")
    counts, most = named_counts(samples, 2), named_counts(samples, 1)
    usual = sorted(word for word, count in counts.items() if 15 <= count <= 100 and word not in _STOP)
    near = 0
    for word in random.permutation(usual)[:_OF_A_KIND].tolist():
        answer = ask(chat, f"how many images show {word}?", names)
        number = int(match[1].replace(",", "")) if (match := re.search(r"([\d,]+) image", answer.text)) else 0
        near += counts[word] <= number <= most[word]
        print(f"  {word}: {number}, by the captions {counts[word]} to {most[word]}")
    absent = [thing for thing in _THINGS if not is_named(thing, texts)]
    present = [thing for thing in _THINGS if counts[stem(thing)] > 1]
    declined = {
        thing: ask(chat, f"is there a {thing}?", names).declined
        for thing in [*random.permutation(absent).tolist(), *present]
    }
    first = [thing for thing in declined if thing in absent][:_OF_A_KIND]
    print(f"what is not there: {', '.join(f'{t} {declined[t]}' for t in first)}")
    print(
        f"right image {found} of {_OF_A_KIND}; count between those of the captions {near} of {_OF_A_KIND}; declined "
        f"{sum(declined[t] for t in first)} of {_OF_A_KIND} that no caption names"
    )
    print(
        f"declined: {sum(declined[t] for t in absent)} of {len(absent)} things that no caption names, "
        f"{sum(declined[t] for t in present)} of {len(present)} that captions of two images or more name"
    )


_STOP = frozenset(
    "an and are as at by for from her his in into is it its of on one onto out over the their there they this to two "
    "three through up while who with another other some several four near next down around off".split()
)

if __name__ == "__main__":
    main()
