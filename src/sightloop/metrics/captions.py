"""Caption metrics: BLEU, ROUGE-L and CIDEr, equal to those of the official COCO caption evaluation, without Java.

Every sample has one prediction (the hypothesis) and one or more references. All sentences become rows of n-gram counts
once (`_NGramCounts`); BLEU and CIDEr are then sums over (hypothesis, reference) pairs of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sightloop.errors import UsageError
from sightloop.metrics.align import KeyedPredictions, KeyedReferences, align
from sightloop.metrics.meteor_spice import meteor_spice_scores
from sightloop.metrics.ptb_tokenizer import ptb_tokenize
from sightloop.types import Floats, Integers

CaptionTokenizer: TypeAlias = Literal["ptb", "whitespace"]

_MAX_N = 4  # words in the longest n-gram, for BLEU and for CIDEr
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_SMALL, _TINY = 1e-9, 1e-15  # the official code's guards against division by zero
_CHUNK = 1 << 21  # reference n-grams processed together: bounds memory


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Scores of a corpus and of each of its N samples.

    Attributes:
        corpus: score of each metric over the corpus.
        per_sample: the same for every sample, float64 `[N]`, in the order of the predictions.
        bleu_counts: int64 `[N, 10]`, the counts that corpus BLEU sums over samples (see `bleu`). BLEU alone is not a
            mean over samples.
    """

    corpus: dict[str, float]
    per_sample: dict[str, Floats]
    bleu_counts: Integers


def caption_scores(
    predictions: KeyedPredictions,
    references: KeyedReferences,
    tokenizer: CaptionTokenizer = "ptb",
    jars: str | Path | None = None,
) -> dict[str, float]:
    """BLEU-1 ... BLEU-4, ROUGE-L, CIDEr and CIDEr-D of one prediction per sample against its references.

    * BLEU (Papineni et al. 2002), 0..1: over the corpus, closest reference length.
    * ROUGE-L (Lin 2004), 0..1: mean over samples, beta 1.2.
    * CIDEr, 0..10: mean over samples. As in the official COCO code it is the CIDEr-D of Vedantam et al. (2015):
      clipped counts, length penalty of sigma 6, document frequencies from these references. `CIDEr-D` is the same
      number (that of the authors' code in "corpus" mode). The paper's first CIDEr, without clipping and penalty, is in
      no COCO table and is not computed. With a single sample CIDEr is 0, as in the official code, because every
      n-gram is in all documents.
    * METEOR, SPICE: only where their official jars are installed; `meteor_spice_not_computed` gives the reason.

    Args:
        predictions: one text per sample, as a mapping or a sequence.
        references: one or more texts per sample, as a mapping with the same keys or a sequence of the same length.
        tokenizer: "ptb" as COCO (lower case, punctuation removed), or "whitespace" for texts that are tokens already.
        jars: folder of the METEOR and SPICE jars; default the environment variable SIGHTLOOP_CAPTION_JARS.

    Raises:
        UsageError: keys that differ, a sample without reference, a text that is no string, or no sample.
    """
    return score_captions(predictions, references, tokenizer, jars).corpus


def score_captions(
    predictions: KeyedPredictions,
    references: KeyedReferences,
    tokenizer: CaptionTokenizer = "ptb",
    jars: str | Path | None = None,
) -> CaptionScores:
    """`caption_scores` together with the scores of every sample and the counts for a bootstrap of BLEU."""
    _, hypotheses, reference_lists = align(predictions, references)
    # Equal texts are tokenized and counted once.
    texts = list(dict.fromkeys([*hypotheses, *(text for texts in reference_lists for text in texts)]))
    row_of = {text: row for row, text in enumerate(texts)}
    sentences = _tokenizer(tokenizer)(texts)
    pairs = _Pairs(
        np.array([row_of[text] for text in hypotheses]),
        np.array([row_of[text] for texts in reference_lists for text in texts]),
        np.cumsum([0, *map(len, reference_lists)]),
    )
    ngrams = _NGramCounts.of([sentence.split() for sentence in sentences])
    counts, frequency = _bleu_counts(ngrams, pairs)
    cider = _cider(ngrams, pairs, frequency)
    # The official ROUGE splits at single spaces: an empty prediction is one empty token there.
    rouge = _rouge([sentence.split(" ") for sentence in sentences], pairs)
    per_sample = {f"BLEU-{n + 1}": scores for n, scores in enumerate(bleu(counts).T)}
    corpus = {f"BLEU-{n + 1}": float(score) for n, score in enumerate(bleu(counts.sum(0)))}
    for name, scores in (("ROUGE-L", rouge), ("CIDEr", cider), ("CIDEr-D", cider)):
        per_sample[name] = scores
        corpus[name] = float(scores.mean())
    tokens_of = dict(zip(texts, sentences, strict=True))
    tokenized = (
        [tokens_of[text] for text in hypotheses],
        [[tokens_of[text] for text in texts] for texts in reference_lists],
    )
    for name, (score, scores) in meteor_spice_scores(*tokenized, jars).items():
        per_sample[name], corpus[name] = scores, score
    return CaptionScores(corpus, per_sample, counts)


def bleu(counts: ArrayLike) -> Floats:
    """BLEU-1 ... BLEU-4, `[..., 4]`, of n-gram counts.

    Sums of the samples' counts give corpus BLEU, the counts of one sample its own BLEU, as in the official code.

    Args:
        counts: `[..., 10]`: matched n-grams of n = 1 ... 4, n-grams of n = 1 ... 4, length, reference length.
    """
    values = np.asarray(counts, dtype=np.float64)
    precision = (values[..., :4] + _TINY) / (values[..., 4:8] + _SMALL)  # [..., 4]
    score = np.cumprod(precision, -1) ** (1 / np.arange(1, _MAX_N + 1))  # geometric means of the first n
    ratio = (values[..., 8:9] + _TINY) / (values[..., 9:] + _SMALL)  # [..., 1]
    with np.errstate(over="ignore"):
        return score * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)  # brevity penalty


def caption_statistics(predictions: Iterable[str], training: Iterable[str] = ()) -> dict[str, float]:
    """Statistics of captions without references; words are PTB tokens, as in `caption_scores`.

    Args:
        predictions: captions.
        training: captions of the training data.

    Returns:
        `length`: mean number of words. `vocabulary`: number of different words. `repetition`: share of captions in
        which some three consecutive words occur twice. `distinct`: share of different captions. `unseen`: share that is
        not among the training captions, only where those are given.

    Raises:
        UsageError: no caption.
    """
    captions = ptb_tokenize(predictions)
    if not captions:
        raise UsageError("predictions: there is none; give at least one caption")
    words = [caption.split() for caption in captions]
    trigrams = [list(zip(line, line[1:], line[2:], strict=False)) for line in words]
    statistics = {
        "length": sum(map(len, words)) / len(words),
        "vocabulary": float(len({word for line in words for word in line})),
        "repetition": sum(len(set(line)) < len(line) for line in trigrams) / len(words),
        "distinct": len(set(captions)) / len(captions),
    }
    if train_captions := set(ptb_tokenize(training)):
        statistics["unseen"] = sum(c not in train_captions for c in captions) / len(captions)
    return statistics


def _tokenizer(name: str) -> Callable[[list[str]], list[str]]:
    if name == "ptb":
        return ptb_tokenize
    if name == "whitespace":
        return list
    raise UsageError(f'tokenizer={name!r}: there are "ptb" and "whitespace"')


@dataclass(frozen=True, slots=True)
class _Pairs:
    """(hypothesis, reference) pairs of N samples, P in all; sentences are numbered as rows of `_NGramCounts`.

    Attributes:
        hypotheses: sentence of every sample, `[N]`.
        references: sentence of the reference of every pair, `[P]`, sample by sample.
        starts: first pair of every sample, `[N + 1]`; the last entry is P.
    """

    hypotheses: Integers
    references: Integers
    starts: Integers

    def __len__(self) -> int:
        return len(self.hypotheses)

    def chunks(self, sizes: Integers) -> Iterator[slice]:
        """Ranges of samples whose references have about _CHUNK n-grams together; sizes: n-grams per sentence, `[S]`."""
        before = np.concatenate([[0], np.cumsum(sizes[self.references])])[self.starts]  # [N + 1]
        low = 0
        while low < len(self):
            high = int(np.searchsorted(before, before[low] + _CHUNK, side="right")) - 1
            high = max(high, low + 1)
            yield slice(low, high)
            low = high

    def within(self, samples: slice) -> tuple[Integers, Integers]:
        """Pairs of a range of samples: reference sentences `[p]`, and their samples `[p]` counted from the first."""
        starts = self.starts[samples.start : samples.stop + 1]
        return self.references[starts[0] : starts[-1]], np.repeat(np.arange(len(starts) - 1), np.diff(starts))


@dataclass(frozen=True, slots=True)
class _NGramCounts:
    """Counts of n-grams of S sentences: a sparse matrix `[S, G]` over G different n-grams, row by row (CSR).

    The sentences "a dog a dog" and "a cat" have 9 n-grams, and the rows

        gram       0    1    2     3       4       5        6          7             8
                   a   dog  cat  a dog   a cat   dog a   a dog a   dog a dog   a dog a dog
        sentence 0 2    2          2               1        1          1             1
        sentence 1 1         1             1

    start  = [0, 7, 10]
    gram   = [0, 1, 3, 5, 6, 7, 8,  0, 2, 4]
    count  = [2, 2, 2, 1, 1, 1, 1,  1, 1, 1]
    order  = [0, 0, 0, 1, 1, 1, 2, 2, 3]
    length = [4, 2]

    Attributes:
        start: first entry of every row, `[S + 1]`; row s has the entries start[s] ... start[s + 1] - 1.
        gram: column of every entry, ascending within a row, `[E]`.
        count: value of every entry, `[E]`.
        order: n - 1 of every n-gram, `[G]`.
        length: words of every sentence, `[S]`.
    """

    start: Integers
    gram: Integers
    count: Integers
    order: Integers
    length: Integers

    @classmethod
    def of(cls, sentences: list[list[str]]) -> _NGramCounts:
        word_ids = {word: i for i, word in enumerate(dict.fromkeys(w for line in sentences for w in line))}
        # All sentences, one after the other, as word ids, [T]: 0 1 0 1 | 0 2
        words = np.array([word_ids[word] for line in sentences for word in line], np.int64)
        length = np.array([len(line) for line in sentences], np.int64)
        row = np.repeat(np.arange(len(sentences)), length)  # sentence of every word, [T]: 0 0 0 0 | 1 1
        left = np.repeat(np.cumsum(length), length) - np.arange(
            len(words)
        )  # words to its end, [T]: 4 3 2 1 | 2 1
        at = np.arange(len(words))  # where the n-grams start
        ids = np.zeros(len(words), np.int64)  # which n-gram starts there, numbered within its order
        total = 0  # different n-grams so far
        rows: list[Integers] = []
        grams: list[Integers] = []
        sizes: list[int] = []
        for n in range(_MAX_N):
            keep = left[at] > n
            at = at[keep]
            # An n-gram is its prefix and one word more: (id of the prefix) * W + (word), renumbered by np.unique.
            # "a dog", "dog a", "a dog", "a cat" = 0*3+1, 1*3+0, 0*3+1, 0*3+2 = 1 3 1 2 -> 0 2 0 1
            different, ids = np.unique(ids[keep] * len(word_ids) + words[at + n], return_inverse=True)
            rows.append(row[at])
            grams.append(ids + total)
            sizes.append(len(different))
            total += len(different)
        # Occurrences sorted by (row, gram) and counted: the entries, row by row.
        key = np.concatenate(rows) * total + np.concatenate(grams)
        key, count = np.unique(key, return_counts=True)
        entry_row = key // max(total, 1)
        start = np.searchsorted(entry_row, np.arange(len(sentences) + 1))
        return cls(start, key - entry_row * total, count, np.repeat(np.arange(_MAX_N), sizes), length)

    def entries(self, sentences: Integers) -> tuple[Integers, Integers]:
        """All entries of the rows `sentences` `[n]`, one row after the other.

        In the example of the class, `entries([1, 1])` is ([7, 8, 9, 7, 8, 9], [0, 0, 0, 1, 1, 1]).

        Returns:
            indices of the entries `[e]`, and for each the position in `sentences` `[e]`.
        """
        sizes = self.start[sentences + 1] - self.start[sentences]
        which = np.repeat(np.arange(len(sentences)), sizes)
        entry = np.arange(len(which)) + np.repeat(self.start[sentences] - np.cumsum(sizes) + sizes, sizes)
        return entry, which


def _sums_by_order(index: Integers, values: NDArray[np.generic], rows: int) -> Floats:
    """Values added up by row and order, `[rows, 4]`; index = row * 4 + order."""
    return np.bincount(index, values, rows * _MAX_N).astype(np.float64, copy=False).reshape(rows, _MAX_N)


def _bleu_counts(ngrams: _NGramCounts, pairs: _Pairs) -> tuple[Integers, Integers]:
    """BLEU's counts `[N, 10]`, and the number of samples in whose references every n-gram occurs `[G]`."""
    total, base = len(ngrams.order), int(ngrams.count.max(initial=0)) + 1
    matched: list[Floats] = []
    frequency = np.zeros(total, np.int64)
    for samples in pairs.chunks(np.diff(ngrams.start)):
        sentences, sample = pairs.within(samples)  # [p], [p]
        entry, which = ngrams.entries(sentences)
        # The highest count of an n-gram in a reference of the sample: (sample, gram, count) as one number, sorted; the
        # last number of each (sample, gram) is kept. With total and base 10, sample 5, gram 2 and count 1 is 521:
        #   521 523 | 531 | 602 602 -> 523 531 602 -> key 52 53 60, highest 3 1 2
        run = np.sort((sample[which] * total + ngrams.gram[entry]) * base + ngrams.count[entry])
        run = run[np.append(run[1:] // base != run[:-1] // base, True)[: len(run)]]
        key, highest = run // base, run % base
        frequency += np.bincount(key % max(total, 1), minlength=total)
        # Each n-gram of a hypothesis counts at most as often as in the reference that has it most often.
        entry, which = ngrams.entries(pairs.hypotheses[samples])
        query = which * total + ngrams.gram[entry]
        index = np.minimum(np.searchsorted(key, query), max(len(key) - 1, 0))
        clipped = np.zeros(len(entry))
        if len(key):
            clipped = np.where(key[index] == query, np.minimum(highest[index], ngrams.count[entry]), 0)
        rows = samples.stop - samples.start
        matched.append(_sums_by_order(which * _MAX_N + ngrams.order[ngrams.gram[entry]], clipped, rows))
    length = ngrams.length[pairs.hypotheses]  # [N]
    guessed = np.maximum(length[:, None] - np.arange(_MAX_N), 0)  # n-grams of the hypotheses, [N, 4]
    # The closest reference length; of two equally close ones the shorter: the least (distance, length) as one number.
    reference_length = ngrams.length[pairs.references]  # [P]
    base = int(ngrams.length.max(initial=0)) + 1
    distance = np.abs(reference_length - np.repeat(length, np.diff(pairs.starts))) * base + reference_length
    closest = np.minimum.reduceat(distance, pairs.starts[:-1]) % base  # [N]
    counts = np.column_stack([np.concatenate(matched).astype(np.int64), guessed, length, closest])
    return counts, frequency


def _cider(ngrams: _NGramCounts, pairs: _Pairs, frequency: Integers) -> Floats:
    """CIDEr of every sample, `[N]`; frequency: document frequency of every n-gram `[G]`.

    Mean over references and orders of the clipped cosine of tf-idf vectors, times a Gaussian of the lengths.
    """
    total, rows = len(ngrams.order), len(ngrams.length)
    idf = np.log(len(pairs)) - np.log(np.maximum(frequency, 1))  # [G]
    tfidf = ngrams.count * idf[ngrams.gram]  # [E]
    row = np.repeat(np.arange(rows), np.diff(ngrams.start))  # sentence of every entry, [E]
    keys = row * total + ngrams.gram  # (sentence, gram) as one number, ascending
    norm = np.sqrt(_sums_by_order(row * _MAX_N + ngrams.order[ngrams.gram], tfidf * tfidf, rows))  # [S, 4]
    # The official code measures length in pairs of words.
    length = np.maximum(ngrams.length - 1, 0)
    scores = np.zeros(len(pairs))
    for samples in pairs.chunks(np.diff(ngrams.start)):
        reference, sample = pairs.within(samples)  # [p], [p]
        hypothesis = pairs.hypotheses[samples][sample]  # [p]
        # For every n-gram of a reference, the same n-gram in the hypothesis.
        entry, which = ngrams.entries(reference)
        query = hypothesis[which] * total + ngrams.gram[entry]
        index = np.minimum(np.searchsorted(keys, query), max(len(keys) - 1, 0))
        hit = keys[index] == query if len(keys) else np.zeros(0, bool)
        entry, which, index = entry[hit], which[hit], index[hit]
        product = np.minimum(tfidf[index], tfidf[entry]) * tfidf[entry]
        dot = _sums_by_order(
            which * _MAX_N + ngrams.order[ngrams.gram[entry]], product, len(reference)
        )  # [p, 4]
        norms = norm[hypothesis] * norm[reference]
        cosine = np.divide(dot, norms, out=np.zeros_like(dot), where=norms != 0)
        penalty = np.exp(-((length[hypothesis] - length[reference]) ** 2) / (2 * _CIDER_SIGMA**2))  # [p]
        scores[samples] = np.bincount(sample, cosine.mean(1) * penalty, samples.stop - samples.start)
    return 10 * scores / np.diff(pairs.starts)


def _rouge(sentences: list[list[str]], pairs: _Pairs) -> Floats:
    """ROUGE-L of every sample, `[N]`: F-measure (beta 1.2) of the best precision and best recall of its references."""
    best = np.zeros((2, len(pairs)))
    starts, references = pairs.starts.tolist(), pairs.references.tolist()
    for sample, hypothesis in enumerate(pairs.hypotheses.tolist()):
        tokens = sentences[hypothesis]
        bits_of: dict[str, int] = {}
        for i, token in enumerate(tokens):
            bits_of[token] = bits_of.get(token, 0) | 1 << i
        precision = recall = 0.0
        for reference in references[starts[sample] : starts[sample + 1]]:
            common = _common_length(bits_of, len(tokens), sentences[reference])
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(sentences[reference]))
        best[:, sample] = precision, recall
    precision, recall = best
    denominator = recall + _ROUGE_BETA**2 * precision
    return (1 + _ROUGE_BETA**2) * precision * recall / np.where(denominator > 0, denominator, 1)


def _common_length(bits_of: dict[str, int], length: int, tokens: list[str]) -> int:
    """Length of the longest common subsequence of a hypothesis and `tokens`, bit-parallel (Hyyrö 2004).

    A whole row of the dynamic program is one integer: bit i is 0 where the subsequence grows at token i of the
    hypothesis. "a b c b" (lowest bit: its first token) against "b c":

        bits_of  a 0001, b 1010, c 0100
        start    1111
        b        hits 1111 & 1010 = 1010, row (1111 + 1010 | 1111 - 1010) & 1111 = 1101
        c        hits 1101 & 0100 = 0100, row (1101 + 0100 | 1101 - 0100) & 1111 = 1001
        zeros    0110: two tokens, "b c"

    Args:
        bits_of: for each token of the hypothesis the bits of its positions.
        length: tokens of the hypothesis.
        tokens: the reference.
    """
    ones = (1 << length) - 1
    row = ones
    for token in tokens:
        if token in bits_of:
            hits = row & bits_of[token]
            row = (row + hits | row - hits) & ones
    return (ones ^ row).bit_count()
