"""Columns of the Parquet files that `convert` writes: one for the encoded image and one for every field of a sample."""

from __future__ import annotations

import json
from typing import Any


def parquet_schema() -> Any:  # pyarrow has no type hints
    """Columns and types, with the metadata by which Hugging Face `datasets` decodes the images."""
    import pyarrow as pa

    text, texts, numbers = pa.string(), pa.list_(pa.string()), pa.list_(pa.float64())
    question = pa.struct([("question", text), ("answers", texts)])
    mask = pa.struct([("size", pa.list_(pa.int64())), ("counts", text)])
    shape = [("label", text), ("box", numbers), ("polygons", pa.list_(numbers))]
    region = pa.struct([*shape, ("score", pa.float64()), ("mask", mask)])
    texts_of_round = [("question", text), ("answer", text), ("candidates", texts)]
    one_round = pa.struct([*texts_of_round, ("truth", pa.int64()), ("relevance", numbers)])
    dialogue = pa.struct([("caption", text), ("rounds", pa.list_(one_round))])
    image = pa.struct([("bytes", pa.binary()), ("path", text)])  # as Hugging Face `datasets` has it
    # `datasets` then decodes the column as images; it infers the other features from their types.
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    return pa.schema(
        [
            ("key", text),
            ("image", image),
            ("captions", texts),
            ("qa", pa.list_(question)),
            ("regions", pa.list_(region)),
            ("label", text),
            ("dialogues", pa.list_(dialogue)),
            ("extra", text),
        ],
        metadata={"huggingface": json.dumps(features)},
    )
