"""OUT/report.json for programs and OUT/report.html for people: what the filter kept and dropped, with examples."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from sightloop.capfilt.filtering import BELOW_THRESHOLD, TEXT_SOURCES
from sightloop.capfilt.records import ITM_BINS
from sightloop.capfilt.shard import Job
from sightloop.data.atomic import atomic_write
from sightloop.data.images.decode import decode, read_file
from sightloop.errors import ImageError
from sightloop.reports import html
from sightloop.reports.html import Html, Tile
from sightloop.reports.plots import Histogram, histogram, plots
from sightloop.types import JsonDict, JsonMapping

KEPT = ("matched", "ranked", "unjudged")
_MAX_TEXTS = 50_000  # of which lengths, words and repetitions are counted; totals count all
_SHARDS_SHOWN = 8  # from which example images are taken
_EXAMPLES = 8  # images of a kind
_IMAGE_SIDE = 250  # pixels of the longer side
_MAX_FAILURES = 200
_MAX_SHOWN = 500  # characters of a caption on the page
_MARKS = {"kept": "\u2713", "dropped": "\u2717"}
_COLORS = {"kept": "good", "dropped": "bad"}
_NOT_JUDGED = ("empty", "looping", "duplicate")
_SELECTIONS = {
    "close": "Close calls",
    "dropped": "Dropped with the lowest ITM probability",
    "kept": "Kept with the highest ITM probability",
    "any": "In the order of the dataset",
}


def write_report(job: Job, done: Mapping[int, JsonMapping], about: JsonMapping) -> JsonDict:
    """Writes both reports, also during a run.

    Args:
        job: The job.
        done: Manifest entries of the finished shards, by index.
        about: Content of job.json.

    Returns:
        Content of report.json.
    """
    entries = [done[index] for index in sorted(done)]
    lines = list(_sampled(job, [entry["unit"] for entry in entries]))
    facts = _facts(job, entries, lines, about)
    atomic_write(job.out / "report.json", json.dumps(facts, indent=1) + "\n")
    atomic_write(job.out / "report.html", _page(job, facts, _examples(lines, job.options.threshold)))
    return facts


def shares(texts: Mapping[str, int]) -> dict[str, JsonDict]:
    """Counts of texts by their source, "web" or "synthetic".

    Args:
        texts: Number of texts by source and reason ("web matched").

    Returns:
        For each source "total", "kept", "share" (kept / total), "noise_ratio" (share of the scored texts that the
        filter dropped, as in the paper), "reasons" (number of texts by reason).
    """
    result: dict[str, JsonDict] = {}
    for source in TEXT_SOURCES:
        reasons = {name.partition(" ")[2]: n for name, n in texts.items() if name.startswith(f"{source} ")}
        total, kept = sum(reasons.values()), sum(reasons.get(reason, 0) for reason in KEPT)
        judged = total - sum(reasons.get(reason, 0) for reason in (*_NOT_JUDGED, "unjudged", "ranked"))
        judged -= reasons.get("not in the top k", 0)
        result[source] = {
            "total": total,
            "kept": kept,
            "share": round(kept / total, 4) if total else None,
            "noise_ratio": round(sum(reasons.get(r, 0) for r in BELOW_THRESHOLD) / judged, 4)
            if judged
            else None,
            "reasons": reasons,
        }
    return result


def words(text: str) -> list[str]:
    """The words of a text, case folded."""
    return re.findall(r"\w+", text.casefold())


def _sampled(job: Job, units: Sequence[int]) -> Iterator[JsonDict]:
    """Evidence of texts, shard after shard, evenly spread over the finished ones, up to `_MAX_TEXTS`; adds "unit"."""
    step = max(1, len(units) // 64)
    count = 0
    for unit in [unit for first in range(step) for unit in units[first::step]]:
        with job.evidence_path(unit).open(encoding="utf-8") as file:
            for encoded in file:
                line = json.loads(encoded)
                if "text" in line:
                    yield line | {"unit": unit}
                    count += 1
        if count >= _MAX_TEXTS:
            return


def _facts(
    job: Job, entries: Sequence[JsonMapping], lines: Sequence[JsonDict], about: JsonMapping
) -> JsonDict:
    texts = Counter[str]()
    bins = {source: [0] * ITM_BINS for source in TEXT_SOURCES}
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
        "itm_histogram": {"bins": f"{ITM_BINS} of equal width from 0 to 1", **bins},
        "kept_at_threshold": {
            f"{first / ITM_BINS:.2f}": {
                source: round(sum(counts[first:]) / sum(counts), 4) if any(counts) else None
                for source, counts in bins.items()
            }
            for first in range(0, ITM_BINS, 2)
        },
        "before": _language([line for line in lines if line["source"] == "web"]),
        "after": _language([line for line in lines if line["verdict"] == "kept"]),
        "throughput": _throughput(job),
        "failures": failed[:_MAX_FAILURES],
    }


def _language(lines: Sequence[JsonDict]) -> JsonDict:
    """Lengths, vocabulary and repetitions of texts; near duplicates have the same words in any order or case."""
    lengths, vocabulary = Counter[int](), Counter[str]()
    by_words: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for line in lines:
        text_words = words(line["text"])
        lengths[len(text_words)] += 1
        vocabulary.update(text_words)
        by_words[tuple(sorted(set(text_words) - {"a", "an", "the"}))].append(line["text"])
    total = len(lines)
    repeated = sorted((texts for texts in by_words.values() if len(texts) > 1), key=len, reverse=True)
    return {
        "texts_counted": total,
        "mean_words": round(sum(n * count for n, count in lengths.items()) / total, 2) if total else None,
        "words_histogram": {str(n): lengths[n] for n in sorted(lengths)},
        "vocabulary": len(vocabulary),
        "near_duplicates": round(sum(map(len, repeated)) / total, 4) if total else None,
        "most_repeated": [[texts[0], len(texts)] for texts in repeated[:10]],
    }


def _throughput(job: Job) -> JsonDict:
    """Speed of all runs so far, from log.jsonl."""
    path = job.out / "log.jsonl"
    samples = seconds = 0.0
    for encoded in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(encoded)
            samples, seconds = samples + line["samples"], seconds + line["seconds"]
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill
    return {
        "images": int(samples),
        "seconds": round(seconds, 2),
        "images_per_second": round(samples / seconds, 3) if seconds else None,
    }


def _examples(lines: Iterable[JsonDict], threshold: float) -> dict[str, list[list[JsonDict]]]:
    """Images to show, each with the evidence of all its texts, by a key of `_SELECTIONS`."""
    by_image: dict[tuple[int, str], list[JsonDict]] = defaultdict(list)
    for line in lines:
        by_image[line["unit"], line["key"]].append(line)
    shards = list(dict.fromkeys(shard for shard, _ in by_image))[:_SHARDS_SHOWN]
    images = [texts for (shard, _), texts in by_image.items() if shard in shards]
    scored = [texts for texts in images if any(text["itm"] is not None for text in texts)]

    def lowest(texts: list[JsonDict]) -> float:
        return min(text["itm"] for text in texts if text["itm"] is not None)

    def distance(texts: list[JsonDict]) -> float:
        return min(abs(text["itm"] - threshold) for text in texts if text["itm"] is not None)

    if not scored:
        return {"any": images[: 2 * _EXAMPLES]}
    by_lowest = sorted(scored, key=lowest)
    return {
        "close": sorted(scored, key=distance)[:_EXAMPLES],
        "dropped": by_lowest[:_EXAMPLES],
        "kept": by_lowest[::-1][:_EXAMPLES],
        "any": scored[:_EXAMPLES],
    }


# The page.


def _page(job: Job, facts: JsonMapping, examples: Mapping[str, list[list[JsonDict]]]) -> str:
    counts, shards, about = facts["images"], facts["shards"], facts["about"]
    state = (
        ""
        if shards["done"] == shards["of"]
        else f"{shards['done']:,} of {shards['of']:,} shards done \u00b7 "
    )
    models = ", ".join(f"{role} {name}" for role, name in about["models"].items())
    options = job.options
    images = _images(job, {(t[0]["unit"], t[0]["key"]) for group in examples.values() for t in group})
    return html.page(
        f"CapFilt of {counts['samples']:,} images",
        f"{state}{models} \u00b7 mode {options.mode}, keep {options.keep}, threshold {options.threshold:g}",
        html.tiles(_tiles(facts)),
        *(html.warning(f"{note[:1].upper()}{note[1:]}.") for note in about["notes"]),
        html.section(
            "Texts kept",
            _shares_table(facts["texts"]),
            html.note(
                "Noise ratio: share of the scored texts that the filter drops. In the BLIP paper: 25 % of texts by "
                "nucleus sampling, 19 % of those by beam search (Li et al. 2022, table 2)."
            ),
        ),
        _scores_section(facts, options.threshold),
        *(
            html.section(_SELECTIONS[name], html.gallery([_figure(texts, images) for texts in group]))
            for name, group in examples.items()
        ),
        html.section(
            "Language of the texts before and after", _language_table(facts["before"], facts["after"])
        ),
        _failures(facts),
        html.details("Settings", html.preformatted(json.dumps(about, indent=1))),
    )


def _tiles(facts: JsonMapping) -> list[Tile]:
    counts, speed = facts["images"], facts["throughput"]
    share = counts["written"] / counts["samples"] if counts["samples"] else None
    tiles = [Tile("images in the new dataset", f"{counts['written']:,}", html.format_percent(share))]
    for source, texts in facts["texts"].items():
        if texts["total"]:
            kept = f"{texts['kept']:,} of {texts['total']:,}"
            tiles.append(Tile(f"{source} texts kept", html.format_percent(texts["share"]), kept))
    if counts["failed"]:
        tiles.append(Tile("images failed", f"{counts['failed']:,}", "named below"))
    if speed["images_per_second"]:
        tiles.append(Tile("images per second", html.format_number(speed["images_per_second"])))
    return tiles


def _scores_section(facts: JsonMapping, threshold: float) -> Html:
    """Histograms of ITM probabilities, and what other thresholds would keep."""
    bins, kept = facts["itm_histogram"], facts["kept_at_threshold"]
    drawn = [
        histogram(Histogram(f"{source} texts", "ITM probability", "texts", bins[source], threshold))
        for source in TEXT_SOURCES
        if any(bins[source])
    ]
    if not drawn:
        return Html("")
    rows = [
        [source, *(html.format_percent(share[source]) for share in kept.values())] for source in TEXT_SOURCES
    ]
    return html.section(
        "Scores of the filter",
        plots(drawn),
        html.note(
            "To set the threshold, look at the close calls below: lower it if dropped texts describe their images, "
            "raise it if kept texts do not."
        ),
        html.element("h3", "Share of the scored texts kept at other thresholds"),
        html.table(["texts", *kept], rows),
    )


def _shares_table(texts: JsonMapping) -> Html:
    rows = [
        [
            source,
            f"{counts['total']:,}",
            f"{counts['kept']:,}",
            html.format_percent(counts["share"]),
            html.format_percent(counts["noise_ratio"]),
            ", ".join(f"{number:,} {reason}" for reason, number in counts["reasons"].items()),
        ]
        for source, counts in texts.items()
    ]
    return html.table(["texts", "all", "kept", "share", "noise ratio", "reasons"], rows, text_columns=(0, 5))


def _language_table(before: JsonMapping, after: JsonMapping) -> Html:
    names = {
        "texts_counted": "texts counted",
        "mean_words": "words per text",
        "vocabulary": "different words",
        "near_duplicates": "near duplicates (same words as another text)",
    }

    def cell(name: str, value: float | None) -> str | None:
        return (
            html.format_percent(value)
            if name == "near_duplicates"
            else None
            if value is None
            else f"{value:,}"
        )

    rows = [[label, cell(name, before[name]), cell(name, after[name])] for name, label in names.items()]
    table = html.table(["", "web", "kept"], rows)
    repeated = [[_shorten(text), f"{count:,}"] for text, count in after["most_repeated"]]
    return html.join([table, html.table(["most repeated kept texts", "times"], repeated) if repeated else ""])


def _failures(facts: JsonMapping) -> Html:
    if not facts["failures"]:
        return Html("")
    table = html.table(["input", "key", "reason"], facts["failures"], text_columns=(0, 1, 2))
    hidden = facts["images"]["failed"] - len(facts["failures"])
    more = html.note(f"and {hidden:,} more, named in quarantine.jsonl") if hidden else ""
    return html.details(f"{facts['images']['failed']:,} images failed", table, more)


def _shorten(text: str) -> Html:
    """The beginning of a caption; right-to-left marks in it do not affect what follows."""
    return html.element("bdi", text[:_MAX_SHOWN] + "\u2026" * (len(text) > _MAX_SHOWN))


def _figure(texts: Sequence[JsonDict], images: Mapping[tuple[int, str], Html]) -> Html:
    """An image with all its texts: mark, text, source, score, reason."""
    lines = (
        html.element(
            "p",
            html.element(
                "span", _MARKS[line["verdict"]], " ", _shorten(line["text"]), class_=_COLORS[line["verdict"]]
            ),
            html.element("small", f" {line['source']}{_score(line)}, {line['reason']}"),
        )
        for line in texts
    )
    first = texts[0]
    image = images.get((first["unit"], first["key"]), Html(""))
    return html.figure(image, *lines, html.element("small", first["key"]))


def _score(line: JsonDict) -> str:
    return "" if line["itm"] is None else f", ITM {line['itm']:.2f}"


def _images(job: Job, chosen: set[tuple[int, str]]) -> dict[tuple[int, str], Html]:
    """Thumbnails of the (shard index, key) chosen; images that can no longer be read are left out."""
    images: dict[tuple[int, str], Html] = {}
    for shard in sorted({shard for shard, _ in chosen}):
        for index in range(*job.shards[shard]):
            try:
                key = job.dataset.key(index)
                if (shard, key) in chosen:
                    source = job.dataset[index].image
                    image = decode(source if isinstance(source, bytes) else read_file(str(source)))
                    images[shard, key] = html.inline_image(image, _IMAGE_SIDE)
            except (ImageError, OSError):
                continue
    return images
