"""The 21 data sets of LongBench: prompt, generation limit, metric, language, category.

Source: LongBench (Bai et al., 2023), arXiv 2308.14508, table 1 for order, categories and sizes; prompts and limits are
those of https://github.com/THUDM/LongBench (MIT licence, Copyright (c) 2023 THU-KEG & Zhipu AI), byte for byte: the
missing space in narrativeqa's "asconcisely" and the extra one before qasper's "Answer the question" are official, and
every published score was made with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Metric = Literal[
    "qa_f1", "qa_f1_zh", "rouge", "rouge_zh", "classification", "count", "retrieval", "retrieval_zh", "code_sim"
]
"""Names of the functions of :mod:`kvbench.tasks.longbench_metrics`."""

CATEGORIES = {
    "single_doc_qa": "Single-document QA",
    "multi_doc_qa": "Multi-document QA",
    "summarization": "Summarization",
    "few_shot": "Few-shot learning",
    "synthetic": "Synthetic",
    "code": "Code completion",
}
"""Category -> heading, in the order of the paper's tables."""


@dataclass(frozen=True)
class DatasetSpec:
    """One data set of LongBench.

    Attributes:
        name: official name; also the stem of its file.
        title: name as the paper prints it.
        category: key of :data:`CATEGORIES`.
        language: ``en``, ``zh`` or ``code``.
        metric: name of the metric.
        max_new_tokens: generation limit, tokens.
        prompt: template for ``str.format(**row)``.
        rows: examples of the official file.
        rows_e: examples of the LongBench-E file, 0 where there is none.
        chat: wrap the prompt in the model's chat template. Not for the few-shot and code sets: there the model
            continues a pattern, and "chat models are better off without" (official code).
        first_line: only the first line of a prediction is scored; in a few-shot prompt the model goes on to invent the
            next question.
        stop_tokens: strings whose last token ends the generation.
        min_new_tokens: tokens before anything may stop the generation.
    """

    name: str
    title: str
    category: str
    language: Literal["en", "zh", "code"]
    metric: Metric
    max_new_tokens: int
    prompt: str
    rows: int = 200
    rows_e: int = 0
    chat: bool = True
    first_line: bool = False
    stop_tokens: tuple[str, ...] = ()
    min_new_tokens: int = 0


_NARRATIVEQA = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question"
    " asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
    "Story: {context}\n\n"
    "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not"
    " provide any explanation.\n\nQuestion: {input}\n\nAnswer:"
)

_QASPER_RULES = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based"
    ' on the information in the article, write "unanswerable". If the question is a yes/no question, answer "yes",'
    ' "no", or "unanswerable". Do not provide any explanation.'
)
_QASPER = (
    f"You are given a scientific article and a question. Answer the question {_QASPER_RULES}\n\n"
    "Article: {context}\n\n"
    f" Answer the question based on the above article {_QASPER_RULES}\n\n"
    "Question: {input}\n\nAnswer:"
)

_PASSAGES_RULE = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words."
)
_PASSAGES_QA = (  # hotpotqa, 2wikimqa, musique
    f"{_PASSAGES_RULE}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES_RULE}\n\n"
    "Question: {input}\nAnswer:"
)

_CODE_START, _CODE_END = "Please complete the code given below. \n{context}", "Next line of code:\n"

_ALL = (
    DatasetSpec("narrativeqa", "NarrativeQA", "single_doc_qa", "en", "qa_f1", max_new_tokens=128, prompt=_NARRATIVEQA),
    DatasetSpec("qasper", "Qasper", "single_doc_qa", "en", "qa_f1", max_new_tokens=128, prompt=_QASPER, rows_e=224),
    DatasetSpec(
        "multifieldqa_en",
        "MultiFieldQA-en",
        "single_doc_qa",
        "en",
        "qa_f1",
        max_new_tokens=64,
        rows=150,
        rows_e=150,
        prompt=(
            "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on"
            " the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
        ),
    ),
    DatasetSpec(
        "multifieldqa_zh",
        "MultiFieldQA-zh",
        "single_doc_qa",
        "zh",
        "qa_f1_zh",
        max_new_tokens=64,
        prompt=(
            "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
            "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答："
        ),
    ),
    DatasetSpec(
        "hotpotqa", "HotpotQA", "multi_doc_qa", "en", "qa_f1", max_new_tokens=32, prompt=_PASSAGES_QA, rows_e=300
    ),
    DatasetSpec(
        "2wikimqa", "2WikiMultihopQA", "multi_doc_qa", "en", "qa_f1", max_new_tokens=32, prompt=_PASSAGES_QA, rows_e=300
    ),
    DatasetSpec("musique", "MuSiQue", "multi_doc_qa", "en", "qa_f1", max_new_tokens=32, prompt=_PASSAGES_QA),
    DatasetSpec(
        "dureader",
        "DuReader",
        "multi_doc_qa",
        "zh",
        "rouge_zh",
        max_new_tokens=128,
        prompt=(
            "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n"
            "请基于上述文章回答下面的问题。\n\n问题：{input}\n回答："
        ),
    ),
    DatasetSpec(
        "gov_report",
        "GovReport",
        "summarization",
        "en",
        "rouge",
        max_new_tokens=512,
        rows_e=300,
        prompt=(
            "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
            "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:"
        ),
    ),
    DatasetSpec(
        "qmsum",
        "QMSum",
        "summarization",
        "en",
        "rouge",
        max_new_tokens=512,
        prompt=(
            "You are given a meeting transcript and a query containing a question or instruction. Answer the query in"
            " one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the above meeting"
            " transcript in one or more sentences.\n\nQuery: {input}\nAnswer:"
        ),
    ),
    DatasetSpec(
        "multi_news",
        "MultiNews",
        "summarization",
        "en",
        "rouge",
        max_new_tokens=512,
        rows_e=294,
        prompt=(
            "You are given several news passages. Write a one-page summary of all news. \n\n"
            "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:"
        ),
    ),
    DatasetSpec(
        "vcsum",
        "VCSUM",
        "summarization",
        "zh",
        "rouge_zh",
        max_new_tokens=512,
        prompt="下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    DatasetSpec(
        "trec",
        "TREC",
        "few_shot",
        "en",
        "classification",
        max_new_tokens=64,
        rows_e=300,
        chat=False,
        first_line=True,
        prompt=(
            "Please determine the type of the question below. Here are some examples of questions.\n\n"
            "{context}\n{input}"
        ),
    ),
    DatasetSpec(
        "triviaqa",
        "TriviaQA",
        "few_shot",
        "en",
        "qa_f1",
        max_new_tokens=32,
        rows_e=300,
        chat=False,
        first_line=True,
        prompt=(
            "Answer the question based on the given passage. Only give me the answer and do not output any other words."
            " The following are some examples.\n\n{context}\n\n{input}"
        ),
    ),
    DatasetSpec(
        "samsum",
        "SAMSum",
        "few_shot",
        "en",
        "rouge",
        max_new_tokens=128,
        rows_e=300,
        chat=False,
        first_line=True,
        # Models repeat "\nDialogue" for ever; the official code ends at a newline, but not before one token.
        stop_tokens=("\n",),
        min_new_tokens=1,
        prompt=(
            "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
            "{context}\n\n{input}"
        ),
    ),
    DatasetSpec(
        "lsht",
        "LSHT",
        "few_shot",
        "zh",
        "classification",
        max_new_tokens=64,
        chat=False,
        first_line=True,
        prompt="请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    ),
    DatasetSpec(
        "passage_count",
        "PassageCount",
        "synthetic",
        "en",
        "count",
        max_new_tokens=32,
        rows_e=300,
        prompt=(
            "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully"
            " read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In"
            " other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final"
            " count of unique paragraphs after removing duplicates. The output format should only contain the number,"
            " such as 1, 2, 3, and so on.\n\nThe final answer is: "
        ),
    ),
    DatasetSpec(
        "passage_retrieval_en",
        "PassageRetrieval-en",
        "synthetic",
        "en",
        "retrieval",
        max_new_tokens=32,
        rows_e=300,
        prompt=(
            "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the"
            " abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of"
            ' the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2",'
            " etc.\n\nThe answer is: "
        ),
    ),
    DatasetSpec(
        "passage_retrieval_zh",
        "PassageRetrieval-zh",
        "synthetic",
        "zh",
        "retrieval_zh",
        max_new_tokens=32,
        prompt=(
            "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
            '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：'
        ),
    ),
    DatasetSpec(
        "lcc",
        "LCC",
        "code",
        "code",
        "code_sim",
        max_new_tokens=64,
        rows=500,
        rows_e=300,
        chat=False,
        prompt=_CODE_START + _CODE_END,
    ),
    DatasetSpec(
        "repobench-p",
        "RepoBench-P",
        "code",
        "code",
        "code_sim",
        max_new_tokens=64,
        rows=500,
        rows_e=300,
        chat=False,
        prompt=_CODE_START + "{input}" + _CODE_END,
    ),
)

SPECS: dict[str, DatasetSpec] = {spec.name: spec for spec in _ALL}
"""Name -> data set, in the order of the paper's tables."""

E_DATASETS: tuple[str, ...] = tuple(spec.name for spec in _ALL if spec.rows_e)
"""The 13 data sets of LongBench-E, whose examples are spread evenly over lengths."""

ENGLISH_16: tuple[str, ...] = tuple(spec.name for spec in _ALL if spec.language != "zh")
"""The 16 English and code sets; papers on KV-cache compression report the plain mean over these."""

E_BUCKETS: tuple[str, ...] = ("0-4k", "4-8k", "8k+")
"""Length buckets of LongBench-E."""


def bucket(length: int) -> str:
    """Bucket of LongBench-E for a row's ``length`` field (words; characters in Chinese): <4000, <8000, the rest."""
    if length < 4000:
        return E_BUCKETS[0]
    return E_BUCKETS[1] if length < 8000 else E_BUCKETS[2]
