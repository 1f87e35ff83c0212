"""Hidden words: what networks read has gaps, what they are asked for has none, on every number of processes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.text.tokenizer import load_tokenizer
from sightloop.data.text.train_tokenizer import train_wordpiece
from sightloop.training.config import DataSettings
from sightloop.training.dataloader import Batch, BatchLoader, TextRows
from sightloop.training.loss_terms import _written
from sightloop.types import Encoded, ImageSpec


def batch_of(folder: Path, share: float, rank: int = 0, processes: int = 1) -> Batch:
    shard, words = folder / "world.tar", folder / "vocab.txt"
    if not shard.exists():
        write_synthetic_world(shard, synthetic_world("train", 8, seed=0))
        train_wordpiece([c for s in open_dataset(shard) for c in s.captions], 300, words)
    tokenizer = load_tokenizer(folder, kind="bert", max_length=40)
    settings = DataSettings(batch=8, texts=2, augment=None, caption_dropout=share)
    spec = ImageSpec(resize=(16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)
    dataset = open_dataset(shard)
    return next(BatchLoader(dataset, settings, tokenizer, spec, 3, {}, rank, processes).batches(2, 3))


def rows_of(batch: Batch) -> TextRows:
    assert batch.captions is not None
    return batch.captions


def test_only_what_is_read_has_gaps(tmp_path: Path) -> None:
    plain, hidden = (rows_of(batch_of(tmp_path, share)) for share in (0.0, 0.4))
    assert plain.read is plain.ids
    assert torch.equal(plain.ids, hidden.ids)
    changed = hidden.read != hidden.ids
    assert 0.2 < changed.sum() / (hidden.lengths - 2).sum() < 0.45
    places = torch.arange(changed.shape[1])
    assert not changed[(places == 0) | (places >= hidden.lengths[:, None] - 1)].any()


def test_every_process_hides_the_same(tmp_path: Path) -> None:
    whole = rows_of(batch_of(tmp_path, 0.4)).read
    parts = [rows_of(batch_of(tmp_path, 0.4, rank, 2)).read for rank in range(2)]
    width = whole.shape[1]
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    assert sorted(torch.cat(padded).tolist()) == sorted(whole.tolist())


def test_the_decoder_reads_gaps_and_writes_the_words(tmp_path: Path) -> None:
    rows = rows_of(batch_of(tmp_path, 0.4))
    seen: list[torch.Tensor] = []

    def tower(ids: torch.Tensor, **_: object) -> Encoded:
        seen.append(ids)
        return Encoded(ids[:, :, None])

    tower.memory = lambda tokens: None
    network = SimpleNamespace(
        config=SimpleNamespace(start_id=5), decoder=SimpleNamespace(text=tower, head=lambda states: states)
    )
    read, targets = _written(network, Encoded(torch.zeros(1)), rows, slice(0, 3))
    lengths = rows.lengths[:3].tolist()
    assert targets.tolist() == [
        word for row, n in zip(rows.ids[:3].tolist(), lengths, strict=True) for word in row[1:n]
    ]
    want = [
        word for row, n in zip(rows.read[:3].tolist(), lengths, strict=True) for word in [5, *row[1 : n - 1]]
    ]
    assert read[:, 0].tolist() == want
