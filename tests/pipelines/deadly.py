"""A dataset that kills who looks at one of its samples; a file of its own, as worker processes import it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from sightread.data.samples import Dataset, open_dataset
from sightread.types import Sample

VICTIM = "train-1-000002"


class Deadly(Dataset):
    """The samples of a source."""

    def __init__(self, path: Path) -> None:
        super().__init__(open_dataset(path)._sources)

    def __getitem__(self, index: int) -> Sample:
        if self.key(index) == VICTIM:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)
