"""What a family tells `load`: its network, its config, its layouts, its tokenizer."""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, TypeAlias

from torch import Tensor, nn

from sightloop.checkpoints.hub import CheckpointFiles
from sightloop.checkpoints.key_map import KeyMap
from sightloop.types import JsonDict, JsonMapping, TokenizerKind

# A network -> what is asked to take each of its weights (see `weights.fill`).
WeightHook: typing.TypeAlias = "Callable[[nn.Module], Callable[[str, Tensor], bool]]"


ConfigType: TypeAlias = "type[Any]"  # a dataclass of sizes


@dataclass(frozen=True, slots=True)
class Layout:
    """One way in which a family's checkpoints are written.

    markers: tensors that every checkpoint of this layout has, and none of another layout or family.
    ignored: patterns of names that carry nothing for us. prepare: brings names with a second spelling to one.
    configure: from the parsed config (may be empty) and the tensors to the family's Config. keys: the map, or what
    makes it of a Config where families have more than one kind of tower.
    """

    keys: KeyMap | Callable[[Any], KeyMap]
    ignored: Sequence[str]
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    markers: Sequence[str]
    configure: Callable[[JsonMapping, Mapping[str, Tensor]], Any]


@dataclass(frozen=True, slots=True)
class Family:
    """One family: its network, its config, its layouts by name, the kind of its tokenizer and image processor."""

    name: str
    network: Callable[[Any], nn.Module]
    config: ConfigType
    layouts: Mapping[str, Layout]
    # A family with several kinds says which one by its config.
    tokenizer: TokenizerKind | Callable[[Any], TokenizerKind]
    image_processor: str
    # Each model that `transformers` makes of it: folder ("" where there is one) -> (config.json, tensor prefixes).
    to_transformers: Callable[[Any], dict[str, tuple[JsonDict, tuple[str, ...]]]]
    # The processor settings that original checkpoints were trained with (they carry none themselves).
    default_image: Callable[[Any], JsonDict]

    # `model_type` in config.json of those that it reads; () for a family that has no such file.
    model_types: tuple[str, ...] = ()

    # Types of those fields of the config that its class declares by a protocol.
    towers: Mapping[str, ConfigType | UnionType] = field(default_factory=dict[str, "ConfigType | UnionType"])
    # Our image tower's weights from another's file: its path -> names below `vision.`, tensors.
    read_vision: Callable[[str], dict[str, Tensor]] | None = None
    # Whether the reference reads how it writes in generation_config.json.
    generation: bool = False
    # The network with a language model behind it: from the network of a first stage, the files of the language model
    # alone, the id of its image token, a seed.
    add_language_model: Callable[[nn.Module, CheckpointFiles, int, int], nn.Module] | None = None
    # A processor_config.json and what it adds to the image processor's settings, for readers that need one: from the
    # config, the size of images, and the words that stand for no thing.
    processor: Callable[[Any, tuple[int, int], Sequence[str]], tuple[JsonDict, JsonDict]] | None = None

    def tokenizer_of(self, config: Any) -> TokenizerKind:
        """The kind of a checkpoint of this config."""
        return self.tokenizer(config) if callable(self.tokenizer) else self.tokenizer


def keep_names(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """For layouts in which every name has one spelling."""
    return tensors
