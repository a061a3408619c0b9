"""LongBench's metrics, to the digit, quirks included.

Each function takes one prediction and one accepted answer and returns a number in [0, 1]. What looks odd here is what
the official scorer does (https://github.com/THUDM/LongBench, MIT licence, ``metrics.py`` and ``eval.py``; paper: arXiv
2308.14508), and a published score can only be compared with one made the same way. The tests hold every metric against
the official scorer's output on real and on adversarial predictions.

Nothing heavy is imported until a metric needs it: jieba (Chinese) takes a second to start.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from .longbench_spec import SPECS, DatasetSpec

CODE_SIMS = ("official", "levenshtein")
"""How code similarity is computed: see :func:`code_sim`."""

_ASCII_PUNCTUATION = frozenset(string.punctuation)
_ALL_PUNCTUATION = _ASCII_PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)

_NUMBER = r"\d+"
_ANSWER_PATTERN = {"retrieval": rf"Paragraph ({_NUMBER})", "retrieval_zh": rf"段落({_NUMBER})"}


def postprocess(spec: DatasetSpec, prediction: str) -> str:
    """The part of a prediction that is scored: all of it, or its first line after leading newlines."""
    return prediction.lstrip("\n").split("\n")[0] if spec.first_line else prediction


def example_score(
    dataset: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None, code_sim: str = "official"
) -> float:
    """Score of one prediction: the best over the accepted answers.

    Args:
        dataset: official name.
        prediction: the model's text, without the prompt.
        answers: accepted answers.
        all_classes: class names, for the classification sets (trec, lsht); not looked at otherwise.
        code_sim: one of :data:`CODE_SIMS`.

    Returns:
        In [0, 1].
    """
    spec = SPECS[dataset]
    metric = _METRICS[spec.metric]
    options: dict[str, Any] = {}
    if spec.metric == "classification":
        options["all_classes"] = all_classes
    elif spec.metric == "code_sim":
        options["variant"] = code_sim
    text = postprocess(spec, prediction)
    return max((float(metric(text, answer, **options)) for answer in answers), default=0.0)


def dataset_score(scores: Sequence[float]) -> float:
    """``round(100 x mean, 2)``, in the official order of operations.

    The sum is a plain running sum, because a mean may be on a rounding edge and Python's ``sum`` compensates rounding
    errors from 3.12 on.
    """
    total = 0.0
    for score in scores:
        total += score
    return round(100 * total / len(scores), 2)


def bucket_score(scores: Sequence[float]) -> float | None:
    """LongBench-E's figure for one length bucket, None for an empty one (NaN in the official code, and not JSON).

    numpy's mean and numpy's rounding, as the official code has them: both differ from Python's in the last digit.
    """
    import numpy as np

    return float(round(100 * np.mean(scores), 2)) if scores else None


def unscorable(spec: DatasetSpec, answers: Any, all_classes: Any) -> str | None:
    """Why a row cannot be scored with the data set's metric, or None. Found when a file is read, not hours later."""
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return "`answers` must be a list of at least one string"
    names = all_classes if isinstance(all_classes, list) else []
    if spec.metric == "classification" and not (names and all(isinstance(name, str) for name in names)):
        return f"`all_classes` must list the class names of {spec.name}"
    pattern = _ANSWER_PATTERN.get(spec.metric)
    if pattern and not all(re.search(pattern, answer) for answer in answers):
        return f"each of `answers` must look like {pattern.replace(f'({_NUMBER})', '7')}"
    return None


# --- question answering -----------------------------------------------------------------------------------------------


def qa_f1(prediction: str, answer: str) -> float:
    """Token F1 after SQuAD's normalisation: lower case, no ASCII punctuation, no articles."""
    return _f1(normalize_answer(prediction).split(), normalize_answer(answer).split())


def qa_f1_zh(prediction: str, answer: str) -> float:
    """Token F1 over jieba's words, each stripped of punctuation and blanks; empty words are dropped."""
    return _f1(_words_zh(prediction), _words_zh(answer))


def normalize_answer(text: str) -> str:
    """The text as SQuAD's scorer compares it: lower case, no ASCII punctuation, no articles; blanks stay."""
    kept = "".join(char for char in text.lower() if char not in _ASCII_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", kept)


def _words_zh(text: str) -> list[str]:
    words = ("".join(char for char in word.lower() if char not in _ALL_PUNCTUATION) for word in _jieba().cut(text))
    return [word for word in ("".join(word.split()) for word in words) if word]


def _f1(prediction: list[str], answer: list[str]) -> float:
    same = sum((Counter(prediction) & Counter(answer)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return (2 * precision * recall) / (precision + recall)


@functools.cache
def _jieba() -> Any:
    """jieba, without its start-up log and without the import warnings of its old packaging code."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba
    jieba.setLogLevel(logging.WARNING)
    return jieba


# --- summaries --------------------------------------------------------------------------------------------------------

# The official scorer calls the package `rouge`, whose traceback through the LCS table is recursive, and turns any
# exception into a score of 0. So a pair of sentences whose traceback takes more steps than Python's recursion limit
# allows scores 0; a Chinese summary holds no ".", is therefore one sentence, and can get there. How many steps fit
# depends on how deep the caller stands in the stack. These are the numbers for the official `eval.py` (Python 3.11 to
# 3.13, the standard limit of 1000; one step fewer before), fixed here so that a score depends on the texts alone.
_MAX_STEPS = 990
_MAX_STEPS_ZH = 989  # one more function lies between: rouge_zh_score -> rouge_score


def rouge(prediction: str, answer: str) -> float:
    """F-measure of ROUGE-L as the package ``rouge`` 1.0.1 computes it: see :func:`rouge_l`."""
    return rouge_l(prediction, answer, _MAX_STEPS)


def rouge_zh(prediction: str, answer: str) -> float:
    """:func:`rouge` over jieba's words."""
    cut = _jieba().cut
    return rouge_l(" ".join(cut(prediction)), " ".join(cut(answer)), _MAX_STEPS_ZH)


def rouge_l(prediction: str, answer: str, max_steps: int) -> float:
    """Summary-level ROUGE-L F1 with the exact result of ``rouge.Rouge().get_scores(..., avg=True)["rouge-l"]["f"]``.

    Not the ROUGE-L of ``rouge_score``: sentences end at ".", words are counted once (sets), and the longest common
    subsequences of all pairs of sentences are united. The package fills its table in pure Python (minutes for a set
    of long summaries); here a row of the table is one integer, see :func:`_lcs_words`. Tests compare the two.

    Args:
        prediction, answer: words separated by blanks.
        max_steps: the longest traceback that does not overflow the package's recursion; beyond it the score is 0.

    Returns:
        In [0, 1). 0 where the package raises: a text with nothing but dots, or a traceback that is too long.
    """
    hypothesis, reference = _sentences(prediction), _sentences(answer)
    if not hypothesis or not reference:
        return 0.0
    union: set[str] = set()
    for ref_words in reference:
        for hyp_words in hypothesis:
            common = _lcs_words(ref_words, hyp_words, max_steps)
            if common is None:
                return 0.0
            union |= common
    recall = len(union) / len(set().union(*reference))
    precision = len(union) / len(set().union(*hypothesis))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence. A sentence of blanks is ``[""]``, one empty word: the package counts it."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _lcs_words(x: list[str], y: list[str], max_steps: int) -> set[str] | None:
    """Words of one longest common subsequence, the one that the package ``rouge`` finds; None if it would overflow.

    Row ``i`` of the LCS table is kept as an integer whose bit ``j`` is 0 where ``table[i][j+1] = table[i][j] + 1``
    (bit-parallel LCS: Hyyro, "Bit-parallel LCS-length computation revisited", 2004). Of the many longest common
    subsequences the package takes the one found by stepping back from the corner, diagonally on a match, else up if
    ``table[i-1][j] > table[i][j-1]``, else left. Without a match ``table[i][j]`` is the larger of the two, so "up" is
    the same as ``table[i][j] > table[i][j-1]``: bit ``j-1`` of row ``i`` is 0.
    """
    positions: dict[str, int] = {}
    for j, word in enumerate(y):
        positions[word] = positions.get(word, 0) | 1 << j
    full = (1 << len(y)) - 1
    row = full
    rows = [row]
    for word in x:
        match = row & positions.get(word, 0)
        row = ((row + match) | (row - match)) & full
        rows.append(row)

    words: set[str] = set()
    i, j, steps = len(x), len(y), 0
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif rows[i] >> (j - 1) & 1:
            j -= 1
        else:
            i -= 1
        steps += 1
        if steps > max_steps:
            return None
    return words


# --- few-shot, synthetic, code ----------------------------------------------------------------------------------------


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """1 / (class names found in the prediction) if the right one is among them.

    A name that is part of the right one ("Other" in "Other entity") is taken off the list again. The official loop
    removes from the list that it walks through, so the name after a removed one is never looked at; kept, because it
    changes scores.
    """
    found = [name for name in all_classes if name in prediction]
    for name in found:
        if name in answer and name != answer:
            found.remove(name)
    return 1.0 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the right one."""
    return _share_of_numbers(prediction, str(answer))


def retrieval(prediction: str, answer: str) -> float:
    """As :func:`count`; the right number is the one in the answer's "Paragraph 7"."""
    return _share_of_numbers(prediction, re.findall(_ANSWER_PATTERN["retrieval"], answer)[0])


def retrieval_zh(prediction: str, answer: str) -> float:
    """As :func:`count`; the right number is the one in the answer's "段落7"."""
    return _share_of_numbers(prediction, re.findall(_ANSWER_PATTERN["retrieval_zh"], answer)[0])


def _share_of_numbers(prediction: str, right: str) -> float:
    numbers = re.findall(_NUMBER, prediction)
    return numbers.count(right) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, answer: str, variant: str = "official") -> float:
    """Edit similarity between the answer and the first predicted line that is neither comment nor code fence.

    The official code calls ``fuzzywuzzy.fuzz.ratio``, which gives other figures once python-Levenshtein happens to be
    installed (61.0 instead of 58.7 on lcc): ``official`` is the plain package (difflib), ``levenshtein`` the other.
    Both are whole percents. A line of blanks counts as the first line.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if "`" not in line and "#" not in line and "//" not in line), "")
    if variant == "levenshtein":
        from rapidfuzz import fuzz

        percent = round(fuzz.ratio(line, answer))
    elif line == answer:
        percent = 100
    elif not line or not answer:
        percent = 0
    else:
        percent = round(100 * SequenceMatcher(None, line, answer).ratio())
    return percent / 100


_METRICS: dict[str, Callable[..., float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "code_sim": code_sim,
}
