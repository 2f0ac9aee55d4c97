"""What the README shows, run as it stands, and what it promises of the sidecars that ship."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from cortex_core import Cortex
from cortex_core.backbone.load import load_tokenizer
from cortex_core.config import BackboneConfig, DataConfig
from cortex_core.eval.reach import padded
from cortex_core.tasks.corpus import load_corpus
from cortex_core.tasks.mixture import build_task
from cortex_core.tasks.vocabulary import TaskVocabulary
from pipelines.config import load_config

README = Path(__file__).parent.parent / "README.md"
BACKBONE, SIDECARS = "builtin:stdlib-1m", "builtin:stdlib-1m/sidecars"


def blocks(language: str) -> list[str]:
    """Fenced blocks of one language; commands have none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def test_the_python_runs_and_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(README, tmp_path)
    monkeypatch.chdir(tmp_path)
    code, names = "\n".join(blocks("python")), {}
    promised = re.findall(r'^print\(.*#\s+"(.*)"$', code, flags=re.MULTILINE)
    assert promised
    exec(compile(code, str(README), "exec"), names)
    assert not names["session"].writes(), "what was told last was forgotten"
    assert capsys.readouterr().out.splitlines() == promised
    assert (tmp_path / "chat.safetensors").stat().st_size < 40_000


def test_the_commands_are_valid_settings() -> None:
    commands = re.findall(r"^.*(?:cortex train|pipelines\.train) (.*)$", "".join(blocks("")), flags=re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        recipe, *overrides = command.split()
        load_config(recipe, overrides)


@pytest.mark.parametrize("filler", ["text", "random"])
@torch.no_grad()
def test_a_fact_of_the_first_call_is_recalled_in_the_second(filler: str) -> None:
    """Words and text that no training has seen; the fact lies eight windows back. The same examples without memory."""
    tokenizer = load_tokenizer(BackboneConfig(name=BACKBONE))
    vocabulary, corpus = TaskVocabulary.from_tokenizer(tokenizer), load_corpus(DataConfig(max_bytes=500_000), tokenizer)
    task = build_task("key_value", filler, vocabulary, corpus, split="held_out", seed=23)
    model = Cortex.from_pretrained(BACKBONE, sidecars=SIDECARS)
    examples = [task.example(index, 2048) for index in range(40)]
    asked = [len(example.tokens) - task.query_tokens(index) for index, example in enumerate(examples)]
    told = padded([e.tokens[:at] for e, at in zip(examples, asked, strict=True)], model.device)
    question = padded([e.tokens[at:] for e, at in zip(examples, asked, strict=True)], model.device)
    session = model.new_session(len(examples))
    model(input_ids=told[0], attention_mask=told[1], session=session, logits_to_keep=1)
    recalled = right(model(input_ids=question[0], attention_mask=question[1], session=session).logits, examples, asked)
    with model.memory(False):
        guessed = right(model(input_ids=question[0], attention_mask=question[1]).logits, examples, asked)
    assert recalled >= 37 and guessed <= 4


def right(logits: torch.Tensor | None, examples: list, asked: list[int]) -> int:
    """Questions answered exactly."""
    assert logits is not None
    found = 0
    for row, (example, at) in enumerate(zip(examples, asked, strict=True)):
        answer = int(example.answer.nonzero()[0][0])
        found += int(logits[row, answer - at - 1].argmax()) == int(example.tokens[answer])
    return found
