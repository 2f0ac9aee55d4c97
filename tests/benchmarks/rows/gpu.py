"""Rows that need an NVIDIA GPU: the kernel beside flash-linear-attention's, and what a memory costs a large model there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from typing import TYPE_CHECKING, NamedTuple

from cortex_core.errors import IncompatibleError
from tests.benchmarks import pairs
from tests.benchmarks.row import Row
from tests.benchmarks.rows.demo import Demo

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cortex_core.backbone.model import Cortex

PAIRS, MODEL_PAIRS = 25, 15
BATCH, HEADS, DIM = 8, 8, 64
RANKS, LENGTHS = (16, 32, 64, 128), (2048, 8192, 32_768)
KERNEL_GOAL, OVERHEAD_GOAL, STEP_GOAL = 1.0, 1.05, 1.15
KERNEL_ROWS = tuple(
    f"kernel_vs_fla_speedup{way}_rank_{rank}_{tokens}"
    for rank in RANKS
    for tokens in LENGTHS
    for way in ("", "_forward")
)


class Shape(NamedTuple):
    """A Llama with random weights in bfloat16, and what it reads."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    segment: int
    rows: int
    tokens: int


SHAPES = {
    "124m": Shape(768, 2048, 12, 12, 12, 256, rows=32, tokens=2048),
    "1b": Shape(2048, 8192, 16, 32, 8, 1024, rows=4, tokens=4096),
    "7b": Shape(4096, 11_008, 32, 32, 32, 1024, rows=2, tokens=4096),
}
MODEL_ROWS = (*(f"gpu_forward_overhead_{name}" for name in SHAPES), "gpu_step_vs_lora_1b")


def kernel_and_flash_linear_attention(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Seconds of flash-linear-attention's gated delta rule over those of the kernel, on the same numbers.

    Forward and backward with gradients of all inputs, and forward alone. Batch 8, 8 heads of dimension 64, keys,
    queries and values in bfloat16, each laid out as its function takes them; both after their own tuning. Whole calls
    until the GPU is done, launches included. 25 pairs in one process, alternating; median with its 95 % interval.
    """
    import torch

    _check_gpu()
    for rank in RANKS:
        for tokens in LENGTHS:
            base = f"rank_{rank}_{tokens}"
            mine, theirs = kernel_calls(rank, tokens), flash_calls(rank, tokens)
            for way, gradients in (("", True), ("_forward", False)):
                name = f"kernel_vs_fla_speedup{way}_{base}"
                if name in wanted:
                    with torch.set_grad_enabled(gradients):
                        found = pairs.median(pairs.ratios(theirs, mine, pairs=PAIRS, warm_up=4))
                    goal = KERNEL_GOAL if gradients else None
                    yield Row(name, found.value, goal, "higher", "x", found.n, found.low, found.high)


def overhead_on_a_gpu(demo: Demo, wanted: Set[str]) -> Iterator[Row]:
    """Time with a memory over time without, Llamas of 124 M, 1.1 B and 6.5 B parameters in bfloat16, random weights.

    One memory layer of rank 16, its output gate open. Reading and predicting every token, over the bare model on the
    same segments; and a training step (forward, backward, AdamW) over one with peft's LoRA of rank 16 on the query and
    value maps. 15 pairs in one process, alternating; median with its 95 % interval.
    """
    import torch

    _check_gpu()
    for name, shape in SHAPES.items():
        row = f"gpu_forward_overhead_{name}"
        if row in wanted:
            model, ids = attached(shape), tokens_of(shape)
            with torch.no_grad():
                found = pairs.median(pairs.ratios(*forward_calls(model, ids, shape), pairs=MODEL_PAIRS, warm_up=4))
            yield Row(row, found.value, OVERHEAD_GOAL, "lower", "x", found.n, found.low, found.high)
            del model
            torch.cuda.empty_cache()
    if "gpu_step_vs_lora_1b" in wanted:
        found = pairs.median(pairs.ratios(*step_calls(SHAPES["1b"]), pairs=MODEL_PAIRS, warm_up=4))
        yield Row("gpu_step_vs_lora_1b", found.value, STEP_GOAL, "lower", "x", found.n, found.low, found.high)


def streams(rank: int, tokens: int) -> list[Tensor]:
    """Keys, queries, values, write, logarithm of what is kept, and a state: bfloat16, and float32 from the write on."""
    import torch
    from torch.nn.functional import normalize

    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(BATCH, HEADS, *shape, generator=generator, device="cuda")

    keys, queries = (normalize(random(tokens, rank), dim=-1).bfloat16() for _ in range(2))
    write = random(tokens).clamp(0, 1)
    return [keys, queries, random(tokens, DIM).bfloat16(), write, write * math.log(0.98), random(rank, DIM)]


def kernel_calls(rank: int, tokens: int) -> Callable[[], None]:
    """One call of the kernel, with gradients where they are enabled."""
    import torch

    from cortex_core.fast_weights.kernel import delta_rule

    inputs = [x.requires_grad_() for x in streams(rank, tokens)]
    ones = torch.ones(HEADS, device="cuda")

    def call() -> tuple[Tensor, Tensor]:
        keys, queries, values, write, logs, state = inputs
        out, final = delta_rule(keys, queries, values, write, logs, ones, state)
        assert out is not None
        return out, final

    return _whole(call, inputs)


def flash_calls(rank: int, tokens: int) -> Callable[[], None]:
    """The same with flash-linear-attention: tokens before heads, the write in bfloat16."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    keys, queries, values, write, logs, state = streams(rank, tokens)
    keys, queries, values, logs, write = (
        x.transpose(1, 2).contiguous() for x in (keys, queries, values, logs, write.bfloat16())
    )
    inputs = [x.requires_grad_() for x in (queries, keys, values, logs, write, state)]

    def call() -> tuple[Tensor, Tensor]:
        return chunk_gated_delta_rule(*inputs[:5], scale=1.0, initial_state=inputs[5], output_final_state=True)

    return _whole(call, inputs)


def _whole(call: Callable[[], tuple[Tensor, Tensor]], inputs: list[Tensor]) -> Callable[[], None]:
    import torch

    def run() -> None:
        out, final = call()
        if torch.is_grad_enabled():
            torch.autograd.grad([out, final], inputs, [out.detach(), final.detach()])
        torch.cuda.synchronize()

    return run


def forward_calls(model: Cortex, ids: Tensor, shape: Shape) -> tuple[Callable[[], None], Callable[[], None]]:
    """Reading with the memory, and the bare model on the same segments."""
    import torch

    def remembering() -> None:
        model(input_ids=ids)
        torch.cuda.synchronize()

    def bare() -> None:
        with model.memory(False):
            model.backbone(input_ids=ids.view(-1, shape.segment), use_cache=False)
        torch.cuda.synchronize()

    return remembering, bare


def step_calls(shape: Shape) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step of the memory, and one of LoRA, on one row."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tests.benchmarks.rows.overhead import step

    model, ids = attached(shape), tokens_of(shape)[:1]
    lora = get_peft_model(backbone(shape), LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    flat = ids.view(-1, shape.segment)
    ours = step(model.sidecars, lambda: model(input_ids=ids).logits[0], ids)
    theirs = step(lora, lambda: lora(input_ids=flat, use_cache=False).logits.flatten(0, 1), ids)

    def done(way: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            way()
            torch.cuda.synchronize()

        return run

    return done(ours), done(theirs)


def tokens_of(shape: Shape) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 32_000, (shape.rows, shape.tokens), generator=generator).to("cuda")


def backbone(shape: Shape) -> PreTrainedModel:
    """Made on the GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=shape.hidden, intermediate_size=shape.mlp, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.segment,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def attached(shape: Shape) -> Cortex:
    """The same with a memory whose output gate is open."""
    import torch

    from cortex_core import Cortex, FastWeightsConfig

    model = Cortex.attach(backbone(shape), FastWeightsConfig(rank=16), shape.segment)
    for sidecar in model.sidecars.values():
        torch.nn.init.ones_(sidecar.output_gate)  # type: ignore[arg-type]
    return model


def _check_gpu() -> None:
    import torch

    from cortex_core.fast_weights.kernel import usable

    if not torch.cuda.is_available() or not usable(torch.device("cuda"), 16):
        raise IncompatibleError("these rows need an NVIDIA GPU of compute capability 8.0 or higher, and Triton")
