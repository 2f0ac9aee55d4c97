"""`python -m tests.benchmarks.tune_kernel FILE`: finds the fastest way to cut the Triton kernel up, on this machine's GPU.

Times every pass of `fast_weights/kernel.py` alone, for each precision, rank and chunk, gradients in one pass or in two,
with several numbers of warps and columns, and writes the table of `fast_weights/kernel_table.py` to FILE. With
`--compile I/N` it only compiles the I-th of N parts, into Triton's cache: run N of them at once before, since compiling
takes most of the time.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cortex_core.fast_weights import kernel, kernel_passes
from cortex_core.fast_weights.kernel_table import TABLE, Cut, Precision
from tests.benchmarks.rows import gpu

TOKENS = 2048
CHUNKS: dict[tuple[Precision, int], tuple[int, ...]] = {
    ("tf32x3", 16): (16, 32), ("tf32x3", 32): (32,), ("tf32x3", 64): (32,), ("tf32x3", 128): (32,),
    ("tf32", 16): (16, 32), ("tf32", 32): (32, 64), ("tf32", 64): (32, 64), ("tf32", 128): (32, 64),
}  # fmt: skip
"""What is tried; of the rest the table stays as it is. A smaller chunk keeps more states for the backward pass."""
WARPS = {16: (1, 2, 4), 32: (1, 2, 4), 64: (2, 4, 8), 128: (4, 8)}
HEAVY = ("prepare", "prepare_backward", "errors", "gradients")
PASSES = ("prepare", "carry", "read", "errors", "gradients")


class Launch(NamedTuple):
    """One pass as `delta_rule` launches it: a name of `Cut`, the Triton function, and what it is given."""

    name: str
    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def cut(self, warps: int, columns: int) -> Launch:
        """The same, cut up in another way."""
        options = self.options | {"num_warps": warps, "dim_wide": columns}
        grid = self.grid if len(self.grid) == 1 else (self.grid[0], -(-gpu.DIM // columns))
        return self._replace(grid=grid, options=options)

    def compile(self) -> None:
        self.function.warmup(*self.arguments, grid=self.grid, **self.options)

    def microseconds(self) -> float:
        from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

        run = self.function[self.grid]
        milliseconds = do_bench(lambda: run(*self.arguments, **self.options), warmup=2, rep=15, return_mode="median")
        return 1000 * milliseconds


class Recorder:
    """Stands in for a pass: notes how it is launched."""

    def __init__(self, function: Any, found: list[Launch]) -> None:
        self.function, self.found = function, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: Any) -> None:
            name = self.function.fn.__name__ + ("_backward" if options.get("backward") else "")
            self.found.append(Launch(name, self.function, grid, arguments, options))

        return launch


def launches(precision: Precision, rank: int, chunk: int, *, alone: bool) -> list[Launch]:
    """All passes of one call, forward and backward, gradients in one pass or in two. None of them runs."""
    inputs = [x.requires_grad_() for x in gpu.streams(rank, TOKENS)]
    if precision != "tf32":
        inputs = [x.detach().float().requires_grad_() for x in inputs]
    cut = TABLE[precision, rank]._replace(chunk=chunk, errors=None if alone else (4, 32))
    found: list[Launch] = []
    own = {name: getattr(kernel_passes, name) for name in PASSES}
    try:
        for name, function in own.items():
            setattr(kernel_passes, name, Recorder(function, found))
        results: list[Tensor] = list(kernel._DeltaRule.apply(*inputs, cut, True, precision))  # type: ignore[arg-type]
        torch.autograd.grad(results, inputs, [torch.zeros_like(x) for x in results])
    finally:
        for name, function in own.items():
            setattr(kernel_passes, name, function)
    return found


def ways(launch: Launch, precision: Precision, rank: int) -> Iterator[tuple[int, int]]:
    """Warps and columns to try."""
    columns = (16, 32) if launch.name.startswith("carry") else (32, 64)
    if launch.name in HEAVY and (precision == "tf32x3" or rank > 32):
        columns = (32,)  # two of them spill most registers
    for warps in WARPS[rank]:
        yield from ((warps, number) for number in columns)


def tried() -> Iterator[tuple[Precision, int, int, bool]]:
    """Precision, rank, chunk, and whether gradients are one pass."""
    for (precision, rank), chunks in CHUNKS.items():
        for chunk, alone in itertools.product(chunks, (True, False)):
            yield precision, rank, chunk, alone


def compile_part(part: int, parts: int) -> None:
    """Every `parts`-th variant."""
    number = 0
    for precision, rank, chunk, alone in tried():
        for launch in launches(precision, rank, chunk, alone=alone):
            for way in ways(launch, precision, rank):
                if number % parts == part:
                    launch.cut(*way).compile()
                number += 1


def fastest() -> dict[tuple[Precision, int], Cut]:
    """The table, with what was found to be faster."""
    table, least = dict(TABLE), dict.fromkeys(CHUNKS, math.inf)
    for precision, rank, chunk, alone in tried():
        best: dict[str, tuple[float, tuple[int, int]]] = {}
        for launch in launches(precision, rank, chunk, alone=alone):
            times = {way: launch.cut(*way).microseconds() for way in ways(launch, precision, rank)}
            way = min(times, key=times.__getitem__)
            best[launch.name] = times[way], way
        total = sum(microseconds for microseconds, _ in best.values())
        said = ", ".join(f"{name} {us:.0f} us {way}" for name, (us, way) in best.items())
        print(f"{precision} rank {rank} chunk {chunk}: {total:.0f} us: {said}", flush=True)
        if total < least[precision, rank]:
            least[precision, rank] = total
            table[precision, rank] = Cut(chunk, **{name: way for name, (_, way) in best.items()})
    return table


def source(table: dict[tuple[Precision, int], Cut]) -> str:
    """The table as it stands in the program."""
    lines = [
        f'    ("{precision}", {rank}): Cut({", ".join(map(str, cut))}),' for (precision, rank), cut in table.items()
    ]
    return "\n".join(["TABLE: dict[tuple[Precision, int], Cut] = {", *lines, "}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", type=Path, nargs="?", help="where the table goes")
    parser.add_argument("--compile", metavar="I/N", help="compile part I of N and end")
    given = parser.parse_args()
    if given.compile:
        part, parts = map(int, given.compile.split("/"))
        compile_part(part, parts)
    elif given.file:
        given.file.write_text(source(fastest()))
    else:
        parser.error("name the FILE that the table goes to, or a part to --compile")


if __name__ == "__main__":
    main()
