"""Each example's own gradient, squared: what a Fisher diagonal is the mean of.

The square of a batch's mean gradient is not that: near a minimum the gradients of B examples cancel, and their mean is
B times too small when squared (`README.md`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, vmap

from cortex_core.config import FisherConfig
from cortex_core.errors import DataError, IncompatibleError

Parameters = Mapping[str, Tensor]
Examples = Mapping[str, Tensor]
"""Named tensors, an example per row."""
Example = dict[str, Tensor]
"""One row of each."""
ExampleLoss = Callable[[dict[str, Tensor], Example], Tensor]
"""(parameters, example) to its negative log-likelihood, a scalar: a sum over its tokens, not a mean."""
ExampleLogits = Callable[[dict[str, Tensor], Example], Tensor]
"""(parameters, example) to [*positions, classes]."""
IGNORED = -100
"""Label of a position that has none, as in torch's cross-entropy."""


def module_logits(module: nn.Module, *inputs: str) -> ExampleLogits:
    """The logits of a module as a function of its parameters, for one example: the named inputs in order, as a batch of
    one. Parameters that are not given keep the module's own values."""

    def logits(parameters: dict[str, Tensor], example: Example) -> Tensor:
        return functional_call(module, parameters, tuple(example[name][None] for name in inputs))[0]

    return logits


def nll(logits: ExampleLogits, labels: str = "labels") -> ExampleLoss:
    """Negative log-likelihood of categorical labels, summed over positions."""

    def loss(parameters: dict[str, Tensor], example: Example) -> Tensor:
        found, wanted = logits(parameters, example), example[labels]
        flat, wanted = found.reshape(-1, found.shape[-1]), wanted.reshape(-1)
        # By hand: cross_entropy with ignored labels looks at their number, which vmap does not allow.
        known = wanted != IGNORED
        taken = flat.float().log_softmax(-1).gather(1, torch.where(known, wanted, 0)[:, None])[:, 0]
        return -(taken * known).sum()

    return loss


def sampled_labels(
    logits: ExampleLogits, parameters: Parameters, examples: Examples, generator: Generator, labels: str = "labels"
) -> dict[str, Tensor]:
    """The examples with labels drawn from the model itself, given the same inputs; ignored positions stay ignored."""
    drawn = []
    with torch.no_grad():
        for example in _rows(examples):
            shares = logits(dict(parameters), example).float().softmax(-1)
            flat = torch.multinomial(shares.reshape(-1, shares.shape[-1]).cpu(), 1, generator=generator)
            label = example[labels]
            drawn.append(torch.where(label == IGNORED, label, flat.reshape(label.shape).to(label)))
    return {**examples, labels: torch.stack(drawn)}


def squared_gradients(
    loss: ExampleLoss, parameters: Parameters, examples: Examples, config: FisherConfig
) -> tuple[dict[str, Tensor], int]:
    """The sum over the examples of each one's squared gradient, by parameter, and how many there were.

    Raises DataError without examples or for a gradient that is not finite; IncompatibleError where vmap cannot.
    """
    count = num_examples(examples)
    points = {name: value.detach() for name, value in parameters.items()}
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in points.items()}
    batched = _all_at_once if config.per_example == "vmap" else _one_by_one
    for start in range(0, count, config.chunk_examples):
        chunk = {name: value[start : start + config.chunk_examples] for name, value in examples.items()}
        for name, gradients in batched(grad(loss), points, chunk).items():
            sums[name] += gradients.float().square().sum(0)
    wrong = [name for name, value in sums.items() if not bool(torch.isfinite(value).all())]
    if wrong:
        raise DataError(f"a squared gradient of {wrong[0]} is not finite: the loss of an example is not, or overflows")
    return sums, count


def num_examples(examples: Examples) -> int:
    """Rows of all of them. Raises DataError if there are none, or not as many of each."""
    counts = {name: len(value) for name, value in examples.items()}
    if len(set(counts.values())) != 1 or not next(iter(counts.values())):
        raise DataError(f"examples have {counts} rows: give at least one, and as many of each part")
    return next(iter(counts.values()))


def _rows(examples: Examples) -> Iterator[Example]:
    for row in range(num_examples(examples)):
        yield {name: value[row] for name, value in examples.items()}


def _all_at_once(gradient: Callable, points: dict[str, Tensor], chunk: Examples) -> dict[str, Tensor]:
    try:
        return vmap(gradient, in_dims=(None, 0))(points, dict(chunk))
    except RuntimeError as error:
        raise IncompatibleError(
            f'per_example = "vmap": this model cannot be mapped over examples ({str(error).splitlines()[0]}); '
            'set it to "loop"'
        ) from error


def _one_by_one(gradient: Callable, points: dict[str, Tensor], chunk: Examples) -> dict[str, Tensor]:
    each = [gradient(points, example) for example in _rows(chunk)]
    return {name: torch.stack([gradients[name] for gradients in each]) for name in points}
