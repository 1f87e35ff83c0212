"""Models of the fake kind are named by one letter, and count as existing."""

from __future__ import annotations

import pytest

from sightloop.apps.cli import caption
from sightloop.checkpoints import hub


@pytest.fixture(autouse=True)
def fake_models_exist(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    locate = hub.locate
    fake = hub.CheckpointFiles("fake", tmp_path_factory.mktemp("fake"), (), None)
    monkeypatch.setattr(hub, "locate", lambda source: fake if len(str(source)) == 1 else locate(source))
    monkeypatch.setattr(caption, "weights_identity", lambda source, lora=None: "")
