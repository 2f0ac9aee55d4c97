"""Rows about what a memory costs on a backbone of common proportions (124 M parameters, random weights: time alone)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from typing import TYPE_CHECKING

from tests.benchmarks import pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cortex_core.backbone.model import Cortex

TOKENS, SEGMENT, RANK, PAIRS = 1024, 256, 16, 5
RANKS = (8, 16, 32, 64)
FORWARD_GOAL, STEP_GOAL = 1.10, 1.15
ROWS = ("large_forward_overhead", "large_step_vs_lora", *(f"large_forward_overhead_rank_{rank}" for rank in RANKS))


def overhead_of_a_large_model(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Time with a memory over time without, on a Llama of 124 M parameters (12 layers, width 768, 32,000 tokens).

    1,024 tokens as four segments of 256; one memory layer, by default of rank 16, whose output gate is open so that
    nothing is left out. Reading and predicting every token, over the bare model on the same segments; and one training
    step (forward, backward, AdamW, loss on every token) over one with peft's LoRA of rank 16 on the query and value
    maps. 5 pairs in one process, alternating; median, smallest to largest.
    """
    import torch
    from torch import nn

    for rank in (None, *RANKS):
        name = "large_forward_overhead" + (f"_rank_{rank}" if rank else "")
        if name in wanted:
            model, ids = attached(rank or RANK), tokens()

            def read(on: bool, model: Cortex = model, ids: torch.Tensor = ids) -> None:
                with torch.no_grad(), model.memory(on):
                    if on:
                        model(input_ids=ids.view(1, -1))
                    else:
                        model.backbone(input_ids=ids, use_cache=False)

            found = pairs.median(pairs.ratios(lambda read=read: read(True), lambda read=read: read(False), pairs=PAIRS))
            goal = None if rank else FORWARD_GOAL
            yield Row(name, found.value, goal, "lower", "x", found.n, found.low, found.high)
    if "large_step_vs_lora" in wanted:
        from peft import LoraConfig, get_peft_model

        model, ids = attached(RANK), tokens()
        adapter = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        lora = get_peft_model(backbone(), adapter)
        heads: list[tuple[nn.Module, Callable[[], torch.Tensor]]] = [
            (model.sidecars, lambda: model(input_ids=ids.view(1, -1)).logits[0]),
            (lora, lambda: lora(input_ids=ids, use_cache=False).logits.flatten(0, 1)),
        ]
        steps = [step(trained, predict, ids) for trained, predict in heads]
        found = pairs.median(pairs.ratios(steps[0], steps[1], pairs=PAIRS))
        yield Row("large_step_vs_lora", found.value, STEP_GOAL, "lower", "x", found.n, found.low, found.high)


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
