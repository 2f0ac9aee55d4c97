"""LongBench: 21 data sets in English, Chinese and code, and the 13 of LongBench-E (`hotpotqa_e`).

Format: `data/<data set>.jsonl`, in `data.zip`, with the fields input, context, answers, length (words; characters of
the Chinese sets), dataset, all_classes and _id. Bai et al. (2024), "LongBench: a bilingual, multitask benchmark for
long context understanding", ACL. https://github.com/THUDM/LongBench. Which measure and how long an answer is as
published, but for the measures of three Chinese sets (`measures`); the prompts are our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from cortex_core.errors import DataError
from cortex_core.eval.benchmarks.example import Benchmark, Example, Place, Selection, Source, Task

_TEXT = "Read the text below. A question about it follows.\n\n"
_SHORT = "\n\nQuestion about the text above: {question}\nShortest possible answer:"
_TEXT_ZH = "下面是一份材料，材料之后有一个问题。\n\n"
_SHORT_ZH = "\n\n关于以上材料的问题：{question}\n简短的答案："
_REPORT = "Read the document below, which is to be summarized.\n\n"
_PAGE = "\n\nSummary of the document above, one page long:\n"

TASKS = {
    "narrativeqa": Task(_SHORT, 128, ("f1",), _TEXT),
    "qasper": Task(
        "\n\nQuestion about the article above: {question}\nAnswer in a few words, with yes or no, or with unanswerable "
        "where the article does not tell.\nAnswer:",
        128,
        ("f1",),
        _TEXT,
    ),
    "multifieldqa_en": Task(_SHORT, 64, ("f1",), _TEXT),
    "multifieldqa_zh": Task(_SHORT_ZH, 64, ("char_f1",), _TEXT_ZH),
    "hotpotqa": Task(_SHORT, 32, ("f1",), _TEXT),
    "2wikimqa": Task(_SHORT, 32, ("f1",), _TEXT),
    "musique": Task(_SHORT, 32, ("f1",), _TEXT),
    "dureader": Task("\n\n关于以上材料的问题：{question}\n答案：", 128, ("char_rouge_l",), _TEXT_ZH),
    "gov_report": Task(_PAGE, 512, ("rouge_l",), _REPORT),
    "qmsum": Task(
        "\n\nRequest about the meeting above: {question}\nReply in a few sentences:", 512, ("rouge_l",), _REPORT
    ),
    "multi_news": Task(_PAGE, 512, ("rouge_l",), _REPORT),
    "vcsum": Task("\n\n以上会议的要点：\n", 512, ("char_rouge_l",), "下面是一次会议的文字记录。\n\n"),
    # The context of the next four is a row of solved examples, and the input another one without its solution.
    "trec": Task("\n{question}", 64, ("classes",), first_line=True),
    "triviaqa": Task("\n\n{question}", 32, ("f1",), first_line=True),
    "samsum": Task("\n\n{question}", 128, ("rouge_l",), first_line=True),
    "lsht": Task("\n{question}", 64, ("classes",), first_line=True),
    "passage_count": Task(
        "\n\nSome of the paragraphs above occur more than once. How many different ones there are, as a number:",
        32,
        ("numbers",),
        "Compare the paragraphs below.\n\n",
    ),
    "passage_retrieval_en": Task(
        "\n\nAbstract of one of the paragraphs above:\n{question}\n\nNumber of that paragraph: Paragraph",
        32,
        ("numbers",),
        "Read the paragraphs below.\n\n",
    ),
    "passage_retrieval_zh": Task(
        "\n\n以上某个段落的概要：\n{question}\n\n该段落的编号：段落", 32, ("numbers",), "下面有若干段落。\n\n"
    ),
    "lcc": Task("{question}", 64, ("code",)),
    "repobench-p": Task("{question}", 64, ("code",)),
}
_UNEVEN = (
    "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum",
    "passage_count", "passage_retrieval_en", "lcc", "repobench-p",
)  # fmt: skip
"""Those that LongBench-E has again, evenly spread over the lengths."""
TASKS |= {f"{name}_e": TASKS[name] for name in _UNEVEN}


def place(name: str) -> Place | None:
    """`data/hotpotqa.jsonl`, or `hotpotqa/test-00000-of-00001.parquet` as some copies have it."""
    path = PurePosixPath(name)
    found = next((known for known in (path.stem, path.parent.name) if known in TASKS), None)
    return Place(task=found) if found and path.suffix in (".jsonl", ".json", ".parquet") else None


def length_of(size: int) -> str:
    """The published groups of lengths, by the field `length`."""
    return "0-4k" if size < 4000 else "4-8k" if size < 8000 else "8k+"


def examples(source: Source) -> Iterator[Example]:
    """One per record. Where the file's name does not tell the data set, the record does. Raises DataError."""
    for record in source.records():
        task = source.place.task or record.text("dataset")
        if task not in TASKS:
            raise DataError(f"{record.where} has dataset {task!r}, unknown in LongBench: name the file as published")
        answers, name = record.texts("answers"), record.text("_id")
        if not answers:
            raise DataError(f"{record.where} has no text in 'answers': is it a file of another benchmark?")
        yield Example(
            key=f"{task}/{name}",
            id=name,
            task=task,
            length=length_of(record.number("length")),
            context=(record.text("context"),),
            question=record.text("input"),
            answers=answers,
            classes=record.texts("all_classes"),
        )


def hub_files(selection: Selection) -> list[str]:
    """The archive; copies that were converted have a folder per data set."""
    return ["data.zip", *(f"**{task}/*.parquet" for task in selection.tasks or TASKS)]


LONGBENCH = Benchmark("LongBench", "THUDM/LongBench", TASKS, place, examples, hub_files, Selection())
