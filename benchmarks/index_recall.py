"""Does an index find what `evaluate retrieval` finds? `python -m benchmarks.index_recall -d dev-000.tar -m nano`.

Every caption is searched in an index of the images, with and without re-ranking; the share of captions whose image is
among the first ten is put beside the text-to-image recall@10 of `evaluate retrieval` on the same samples. Search reads
"a man with no shirt" as a text and its negative, `evaluate` as it stands: there the two may differ.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sightloop
from sightloop.data.datasets.convert import convert
from sightloop.data.datasets.dataset import Dataset
from sightloop.search.index import Index

_K = 10


def index_recall(index: Index, data: Dataset, rerank: int = 0, words: bool = False) -> float:
    """Share of the captions whose image is among the first ten hits.

    Args:
        index: of the images.
        data: samples with captions, whose keys are the paths in the index.
        rerank: number of hits that are re-ranked.
        words: fuse with keywords, which the captions of the index are, the own one among them.
    """
    found: list[bool] = []
    for sample in data:
        for caption in sample.captions:
            hits = index.search(caption, _K, rerank=rerank, words=caption if words else None)
            found.append(any(hit.row["path"] == sample.key for hit in hits))
    return sum(found) / len(found)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the recalls."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-d", "--data", required=True, help="images with captions")
    parser.add_argument("-m", "--model", default="nano")
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--rerank", type=int, default=16, help="0: not re-ranked")
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    options = parser.parse_args(arguments)
    model = sightloop.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        some = Path(folder) / "some.tar"
        whole = sightloop.open_dataset(options.data)
        convert(whole.select(range(min(options.images, len(whole)))), some)
        data = sightloop.open_dataset(some)
        index = Index.create(Path(folder) / "index", model=model, dtype=options.dtype)
        index.add(some)
        ranks = [0] + ([options.rerank] if options.rerank and "match" in model.capabilities else [])
        expected = dict(sightloop.evaluate("retrieval", data, model=model, rerank=ranks[1:]))
        for rerank in ranks:
            name = f"text-to-image recall@{_K}{f', k={rerank}' if rerank else ''}"
            print(
                f"{name}: index {index_recall(index, data, rerank):.4f}, evaluate {expected[name]:.4f}",
                flush=True,
            )
        print(f"with keywords beside the vectors: {index_recall(index, data, words=True):.4f}")


if __name__ == "__main__":
    main()
