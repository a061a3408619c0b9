"""LongBench's data sets: the paper's order, the short names that its tables (and SnapKV's) use, and their families."""

from __future__ import annotations

FAMILIES = {
    "Single-doc. QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "Multi-doc. QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "Summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "Few-shot": ("trec", "triviaqa", "samsum", "lsht"),
    "Synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "Code": ("lcc", "repobench-p"),
}
NAMES = {
    "narrativeqa": "NrtvQA",
    "qasper": "Qasper",
    "multifieldqa_en": "MF-en",
    "multifieldqa_zh": "MF-zh",
    "hotpotqa": "HotpotQA",
    "2wikimqa": "2WikiMQA",
    "musique": "Musique",
    "dureader": "DuReader",
    "gov_report": "GovReport",
    "qmsum": "QMSum",
    "multi_news": "MultiNews",
    "vcsum": "VCSUM",
    "trec": "TREC",
    "triviaqa": "TriviaQA",
    "samsum": "SAMSum",
    "lsht": "LSHT",
    "passage_count": "PCount",
    "passage_retrieval_en": "PRe",
    "passage_retrieval_zh": "PRz",
    "lcc": "Lcc",
    "repobench-p": "RB-P",
}
ORDER = {name: place for place, name in enumerate(NAMES)}
FAMILY = {name: family for family, names in FAMILIES.items() for name in names}


def paper_order(name: str) -> tuple[int, str]:
    """Key that sorts data sets, and their parts (``qasper/0-4k``), as the paper does; others come last."""
    dataset, _, part = name.partition("/")
    return ORDER.get(dataset, len(ORDER)), part


def short_name(name: str) -> str:
    """The column's heading."""
    dataset, slash, part = name.partition("/")
    return NAMES.get(dataset, dataset) + slash + part


def family(name: str) -> str:
    """The family of a data set or of a part of one; empty for other data."""
    return FAMILY.get(name.partition("/")[0], "")
