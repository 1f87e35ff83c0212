"""Class names and splits of YOLO data sets: `names`, `train`, ... of a .yaml file, or the lines of classes.txt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sightloop.data.datasets.sidecar_files import read_plain_file
from sightloop.data.datasets.values import check_text
from sightloop.errors import UsageError

if TYPE_CHECKING:
    import yaml

_MAX_BYTES = 1 << 20
_USUAL_NAMES = ("classes.txt", "data.yaml", "data.yml", "dataset.yaml")
_NAMES_LINE = re.compile(rb"^(\xef\xbb\xbf)?[\"']?names[\"']?[ \t]*:", re.M)
_KEYPOINTS_LINE = re.compile(rb"^[\"']?kpt_shape[\"']?[ \t]*:", re.M)
_SPLITS = ("train", "val", "valid", "test")
_NUMBER = re.compile(r"\d{1,9}")


def class_names_file(root: Path) -> Path | None:
    """The file with the class names, in a folder or its parent: a usual name, or another .yaml that has `names`."""
    for folder in (root, root.parent):
        for name in _USUAL_NAMES:
            if (folder / name).is_file():
                return folder / name
        if folder == root.parent and not (root / "labels").is_dir():
            continue
        files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
        for file in files[:20]:
            try:
                data = read_plain_file(str(file), _MAX_BYTES)
            except ValueError:
                continue
            if _NAMES_LINE.search(data):
                return file
    return None


def read_class_names(file: Path) -> dict[int, str]:
    """Class name by number. Raises UsageError if the file cannot be read, or has no names."""
    try:
        text = read_plain_file(str(file), _MAX_BYTES).decode("utf-8-sig")
        if file.suffix == ".txt":
            return dict(enumerate(filter(None, map(str.strip, text.splitlines()))))
        names = _names_of_yaml(text)
    except UnicodeDecodeError:
        raise UsageError(f"{file}: its text is not UTF-8; save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file} cannot be read as YAML: {reason}.") from None
    if not names:
        raise UsageError(
            f"{file}: no class names; write them under `names:`, one per line (`- cat` or `0: cat`)."
        )
    return names


def yaml_text(images: str, names: Mapping[int, str]) -> str:
    """Text of the .yaml file of a data set.

    Args:
        images: folder of the images of all splits, as seen from the file.
        names: class name by number.
    """
    import yaml

    content = {"train": images, "val": images, "names": dict(names)}
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1000)


def has_keypoints(file: Path) -> bool:
    """Whether label lines hold keypoints after the box: the .yaml has `kpt_shape`."""
    return (
        file.suffix != ".txt" and _KEYPOINTS_LINE.search(read_plain_file(str(file), _MAX_BYTES)) is not None
    )


def read_splits(file: Path) -> tuple[str, dict[str, list[str]]]:
    """The member `path` of a .yaml file ("" without one), and the paths of each split, as they are written.

    Raises UsageError if the file cannot be read.
    """
    import yaml

    try:
        document = _mapping_of_yaml(read_plain_file(str(file), _MAX_BYTES).decode("utf-8-sig"))
        splits: dict[str, list[str]] = {}
        for name in _SPLITS:
            node = document.get(name)
            items = node.value if isinstance(node, yaml.SequenceNode) else [node]
            paths = [_text(item) for item in items if item is not None]
            splits[name] = [path for path in paths if path not in ("", "~", "null")]
        root = _text(document["path"]) if "path" in document else ""
    except UnicodeDecodeError:
        raise UsageError(f"{file}: its text is not UTF-8; save it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file} cannot be read as YAML: {reason}.") from None
    return root, {name: paths for name, paths in splits.items() if paths}


def _mapping_of_yaml(text: str) -> dict[str, yaml.Node]:
    """The members of a document that is a mapping; {} of any other."""
    import yaml

    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        # The nodes show repeated keys and aliases, which grow without bound when they are resolved.
        document = yaml.compose(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    members: dict[str, yaml.Node] = {}
    for key, value in document.value if isinstance(document, yaml.MappingNode) else ():
        if (name := _text(key)) in members:
            raise ValueError(f"`{name}` occurs twice")
        members[name] = value
    return members


def _names_of_yaml(text: str) -> dict[int, str]:
    import yaml

    node = _mapping_of_yaml(text).get("names")
    if isinstance(node, yaml.SequenceNode):
        return {number: _text(item) for number, item in enumerate(node.value)}
    if not isinstance(node, yaml.MappingNode):
        return {}
    names: dict[int, str] = {}
    for key, value in node.value:
        number = _text(key)
        if not _NUMBER.fullmatch(number):
            raise ValueError(f"the class {number!r} is no number")
        if int(number) in names:
            raise ValueError(f"the class {number} has two names")
        names[int(number)] = _text(value)
    return names


def _text(node: yaml.Node) -> str:
    """A scalar as it is written: `no`, `1.0` and `null` are names too."""
    value = node.value
    if not isinstance(value, str):
        raise ValueError("a class name or a path is no text")
    return check_text(value, "class name or path")


def label_numbers(line: str) -> tuple[float, ...] | None:
    """Numbers of a label line, the class first; None if it is none."""
    try:
        values = tuple(float(word) for word in line.split())
    except ValueError:
        return None
    is_label = len(values) >= 5 and values[0] >= 0 and values[0].is_integer()
    return values if is_label and all(abs(value) <= 1e6 for value in values) else None
