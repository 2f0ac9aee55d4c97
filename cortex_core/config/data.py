"""What a memory is trained on, and what it is asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cortex_core.config.settings import Fraction, PositiveInt, Settings

TaskName = Literal[
    "key_value", "copy_reverse", "n_back", "long_addition", "multi_query_recall", "forgetting", "needle_single",
    "needle_multi_key", "needle_multi_value", "needle_multi_query", "variable_tracking", "world_qa1", "world_qa2",
    "world_qa3", "world_qa4", "world_qa5", "split_addition",
]  # fmt: skip
SourceName = Literal[TaskName, "corpus"]
"""What a mixture is made of: tasks, and plain text."""
FillerName = Literal["text", "random"]
CORPUS_SUFFIXES = (".txt", ".jsonl", ".parquet")
"""Files that text is read from."""


class DataConfig(Settings):
    """Real text: filler between facts, in-window training, and the held-out text on which drift is measured."""

    path: str | None = None
    """A .txt, .jsonl or .parquet file, or a folder of them; None takes the Python standard library's own sources."""
    text_column: str = "text"
    """Field or column that holds the text in .jsonl and .parquet."""
    held_out_frac: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the files (of the records or blocks of lines, when there is one file) that training never sees."""
    max_bytes: Annotated[int, Field(ge=4096)] = 64_000_000
    """Upper bound on the text that is read, in bytes."""


class TasksConfig(Settings):
    """What the memory is trained on and asked about."""

    names: Annotated[tuple[SourceName, ...], Field(min_length=1)] = ("key_value",)
    """Tasks in the training mixture, drawn with equal probability; `corpus` is plain text, every token of which is to
    be predicted from the segments before."""
    fillers: Annotated[tuple[FillerName, ...], Field(min_length=1)] = ("text", "random")
    """What stands in the gap: real text, random tokens, or either."""
    num_pairs: Annotated[int, Field(ge=1, le=64)] = 6
    """Keys per example of key_value, forgetting and multi_query_recall."""
    any_token_frac: Fraction = 0.5
    """Share of training examples whose words are any tokens; never held-out words."""
    num_queries: Annotated[int, Field(ge=1)] = 6
    """Questions per training example; evaluation asks one."""


class EvaluationConfig(Settings):
    """What is asked of a trained model, with memory on and off on the same examples."""

    tasks: Annotated[tuple[TaskName, ...], Field(min_length=1)] = ("key_value",)
    """Tasks that are scored."""
    fillers: Annotated[tuple[FillerName, ...], Field(min_length=1)] = ("text", "random")
    """Fillers that are scored, each on its own."""
    gaps_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (
        0, 256, 512, 1024, 2048, 4096, 8192, 16384,
    )  # fmt: skip
    """Filler tokens between the facts and the question; 0 asks within the window."""
    num_examples: Annotated[int, Field(ge=2)] = 200
    """Independent examples per task, filler and gap."""
    batch_size: PositiveInt = 50
    """Examples read side by side on each worker: more is faster and takes more memory, whatever the gap."""
    perplexity_tokens: Annotated[int, Field(ge=0)] = 65_536
    """Tokens of held-out text for the drift measurement; 0 skips it."""


class ValidationConfig(Settings):
    """What is asked while training goes on, to choose between runs: the tasks and fillers of the evaluation, with words
    that are neither trained on nor evaluated."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between validations; there is one after the last step as well. 0 validates nothing; otherwise a
    fifth of the words for training is set aside."""
    gaps_tokens: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (512, 2048)
    """Filler tokens between the facts and the question."""
    num_examples: Annotated[int, Field(ge=2)] = 40
    """Examples per task, filler and gap; the same ones each time."""
