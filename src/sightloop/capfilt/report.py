"""OUT/report.json for programs, OUT/report.html for people: is the filter too strict, and what became of the texts?"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from PIL import Image

from sightloop.capfilt.filtering import TEXT_SOURCES
from sightloop.capfilt.shard import BINS, Job
from sightloop.data.atomic import atomic_write
from sightloop.data.images.decode import decode, read_file
from sightloop.errors import ImageError
from sightloop.types import JsonDict, JsonMapping

KEPT = ("matched", "ranked", "unjudged")
_MOST_TEXTS = 50_000  # that lengths, words and repetitions are counted over; totals count all
_UNITS_SHOWN = 8  # from which images are taken
_EACH = 8  # images of a kind
_SIDE = 180  # px
_MOST_NAMED = 200
_LONGEST = 500  # characters of a caption on the page
_MARKS = {"kept": "✓", "dropped": "✗"}
_NOT_JUDGED = ("empty", "looping", "duplicate")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: .5em 0 } td, th { padding: .2em .7em; text-align: left }
th { border-bottom: 1px solid #999 } .n { text-align: right; font-variant-numeric: tabular-nums }
.grid { display: flex; flex-wrap: wrap; gap: 1em } figure { width: 180px; margin: 0; font-size: 13px }
figcaption { overflow-wrap: anywhere } figcaption p { margin: .3em 0 } .kept { color: #14602e }
.dropped { color: #a3211a } small { color: #666 } .note { background: #fff4d6; padding: .4em .8em }
svg { background: #fafafa; margin-right: 2em } pre { white-space: pre-wrap; overflow-wrap: anywhere }
"""

_LEGEND = (
    "<p><small>Bars: how many texts have which ITM probability, that text and image match; dashed: the threshold."
    '</small><br>Is the filter too strict? Look at the close calls: where <span class="dropped">dropped texts</span> '
    'are right, lower the threshold; where <span class="kept">kept texts</span> are wrong, raise it.</p>'
)

Line = JsonDict


def write_report(job: Job, done: Mapping[int, JsonMapping], about: JsonMapping) -> JsonDict:
    """Writes both, from the manifest's lines of what is done so far and the evidence; returns what report.json says."""
    entries = [done[unit] for unit in sorted(done)]
    lines = list(_sampled(job, [entry["unit"] for entry in entries]))
    facts = _facts(job, entries, lines, about)
    atomic_write(job.out / "report.json", json.dumps(facts, indent=1) + "\n")
    atomic_write(job.out / "report.html", _page(job, facts, _chosen(lines, job.options.threshold)))
    return facts


def shares(texts: Mapping[str, int]) -> dict[str, JsonDict]:
    """For each source: total, kept, share, and the share of the judged that is dropped (the paper's noise ratio)."""
    found: dict[str, JsonDict] = {}
    for source in TEXT_SOURCES:
        reasons = {name.partition(" ")[2]: n for name, n in texts.items() if name.startswith(f"{source} ")}
        total, kept = sum(reasons.values()), sum(reasons.get(reason, 0) for reason in KEPT)
        judged = total - sum(reasons.get(reason, 0) for reason in (*_NOT_JUDGED, "unjudged", "ranked"))
        judged -= reasons.get("not in the top k", 0)
        found[source] = {
            "total": total,
            "kept": kept,
            "share": round(kept / total, 4) if total else None,
            "noise_ratio": round(reasons.get("unmatched", 0) / judged, 4) if judged else None,
            "reasons": reasons,
        }
    return found


def words(text: str) -> list[str]:
    """The words of a text, case folded."""
    return re.findall(r"\w+", text.casefold())


def _sampled(job: Job, units: Sequence[int]) -> Iterator[Line]:
    """Lines of evidence of whole units, spread over those that are done, at most so many; "unit" is added."""
    step = max(1, len(units) // 64)
    count = 0
    for unit in [unit for first in range(step) for unit in units[first::step]]:
        with job.evidence(unit).open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                if "text" in line:
                    yield line | {"unit": unit}
                    count += 1
        if count >= _MOST_TEXTS:
            return


def _facts(job: Job, entries: Sequence[JsonMapping], lines: Sequence[Line], about: JsonMapping) -> JsonDict:
    texts = Counter[str]()
    bins = {source: [0] * BINS for source in TEXT_SOURCES}
    failed: list[list[str]] = []
    for entry in entries:
        texts.update(entry["texts"])
        for source in TEXT_SOURCES:
            bins[source] = [a + b for a, b in zip(bins[source], entry["itm"][source], strict=True)]
        failed += entry["failed"]
    return {
        "about": {name: value for name, value in about.items() if name != "sources"},
        "shards": {"done": len(entries), "of": len(job.shards), "bytes": sum(e["bytes"] for e in entries)},
        "images": {name: sum(entry[name] for entry in entries) for name in ("samples", "written")}
        | {"failed": len(failed)},
        "texts": shares(texts),
        "itm_histogram": {"bins": f"{BINS} of equal width from 0 to 1", **bins},
        "kept_at_threshold": {
            f"{place / BINS:.2f}": {
                s: round(sum(b[place:]) / sum(b), 4) if any(b) else None for s, b in bins.items()
            }
            for place in range(0, BINS, 2)
        },
        "before": _language([line for line in lines if line["source"] == "web"]),
        "after": _language([line for line in lines if line["verdict"] == "kept"]),
        "throughput": _throughput(job),
        "failures": failed[:_MOST_NAMED],
    }


def _language(lines: Sequence[Line]) -> JsonDict:
    """Lengths, vocabulary, repetitions of some texts. Near duplicates have the same words, in any order or case."""
    lengths, vocabulary = Counter[int](), Counter[str]()
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for line in lines:
        found = words(line["text"])
        lengths[len(found)] += 1
        vocabulary.update(found)
        alike[tuple(sorted(set(found) - {"a", "an", "the"}))].append(line["text"])
    total = len(lines)
    crowds = sorted((crowd for crowd in alike.values() if len(crowd) > 1), key=len, reverse=True)
    return {
        "texts_counted": total,
        "mean_words": round(sum(n * count for n, count in lengths.items()) / total, 2) if total else None,
        "words_histogram": {str(n): lengths[n] for n in sorted(lengths)},
        "vocabulary": len(vocabulary),
        "near_duplicates": round(sum(map(len, crowds)) / total, 4) if total else None,
        "most_repeated": [[crowd[0], len(crowd)] for crowd in crowds[:10]],
    }


def _throughput(job: Job) -> JsonDict:
    """Of all runs so far, as log.jsonl tells."""
    path = job.out / "log.jsonl"
    samples = seconds = 0.0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            samples, seconds = samples + line["samples"], seconds + line["seconds"]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a kill
    return {
        "images": int(samples),
        "seconds": round(seconds, 2),
        "images_per_second": round(samples / seconds, 3) if seconds else None,
    }


def _chosen(lines: Iterable[Line], threshold: float) -> dict[str, list[list[Line]]]:
    """Images to show, with all their texts: clear cases of both verdicts, and close calls."""
    pictures: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for line in lines:
        pictures[line["unit"], line["key"]].append(line)
    units = list(dict.fromkeys(unit for unit, _ in pictures))[:_UNITS_SHOWN]
    some = [texts for (unit, _), texts in pictures.items() if unit in units]
    judged = [texts for texts in some if any(t["itm"] is not None for t in texts)]

    def least(texts: list[Line]) -> float:
        return min(t["itm"] for t in texts if t["itm"] is not None)

    def nearest(texts: list[Line]) -> float:
        return min(abs(t["itm"] - threshold) for t in texts if t["itm"] is not None)

    if not judged:
        return {"Some images": some[: 2 * _EACH]}
    by_least = sorted(judged, key=least)
    return {
        "Close calls: would you decide so?": sorted(judged, key=nearest)[:_EACH],
        "Dropped most surely": by_least[:_EACH],
        "Kept most surely": by_least[::-1][:_EACH],
        "As they come": judged[:_EACH],
    }


# -- the page ----------------------------------------------------------------------------------------------------------


def _page(job: Job, facts: JsonMapping, chosen: Mapping[str, list[list[Line]]]) -> str:
    pictures, shards, speed = facts["images"], facts["shards"], facts["throughput"]
    state = (
        "" if shards["done"] == shards["of"] else f" ({shards['done']:,} of {shards['of']:,} shards are done)"
    )
    rate = f"; {speed['images_per_second']:,} images/s" if speed["images_per_second"] else ""
    models = ", ".join(f"{part} {name}" for part, name in facts["about"]["models"].items())
    parts = [
        f"<h1>Bootstrap of {pictures['samples']:,} images{state}</h1>",
        f"<p>{pictures['written']:,} images in the new dataset, {pictures['failed']:,} failed{rate}.<br>"
        f"{_text(models)}; mode {job.options.mode}, keep {job.options.keep}, threshold {job.options.threshold:g}</p>",
        *(f'<p class="note">{_text(note[:1].upper() + note[1:])}.</p>' for note in facts["about"]["notes"]),
        _shares_table(facts["texts"]),
        *(_histogram(s, facts["itm_histogram"][s], job.options.threshold) for s in TEXT_SOURCES),
        _LEGEND if any(map(any, (facts["itm_histogram"][s] for s in TEXT_SOURCES))) else "",
    ]
    images = _images(job, {(t[0]["unit"], t[0]["key"]) for group in chosen.values() for t in group})
    for name, group in chosen.items():
        figures = "".join(_figure(texts, images) for texts in group)
        parts.append(f'<h2>{_text(name)}</h2><div class="grid">{figures}</div>')
    kept = facts["kept_at_threshold"]
    parts += [
        "<h2>What other thresholds would keep of the judged texts</h2>",
        _table(
            ["threshold", *kept], [[s, *(_percent(row[s]) for row in kept.values())] for s in TEXT_SOURCES]
        ),
        "<h2>Language, before and after</h2>",
        _language_table(facts["before"], facts["after"]),
    ]
    if facts["failures"]:
        parts.append(f"<h2>{pictures['failed']:,} failed</h2>")
        parts.append(_table(["shard", "key", "why"], facts["failures"]))
    parts.append(f"<h2>Settings</h2><pre>{_text(json.dumps(facts['about'], indent=1))}</pre>")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Bootstrap</title><style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _text(value: object) -> str:
    return escape(str(value).encode("utf-8", "backslashreplace").decode())


def _shown(text: str) -> str:
    """The beginning of a caption, apart from what is written from right to left in it."""
    return f"<bdi>{_text(text[:_LONGEST])}{'…' * (len(text) > _LONGEST)}</bdi>"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    names = "".join(f"<th>{_text(name)}" for name in head)
    cells = "".join(
        "<tr>" + "".join(f"<td{' class=n' if i else ''}>{_text(cell)}" for i, cell in enumerate(row))
        for row in rows
    )
    return f"<table><tr>{names}{cells}</table>"


def _shares_table(texts: JsonMapping) -> str:
    rows = [
        [
            s,
            f"{t['total']:,}",
            f"{t['kept']:,}",
            _percent(t["share"]),
            _percent(t["noise_ratio"]),
            _reasons(t),
        ]
        for s, t in texts.items()
    ]
    return _table(["texts", "all", "kept", "kept share", "noise ratio", "reasons"], rows) + (
        "<p><small>Noise ratio: the share of the judged texts that the filter drops. The BLIP paper had 25 % among its "
        "nucleus samples, 19 % among its beams.</small></p>"
    )


def _reasons(source: JsonMapping) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in source["reasons"].items())


def _language_table(before: JsonMapping, after: JsonMapping) -> str:
    def row(name: str, shown: str) -> list[str]:
        values = (before[name], after[name])
        return [shown, *("-" if v is None else _percent(v) if "dup" in name else f"{v:,}" for v in values)]

    names = {
        "texts_counted": "texts counted",
        "mean_words": "words a text",
        "vocabulary": "different words",
        "near_duplicates": "near duplicates (the same words as another)",
    }
    repeated = [[text[:_LONGEST], f"{count:,}"] for text, count in after["most_repeated"]]
    table = _table(["", "web", "kept"], [row(name, shown) for name, shown in names.items()])
    return table + (_table(["most repeated among the kept", "times"], repeated) if repeated else "")


def _histogram(source: str, bins: Sequence[int], threshold: float) -> str:
    if not any(bins):
        return ""
    highest, width = max(bins), 340 / BINS
    bars = "".join(
        f'<rect x="{20 + i * width:.1f}" y="{130 - 110 * n / highest:.1f}" width="{width - 1:.1f}" '
        f'height="{110 * n / highest:.1f}" fill="{_color((i + 0.5) / BINS >= threshold)}">'
        f"<title>{i / BINS:.2f} to {(i + 1) / BINS:.2f}: {n:,}</title></rect>"
        for i, n in enumerate(bins)
    )
    x = 20 + 340 * threshold
    return (
        f'<svg width="380" height="160" role="img" aria-label="{source}"><text x="20" y="14" font-size="13">'
        f'{source}: {sum(bins):,} texts</text>{bars}<path d="M20 130H360" stroke="#999"/>'
        f'<path d="M{x:.1f} 20V136" stroke="#222" stroke-dasharray="3"/><text x="20" y="148" font-size="12">0</text>'
        f'<text x="352" y="148" font-size="12">1</text></svg>'
    )


def _color(kept: bool) -> str:
    return "#2a7" if kept else "#c54"


def _figure(texts: Sequence[Line], images: Mapping[tuple[int, str], str]) -> str:
    said = "".join(
        f'<p class="{line["verdict"]}">{_MARKS[line["verdict"]]} {_shown(line["text"])} <small>{line["source"]}'
        f"{_score(line)}, {line['reason']}</small></p>"
        for line in texts
    )
    first = texts[0]
    image = images.get((first["unit"], first["key"]), "")
    return f"<figure>{image}<figcaption>{said}<small>{_text(first['key'])}</small></figcaption></figure>"


def _score(line: Line) -> str:
    return "" if line["itm"] is None else f", ITM {line['itm']:.2f}"


def _images(job: Job, wanted: set[tuple[int, str]]) -> dict[tuple[int, str], str]:
    """Small images, inside the page; what cannot be read any more is left out."""
    found: dict[tuple[int, str], str] = {}
    for unit in sorted({unit for unit, _ in wanted}):
        for index in range(*job.shards[unit]):
            try:
                key = job.dataset.key(index)
                if (unit, key) in wanted:
                    picture = job.dataset[index].image
                    image = decode(picture if isinstance(picture, bytes) else read_file(str(picture)))
                    found[unit, key] = _inline(image)
            except (ImageError, OSError):
                continue
    return found


def _inline(image: Image.Image) -> str:
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
