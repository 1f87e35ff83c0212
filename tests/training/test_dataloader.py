"""Hidden words: what networks read has gaps, what they are asked for has none, on every number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sightloop.data.datasets.dataset import open_dataset
from sightloop.data.datasets.synthetic import synthetic_world, write_synthetic_world
from sightloop.data.text.tokenizer import load_tokenizer
from sightloop.data.text.train_tokenizer import train_wordpiece
from sightloop.objectives import language
from sightloop.training.config import DataSettings
from sightloop.training.dataloader import Batch, BatchLoader, TextRows
from sightloop.training.grad_cache import GradCache
from sightloop.training.loss_terms import LossContext, lm
from sightloop.training.recipes import RECIPES
from sightloop.types import Encoded, ImageSpec, Loss


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


def test_only_input_ids_are_masked(tmp_path: Path) -> None:
    plain, hidden = (rows_of(batch_of(tmp_path, share)) for share in (0.0, 0.4))
    assert plain.input_ids is plain.ids
    assert torch.equal(plain.ids, hidden.ids)
    changed = hidden.input_ids != hidden.ids
    assert 0.2 < changed.sum() / (hidden.lengths - 2).sum() < 0.45
    places = torch.arange(changed.shape[1])
    assert not changed[(places == 0) | (places >= hidden.lengths[:, None] - 1)].any()


def test_every_process_masks_the_same_words(tmp_path: Path) -> None:
    whole = rows_of(batch_of(tmp_path, 0.4)).input_ids
    parts = [rows_of(batch_of(tmp_path, 0.4, rank, 2)).input_ids for rank in range(2)]
    width = whole.shape[1]
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
    assert sorted(torch.cat(padded).tolist()) == sorted(whole.tolist())


class _Decoder(nn.Module):
    """Language-modeling network that records what it reads; its states are the ids themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []
        self.predicted: list[torch.Tensor] = []

    def frame_text(self, ids: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids.clone()
        ids[:, 0] = 5
        return ids, lengths

    def decoder_states(self, memory: Encoded, ids: torch.Tensor) -> torch.Tensor:
        self.read.append(ids)
        return ids[:, :, None].float()

    def lm_logits(self, states: torch.Tensor) -> torch.Tensor:
        self.predicted.append(states[:, 0])
        return states.repeat(1, 200)


def test_the_decoder_reads_masked_words_and_predicts_the_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, targets = batch_of(tmp_path, 0.4), list[torch.Tensor]()
    rows, network = rows_of(batch), _Decoder()

    def lm_loss(logits: torch.Tensor, ids: torch.Tensor, count: int, **_: object) -> Loss:
        targets.append(ids)
        return Loss(logits.sum() * 0, 1.0)

    monkeypatch.setattr(language, "lm_loss", lm_loss)
    recipe = RECIPES["blip_pretrain"]
    context = LossContext(
        network, None, nn.ModuleDict(), recipe, batch, torch.zeros(len(batch.keys), 1), {}, 0.0, GradCache(0)
    )
    context.__dict__["tokens"] = torch.zeros(len(batch.keys), 1, 1)
    lm(context)
    words = list(zip(rows.ids.tolist(), rows.input_ids.tolist(), rows.lengths.tolist(), strict=True))
    assert torch.cat(targets).tolist() == [word for row, _, n in words for word in row[1:n]]
    assert torch.cat(network.predicted).tolist() == [w for _, row, n in words for w in [5, *row[1 : n - 1]]]
