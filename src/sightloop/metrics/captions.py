"""Caption scores, equal to those of the official COCO caption evaluation, without its Java and its waiting.

Every sample has one prediction and one or more references. All sentences become rows of n-gram counts once
(`_Grams`); BLEU, ROUGE-L and CIDEr are then sums over (prediction, reference) pairs of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sightloop.errors import UsageError
from sightloop.metrics.align import KeyedPredictions, KeyedReferences, align
from sightloop.metrics.meteor_spice import meteor_spice_scores
from sightloop.metrics.ptb_tokenizer import tokenize
from sightloop.types import Floats, Integers

TokenizerName: TypeAlias = Literal["ptb", "whitespace"]

_ORDERS = 4  # words in the longest n-gram, for BLEU and for CIDEr
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_SMALL, _TINY = 1e-9, 1e-15  # the official code's guards against division by zero
_CHUNK = 1 << 21  # reference n-grams looked at together: bounds memory


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """corpus: the number of each measure. each: the same for every sample, float64 [N], in the predictions' order.

    bleu_counts: int64 [N, 10], what corpus BLEU sums over samples (see `bleu`); BLEU alone is no mean of its samples.
    """

    corpus: dict[str, float]
    each: dict[str, Floats]
    bleu_counts: Integers


def caption_scores(
    predictions: KeyedPredictions,
    references: KeyedReferences,
    tokenizer: TokenizerName = "ptb",
    jars: str | Path | None = None,
) -> dict[str, float]:
    """BLEU-1 ... BLEU-4, ROUGE-L, CIDEr and CIDEr-D of one prediction a sample against its references.

    predictions, references: two mappings with the same keys, or two sequences of the same length. tokenizer: "ptb"
    as COCO does it (lower case, punctuation removed), or "whitespace" for texts that are tokens already.

    BLEU (Papineni et al. 2002) is that of the corpus with the closest reference length, 0..1; ROUGE-L (Lin 2004) has
    beta 1.2, 0..1. `CIDEr` is what the official COCO code calls so, 0..10: the CIDEr-D of Vedantam et al. (2015), with
    clipped counts, a length penalty of sigma 6 and document frequencies from these references. `CIDEr-D` is therefore
    the same number (ciderD of the authors' own code, "corpus" mode); the paper's first CIDEr, with neither clipping nor
    penalty, is not what anyone's COCO table reports and is not computed. With one sample every document frequency is
    all, and CIDEr is 0, as officially.

    METEOR and SPICE are there only where their official jars are: in the folder `jars`, or in the one that the
    environment's SIGHTLOOP_CAPTION_JARS names; `not_computed` says why they are not.

    Raises UsageError where keys differ, a sample has no reference, a text is no string, or there is no sample.
    """
    return score_captions(predictions, references, tokenizer, jars).corpus


def score_captions(
    predictions: KeyedPredictions,
    references: KeyedReferences,
    tokenizer: TokenizerName = "ptb",
    jars: str | Path | None = None,
) -> CaptionScores:
    """`caption_scores`, with the scores of every sample and what a bootstrap of BLEU needs."""
    _, written, gold = align(predictions, references)
    texts = list(dict.fromkeys([*written, *(text for texts in gold for text in texts)]))
    place = {text: index for index, text in enumerate(texts)}
    sentences = _tokenizer(tokenizer)(texts)
    pairs = _Pairs(
        np.array([place[text] for text in written]),
        np.array([place[text] for texts in gold for text in texts]),
        np.cumsum([0, *map(len, gold)]),
    )
    grams = _Grams.of([sentence.split() for sentence in sentences])
    counts, frequency = _bleu_counts(grams, pairs)
    cider = _cider(grams, pairs, frequency)
    # The official ROUGE splits at single spaces: an empty prediction is one empty token there.
    rouge = _rouge([sentence.split(" ") for sentence in sentences], pairs)
    each = {f"BLEU-{n + 1}": scores for n, scores in enumerate(bleu(counts).T)}
    corpus = {f"BLEU-{n + 1}": float(score) for n, score in enumerate(bleu(counts.sum(0)))}
    for name, scores in (("ROUGE-L", rouge), ("CIDEr", cider), ("CIDEr-D", cider)):
        each[name] = scores
        corpus[name] = float(scores.mean())
    token_of = dict(zip(texts, sentences, strict=True))
    tokens = [token_of[text] for text in written], [[token_of[text] for text in texts] for texts in gold]
    for name, (score, scores) in meteor_spice_scores(*tokens, jars).items():
        each[name], corpus[name] = scores, score
    return CaptionScores(corpus, each, counts)


def bleu(counts: NDArray[np.generic]) -> Floats:
    """BLEU-1 ... BLEU-4 [..., 4] from counts [..., 10]: 4 of matched n-grams, 4 of n-grams, length, reference length.

    Sums of samples' counts give corpus BLEU, one sample's its own, as the official code computes both.
    """
    values = np.asarray(counts, dtype=np.float64)
    precision = (values[..., :4] + _TINY) / (values[..., 4:8] + _SMALL)
    score = np.cumprod(precision, -1) ** (1 / np.arange(1, _ORDERS + 1))
    ratio = (values[..., 8:9] + _TINY) / (values[..., 9:] + _SMALL)
    with np.errstate(over="ignore"):
        return score * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)


def caption_facts(predictions: Iterable[str], training: Iterable[str] = ()) -> dict[str, float]:
    """What the captions are like, whatever they should say; words as `caption_scores` sees them.

    `length`: mean number of words; `vocabulary`: different words; `repetition`: share of captions in which some three
    words in a row occur twice; `distinct`: share of different captions; `unseen`: share that is not among the
    training captions (only where those are given).
    """
    captions = tokenize(predictions)
    if not captions:
        raise UsageError("predictions: there is none; give at least one caption")
    words = [caption.split() for caption in captions]
    triples = [list(zip(line, line[1:], line[2:], strict=False)) for line in words]
    facts = {
        "length": sum(map(len, words)) / len(words),
        "vocabulary": float(len({word for line in words for word in line})),
        "repetition": sum(len(set(line)) < len(line) for line in triples) / len(words),
        "distinct": len(set(captions)) / len(captions),
    }
    seen = set(tokenize(training))
    return facts | ({"unseen": sum(c not in seen for c in captions) / len(captions)} if seen else {})


def _tokenizer(name: str) -> Callable[[list[str]], list[str]]:
    if name == "ptb":
        return tokenize
    if name == "whitespace":
        return list
    raise UsageError(f'tokenizer={name!r}: there are "ptb" and "whitespace"')


@dataclass(frozen=True, slots=True)
class _Pairs:
    """hypotheses: sentence of every sample [N]; references: sentence of every pair [P]; starts: first pair [N + 1]."""

    hypotheses: Integers
    references: Integers
    starts: Integers

    def __len__(self) -> int:
        return len(self.hypotheses)

    def chunks(self, sizes: Integers) -> Iterator[slice]:
        """Ranges of samples whose references have about _CHUNK n-grams together; sizes: n-grams of a sentence."""
        before = np.concatenate([[0], np.cumsum(sizes[self.references])])[self.starts]
        low = 0
        while low < len(self):
            high = int(np.searchsorted(before, before[low] + _CHUNK, side="right")) - 1
            high = max(high, low + 1)
            yield slice(low, high)
            low = high

    def within(self, samples: slice) -> tuple[Integers, Integers]:
        """(sentence, sample counted from the range's first) of the pairs of a range of samples."""
        starts = self.starts[samples.start : samples.stop + 1]
        return self.references[starts[0] : starts[-1]], np.repeat(np.arange(len(starts) - 1), np.diff(starts))


@dataclass(frozen=True, slots=True)
class _Grams:
    """Counts of n-grams, a sparse matrix [sentences, n-grams]: row s holds gram[start[s]:start[s + 1]], ascending.

    order: 0 for words ... 3 for fours, of every n-gram. lengths: words of every sentence.
    """

    start: Integers
    gram: Integers
    count: Integers
    order: Integers
    lengths: Integers

    @classmethod
    def of(cls, sentences: list[list[str]]) -> _Grams:
        words = {word: i for i, word in enumerate(dict.fromkeys(w for line in sentences for w in line))}
        flat = np.array([words[word] for line in sentences for word in line], np.int64)
        lengths = np.array([len(line) for line in sentences], np.int64)
        row = np.repeat(np.arange(len(sentences)), lengths)
        left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(flat))  # words from here to the end
        at, ids, total = np.arange(len(flat)), np.zeros(len(flat), np.int64), 0
        rows: list[Integers] = []
        grams: list[Integers] = []
        sizes: list[int] = []
        for n in range(_ORDERS):
            keep = left[at] > n
            at = at[keep]
            # An n-gram is the n-gram one shorter and one word more.
            found, ids = np.unique(ids[keep] * len(words) + flat[at + n], return_inverse=True)
            rows.append(row[at])
            grams.append(ids + total)
            sizes.append(len(found))
            total += len(found)
        key = np.concatenate(rows) * total + np.concatenate(grams)
        key, count = np.unique(key, return_counts=True)
        owner = key // max(total, 1)
        start = np.searchsorted(owner, np.arange(len(sentences) + 1))
        return cls(start, key - owner * total, count, np.repeat(np.arange(_ORDERS), sizes), lengths)

    def rows(self, sentences: Integers) -> tuple[Integers, Integers]:
        """(entry, which of the sentences) for all entries of these rows, one row after the other."""
        sizes = self.start[sentences + 1] - self.start[sentences]
        which = np.repeat(np.arange(len(sentences)), sizes)
        entry = np.arange(len(which)) + np.repeat(self.start[sentences] - np.cumsum(sizes) + sizes, sizes)
        return entry, which


def _sums(index: Integers, values: NDArray[np.generic], rows: int) -> Floats:
    """Values added up by row and order, [rows, 4]; index = row * 4 + order."""
    return np.bincount(index, values, rows * _ORDERS).astype(np.float64, copy=False).reshape(rows, _ORDERS)


def _bleu_counts(grams: _Grams, pairs: _Pairs) -> tuple[Integers, Integers]:
    """(BLEU's counts [N, 10], in how many samples' references every n-gram occurs)."""
    total, most = len(grams.order), int(grams.count.max(initial=0)) + 1
    matched: list[Floats] = []
    frequency = np.zeros(total, np.int64)
    for samples in pairs.chunks(np.diff(grams.start)):
        sentences, sample = pairs.within(samples)
        entry, which = grams.rows(sentences)
        # The greatest count of an n-gram among a sample's references is the last of its sorted run.
        run = np.sort((sample[which] * total + grams.gram[entry]) * most + grams.count[entry])
        run = run[np.append(run[1:] // most != run[:-1] // most, True)[: len(run)]]
        key, greatest = run // most, run % most
        frequency += np.bincount(key % max(total, 1), minlength=total)
        entry, which = grams.rows(pairs.hypotheses[samples])
        wanted = which * total + grams.gram[entry]
        found = np.minimum(np.searchsorted(key, wanted), max(len(key) - 1, 0))
        clipped = np.zeros(len(entry))
        if len(key):
            clipped = np.where(key[found] == wanted, np.minimum(greatest[found], grams.count[entry]), 0)
        rows = samples.stop - samples.start
        matched.append(_sums(which * _ORDERS + grams.order[grams.gram[entry]], clipped, rows))
    length = grams.lengths[pairs.hypotheses]
    guessed = np.maximum(length[:, None] - np.arange(_ORDERS), 0)
    # The closest reference length; of two equally close ones the shorter.
    others = grams.lengths[pairs.references]
    size = int(grams.lengths.max(initial=0)) + 1
    distance = np.abs(others - np.repeat(length, np.diff(pairs.starts))) * size + others
    closest = np.minimum.reduceat(distance, pairs.starts[:-1]) % size
    counts = np.column_stack([np.concatenate(matched).astype(np.int64), guessed, length, closest])
    return counts, frequency


def _cider(grams: _Grams, pairs: _Pairs, frequency: Integers) -> Floats:
    """CIDEr of every sample, [N]."""
    total, rows = len(grams.order), len(grams.lengths)
    weight = np.log(len(pairs)) - np.log(np.maximum(frequency, 1))
    value = grams.count * weight[grams.gram]
    row = np.repeat(np.arange(rows), np.diff(grams.start))
    keys = row * total + grams.gram
    norm = np.sqrt(_sums(row * _ORDERS + grams.order[grams.gram], value * value, rows))
    # The official code measures length in pairs of words.
    length = np.maximum(grams.lengths - 1, 0)
    scores = np.zeros(len(pairs))
    for samples in pairs.chunks(np.diff(grams.start)):
        reference, sample = pairs.within(samples)
        hypothesis = pairs.hypotheses[samples][sample]
        entry, which = grams.rows(reference)
        wanted = hypothesis[which] * total + grams.gram[entry]
        found = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        hit = keys[found] == wanted if len(keys) else np.zeros(0, bool)
        entry, which, found = entry[hit], which[hit], found[hit]
        product = np.minimum(value[found], value[entry]) * value[entry]
        dot = _sums(which * _ORDERS + grams.order[grams.gram[entry]], product, len(reference))
        lengths = norm[hypothesis] * norm[reference]
        cosine = np.divide(dot, lengths, out=np.zeros_like(dot), where=lengths != 0)
        penalty = np.exp(-((length[hypothesis] - length[reference]) ** 2) / (2 * _CIDER_SIGMA**2))
        scores[samples] = np.bincount(sample, cosine.mean(1) * penalty, samples.stop - samples.start)
    return 10 * scores / np.diff(pairs.starts)


def _rouge(sentences: list[list[str]], pairs: _Pairs) -> Floats:
    """ROUGE-L of every sample, [N]: best precision and best recall over the references, beta 1.2."""
    best = np.zeros((2, len(pairs)))
    starts, references = pairs.starts.tolist(), pairs.references.tolist()
    for sample, hypothesis in enumerate(pairs.hypotheses.tolist()):
        tokens = sentences[hypothesis]
        places: dict[str, int] = {}
        for i, token in enumerate(tokens):
            places[token] = places.get(token, 0) | 1 << i
        precision = recall = 0.0
        for reference in references[starts[sample] : starts[sample + 1]]:
            other = sentences[reference]
            common = _common(places, (1 << len(tokens)) - 1, other)
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(other))
        best[:, sample] = precision, recall
    precision, recall = best
    below = recall + _ROUGE_BETA**2 * precision
    return (1 + _ROUGE_BETA**2) * precision * recall / np.where(below > 0, below, 1)


def _common(places: dict[str, int], ones: int, tokens: list[str]) -> int:
    """Length of the longest common subsequence, a whole row of its table in the bits of one number (Hyyrö 2004).

    places: the bits at which the other sentence has a token; ones: a bit for each of its tokens.
    """
    row = ones
    for token in tokens:
        if token in places:
            hits = row & places[token]
            row = (row + hits | row - hits) & ones
    return (ones ^ row).bit_count()
