"""Rows about what a memory costs on a backbone of common proportions (124 M parameters, random weights: time alone)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import TYPE_CHECKING

from tests.benchmarks import pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cortex_core.backbone.model import Cortex

TOKENS, SEGMENT, RANK, ROUNDS, STEP_PAIRS = 1024, 256, 16, 15, 9
RANKS = (8, 16, 32, 64)
FORWARD_GOAL, STEP_GOAL = 1.10, 1.15
ROWS = ("large_forward_overhead", "large_step_vs_lora", *(f"large_forward_overhead_rank_{rank}" for rank in RANKS))


def overhead_of_a_large_model(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Time with a memory over time without, on a Llama of 124 M parameters (12 layers, width 768, 32,000 tokens).

    1,024 tokens as four segments of 256; one memory layer, by default of rank 16, whose output gate is open so that
    nothing is left out. Reading and predicting every token, over the bare model on the same segments, all ranks in turn
    with the bare model, 15 rounds; and one training step (forward, backward, AdamW, loss on every token) over one with
    peft's LoRA of rank 16 on the query and value maps, 9 pairs, alternating. One process; median and its interval.
    """
    if wanted - {"large_step_vs_lora"}:
        yield from (row for row in forward_rows() if row.name in wanted)
    if "large_step_vs_lora" in wanted:
        yield step_row()


def forward_rows() -> Iterator[Row]:
    """Overhead of a forward pass by rank; the default rank has the goal."""
    import torch

    models, ids = {rank: attached(rank) for rank in RANKS}, tokens()

    def read(model: Cortex) -> None:
        with torch.no_grad():
            model(input_ids=ids.view(1, -1))

    def bare() -> None:
        with torch.no_grad(), models[RANK].memory(False):
            models[RANK].backbone(input_ids=ids, use_cache=False)

    ways = {str(rank): partial(read, model) for rank, model in models.items()}
    found = {rank: pairs.median(ratios) for rank, ratios in pairs.ratios_to(ways, bare, rounds=ROUNDS).items()}
    rows = {"large_forward_overhead": (found[str(RANK)], FORWARD_GOAL)}
    rows |= {f"large_forward_overhead_rank_{rank}": (median, None) for rank, median in found.items()}
    for name, (median, goal) in rows.items():
        yield Row(name, median.value, goal, "lower", "x", median.n, median.low, median.high)


def step_row() -> Row:
    """A training step of the memory over one of LoRA."""
    from peft import LoraConfig, get_peft_model

    model, ids = attached(RANK), tokens()
    lora = get_peft_model(backbone(), LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ours = step(model.sidecars, lambda: model(input_ids=ids.view(1, -1)).logits[0], ids)
    theirs = step(lora, lambda: lora(input_ids=ids, use_cache=False).logits.flatten(0, 1), ids)
    found = pairs.median(pairs.ratios(ours, theirs, pairs=STEP_PAIRS))
    return Row("large_step_vs_lora", found.value, STEP_GOAL, "lower", "x", found.n, found.low, found.high)


def step(trained, predict, ids) -> Callable[[], None]:  # noqa: ANN001
    """One optimizer step that teaches the parameters of `trained` to predict the next token."""
    import torch
    from torch.nn import functional

    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)
    target = ids.flatten().roll(-1)

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(predict(), target).backward()
        optimizer.step()

    return once


def tokens():  # noqa: ANN201
    """int64 [segments, SEGMENT], random."""
    import torch

    return torch.randint(0, 32_000, (TOKENS // SEGMENT, SEGMENT), generator=torch.Generator().manual_seed(0))


def backbone() -> PreTrainedModel:
    """A Llama with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=SEGMENT, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def attached(rank: int) -> Cortex:
    """The same with a memory whose output gate is open."""
    import torch

    from cortex_core import Cortex, FastWeightsConfig

    model = Cortex.attach(backbone(), FastWeightsConfig(rank=rank), SEGMENT)
    for sidecar in model.sidecars.values():
        torch.nn.init.ones_(sidecar.output_gate)  # type: ignore[arg-type]
    return model
