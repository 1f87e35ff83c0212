"""Pascal VOC's XML: an annotation file per image, read without entities and without document types.

    <annotation>
      <folder>JPEGImages</folder> <filename>a.jpg</filename>
      <object> <name>cat</name>
        <bndbox> <xmin>5</xmin> <ymin>3</ymin> <xmax>14</xmax> <ymax>8</ymax> </bndbox> </object>
    </annotation>

VOC counts pixels from 1, and the last one belongs to the box: the box above is 4, 2, 14, 8. A file with a 0 among its
corners counts from 0, as some programs write it; its corners are taken as they are. Everingham et al., "The Pascal
Visual Object Classes Challenge" (2010), http://host.robots.ox.ac.uk/pascal/VOC/.
"""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Sequence
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from sightloop.data.datasets.values import finite_numbers
from sightloop.types import JsonDict

_MAX_DEPTH = 32
_MAX_ELEMENTS = 100_000
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_ROOT = b"<annotation"
HEAD_BYTES = 2048
_ENCODING = re.compile(rb"^\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._-]{1,40})[\"']")
# Those of more than a byte a character, which expat does not know.
_WIDE_ENCODINGS = frozenset("gb2312 gbk gb18030 big5 shift_jis cp932 euc_jp euc_kr cp949".split())
_NOTE_NO_BOX = "objects of Pascal VOC have no bndbox and are left out"


def is_voc(head: bytes) -> bool:
    """Whether the first bytes of an .xml file are those of an annotation file."""
    return _ROOT in head[:HEAD_BYTES].replace(b"\0", b"")  # UTF-16 has a zero in each letter


def voc_fields(data: bytes, name: str, left_out: Counter[str] | None = None) -> JsonDict:
    """Fields of an annotation file: `image` (its path as it is written), where it has one, and `regions`.

    Args:
        data: the file.
        name: of the file, for messages.
        left_out: counts the objects that cannot be regions, by reason.

    Raises:
        ValueError: it is no XML, no annotation file, or a box is wrong.
    """
    root = _parse(data, name)
    if root.tag != "annotation":
        raise ValueError(f"{name} is no annotation file of Pascal VOC: it begins with <{root.tag}>")
    regions: list[JsonDict] = []
    boxes: list[list[float]] = []
    for number, item in enumerate(root.findall("object"), 1):
        box = item.find("bndbox")
        outline = item.find("polygon")
        if box is None and outline is None:
            if left_out is not None:
                left_out[_NOTE_NO_BOX] += 1
            continue
        where = f"{name}, object {number}"
        label = (item.findtext("name") or "").strip()
        if not label:
            raise ValueError(f"{where} has no name")
        points = _outline(outline, where)
        corners = (
            [min(points[0::2]), min(points[1::2]), max(points[0::2]), max(points[1::2])] if points else []
        )
        if box is not None:
            corners = _numbers([box.findtext(corner) for corner in _CORNERS], f"{where}: its bndbox")
            boxes.append(corners)
        regions.append({"label": label, "box": corners} | ({"polygons": [points]} if points else {}))
    if not any(0 in box for box in boxes):
        for box in boxes:
            box[0], box[1] = box[0] - 1, box[1] - 1
    image = (root.findtext("filename") or "").strip() or (root.findtext("path") or "").strip()
    return ({"image": image} if image else {}) | {"regions": regions}


def _outline(element: Element | None, where: str) -> list[float]:
    """The points of <polygon>, [] without one: <x1> <y1> <x2> <y2> ..., or <pt> <x> <y> </pt> ..."""
    if element is None:
        return []
    texts = [child.text for child in element if not len(child)]
    texts += [point.findtext(axis) for point in element.findall("pt") for axis in "xy"]
    points = _numbers(texts, f"{where}: its polygon")
    if len(points) < 6 or len(points) % 2:
        raise ValueError(f"{where}: its polygon has {len(points)} numbers, not an even number from 6")
    return points


def _numbers(texts: Sequence[str | None], what: str) -> list[float]:
    try:
        values = [float(text or "") for text in texts]
    except ValueError:
        raise ValueError(f"{what} holds something else than finite numbers") from None
    return list(finite_numbers(values, what))


def _parse(data: bytes, name: str) -> Element:
    """The tree of a file. Raises ValueError: no XML, with a document type, or with too many elements."""
    builder = TreeBuilder()
    encoding, data = _as_utf8(data, name)
    parser = expat.ParserCreate(encoding)
    depth = count = 0

    def refuse(*_: object) -> None:
        raise ValueError(f"{name} declares a document type or entities, which are not read")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > _MAX_DEPTH or count > _MAX_ELEMENTS:
            raise ValueError(f"{name} has too many elements, or they are nested too deeply")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.buffer_text = True
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except (
        expat.ExpatError,
        LookupError,
        UnicodeError,
    ) as error:  # the last two: of an encoding that expat lacks
        raise ValueError(f"{name} cannot be read as XML: {error}") from None
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name} cannot be read as XML: {error}") from None
    return builder.close()


def _as_utf8(data: bytes, name: str) -> tuple[str | None, bytes]:
    """The encoding to tell expat (None: it finds out itself), and the data in it."""
    declared = _ENCODING.match(data)
    encoding = "" if declared is None else declared[1].decode().lower()
    try:
        codec = codecs.lookup(encoding).name if encoding else ""
        return ("utf-8", data.decode(codec).encode()) if codec in _WIDE_ENCODINGS else (None, data)
    except LookupError:
        return None, data  # expat names it
    except UnicodeDecodeError:
        raise ValueError(
            f"{name} cannot be read as XML: its text is not {encoding}, which it declares"
        ) from None
