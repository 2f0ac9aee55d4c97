"""A segment's statistics in a few numbers: an encoder, a decoder, and how much of what goes in comes out again.

A code cannot hold a change of the fast weights: in the source each of its numbers would stand for 12,288. It is trained
on what is recoverable, and nothing here judges it: whether sleep worked is asked of the model (`README.md`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from cortex_core import files
from cortex_core.config import CodesConfig
from cortex_core.consolidation.moments import Moments
from cortex_core.consolidation.statistics import Recoverable, Statistics, low_rank_share
from cortex_core.errors import ConfigError, DataError, IncompatibleError

SCHEMA = "cortex-codes/1"
SMALLEST_SCALE = 1e-6
"""Deviation below which a feature counts as constant, and is not divided by it."""
JUDGED_EVERY_STEPS = 25
"""Steps of a fit between two looks at the segments that are held out."""


class StatisticsShape(NamedTuple):
    """The sizes of one model's statistics."""

    layers: int
    hidden: int
    heads: int
    rank: int
    head_dim: int

    @classmethod
    def of(cls, statistics: Statistics | Recoverable) -> StatisticsShape:
        return cls(*statistics.mean.shape[1:], *statistics.delta_up.shape[2:])


class SegmentCoder(nn.Module):
    """What is recoverable of statistics to `code_size` numbers and back: a linear map each way, and beside it a hidden
    layer that adds nothing at first.

    Features are normalised by running moments, which `observe` alone changes; they are buffers, saved with the weights.
    """

    def __init__(self, shape: StatisticsShape, config: CodesConfig) -> None:
        super().__init__()
        directions, most = config.num_directions, min(shape.rank, shape.head_dim)
        if directions > most:
            raise ConfigError(f"num_directions = {directions}: a change of rank {most} has at most {most}")
        self.shape, self.config = shape, config
        layers, hidden, heads, rank, head_dim = shape
        self.part_shapes = (
            (layers, hidden), (layers, hidden), (layers, heads, rank, directions), (layers, heads, directions, head_dim)
        )  # fmt: skip
        self.sizes = [math.prod(part) for part in self.part_shapes]
        features = sum(self.sizes)
        self.encoder, self.decoder = nn.Linear(features, config.code_size), nn.Linear(config.code_size, features)
        self.encoder_bend = _bend(features, config.hidden_size, config.code_size)
        self.decoder_bend = _bend(config.code_size, config.hidden_size, features)
        for name, size in (("feature", (features,)), ("delta", (layers, heads, rank, head_dim))):
            for part, value in Moments.zeros(*size)._asdict().items():
                self.register_buffer(f"{name}_{part}", value)
        self.register_buffer("num_fits", torch.tensor(0))

    @torch.no_grad()
    def observe(self, given: Recoverable) -> None:
        """From now on features are normalised by the moments of these segments too. Not part of a forward pass, which
        may run twice."""
        self._check(given)
        for name, vectors in (("feature", _flat(given)), ("delta", given.delta_up)):
            merged = self._moments(name).merge(Moments.of(vectors))
            for part, value in merged._asdict().items():
                self.get_buffer(f"{name}_{part}").copy_(value)

    @torch.no_grad()
    def begin(self, given: Recoverable) -> None:
        """Begin with principal components: the best linear code of these segments, each number of variance 1 (or less,
        where there is hardly any to scale up)."""
        features = self._normalised(given)
        _, strength, components = torch.linalg.svd(features - features.mean(0), full_matrices=False)
        strength = strength[: self.config.code_size] / len(features) ** 0.5
        scale = strength.clamp_min(0.01 * float(strength[0])).clamp_min(SMALLEST_SCALE)
        components = components[: len(scale)]
        self.encoder.weight[: len(scale)] = components / scale[:, None]
        self.encoder.bias.zero_()
        self.decoder.weight.zero_()
        self.decoder.weight[:, : len(scale)] = components.T * scale
        self.decoder.bias.zero_()

    def encode(self, given: Recoverable) -> Float[Tensor, "segments code"]:
        """The codes. Raises IncompatibleError for statistics of another shape."""
        self._check(given)
        features = self._normalised(given)
        return self.encoder(features) + self.encoder_bend(features)

    def decode(self, codes: Float[Tensor, "segments code"]) -> Recoverable:
        """What they say."""
        features = (self.decoder(codes) + self.decoder_bend(codes)) * self._scale() + self._moments("feature").mean
        parts = features.split(self.sizes, dim=-1)
        return Recoverable(*(part.unflatten(1, size) for part, size in zip(parts, self.part_shapes, strict=True)))

    def errors(self, given: Recoverable) -> dict[str, Float[Tensor, ""]]:
        """By part, the squared error in units of the variance, in the mean over segments and features.

        Of the changes the products are compared, which do not depend on how they are factored; and head by head, not
        entry by entry: entries in which nothing happens would weigh like the others.
        """
        decoded = self.decode(self.encode(given))
        units = self._units().split(self.sizes)
        errors = {
            name: ((getattr(decoded, name) - getattr(given, name)).flatten(1) / unit).square().mean()
            for name, unit in zip(("mean", "log_variance"), units[:2], strict=True)
        }
        spread = self._moments("delta").variance.sum((-2, -1))
        spread = torch.where(spread > SMALLEST_SCALE**2, spread, 1.0)
        apart = (decoded.delta_up - given.delta_up).square().sum((-2, -1))
        return errors | {"delta_up": (apart / spread).mean()}

    @torch.no_grad()
    def explained_variance(self, held_out: Statistics) -> dict[str, float]:
        """1 − squared error / variance, by part, of segments that were not trained on: 0 is what their average reaches.

        Features of means and log-variances count alike. `delta_up` is asked for its low-rank part, `whole_delta_up` for
        all of it; `low_rank_share` is how much of its square the low-rank part holds. Raises DataError for fewer than
        two segments, which have no variance.
        """
        count, directions = len(held_out.mean), self.config.num_directions
        if count < 2:
            raise DataError(f"{count} held-out segments: variance needs at least 2")
        given = Recoverable.of(held_out, directions)
        decoded = self.decode(self.encode(given))
        scales = dict(zip(Recoverable._fields, self._units().split(self.sizes), strict=True))
        pairs = {name: (getattr(given, name), getattr(decoded, name)) for name in ("mean", "log_variance", "delta_up")}
        pairs["whole_delta_up"] = (held_out.delta_up, decoded.delta_up)
        found = {}
        for name, (target, said) in pairs.items():
            scale = 1.0 if "delta" in name else scales[name]
            error, spread = ((x.flatten(1) / scale).square().sum() for x in (target - said, target - target.mean(0)))
            found[f"codes/{name}_explained"] = float(1.0 - error / spread) if float(spread) else math.nan
        return found | {"codes/low_rank_share": low_rank_share(held_out.delta_up, directions)}

    def _moments(self, name: str) -> Moments:
        return Moments(*(self.get_buffer(f"{name}_{part}") for part in Moments._fields))

    def _units(self) -> Tensor:
        """Of each feature. Means and log-variances have their own deviations; entries of factors that of their head, or
        an error in a weak direction would count as much as one in a strong direction."""
        mean, log_variance, *factors = self._moments("feature").variance.split(self.sizes)
        for place, part in enumerate(self.part_shapes[2:]):
            by_head = factors[place].view(part)
            factors[place] = by_head.mean((-2, -1), keepdim=True).expand(part).flatten()
        deviation = torch.cat([mean, log_variance, *factors]).sqrt()
        return torch.where(deviation > SMALLEST_SCALE, deviation, 1.0)

    def _scale(self) -> Tensor:
        """What is 1 inside of the coder: units, times the root of how many features share a part, as all four parts
        weigh the same."""
        share = math.sqrt(len(self.sizes) / sum(self.sizes))
        shares = [torch.full((size,), share * math.sqrt(size)) for size in self.sizes]
        units = self._units()
        return units * torch.cat(shares).to(units.device)

    def _normalised(self, given: Recoverable) -> Tensor:
        return (_flat(given) - self._moments("feature").mean) / self._scale()

    def _check(self, given: Recoverable) -> None:
        found, directions = StatisticsShape.of(given), given.left.shape[-1]
        if (found, directions) != (self.shape, self.config.num_directions):
            raise IncompatibleError(
                f"statistics of {found} with {directions} directions: this coder is for {self.shape} with "
                f"{self.config.num_directions}; make one for this model"
            )


def fit(coder: SegmentCoder, given: Recoverable, *, generator: Generator) -> dict[str, float]:
    """Train on segments, which `observe` has seen, or others like these; the first fit starts with `begin`. The coder
    ends as it was when it was best on a share of them that it was not trained on. Returns its errors there.

    Raises DataError if the coder has seen none, as features would not be normalised, and for fewer than two.
    """
    config, count = coder.config, len(given.mean)
    if not float(coder.get_buffer("feature_num_vectors")):
        raise DataError("the coder has seen no segments, by which features are normalised: call observe first")
    if count < 2:
        raise DataError(f"{count} segments: a fit needs at least 2, one of them to say when it was best")
    order = torch.randperm(count, generator=generator).to(given.mean.device)
    held = min(max(1, round(config.validation_frac * count)), count - 1)
    judge, given = given.at(order[:held]), given.at(order[held:])
    if not int(coder.get_buffer("num_fits")):
        coder.begin(given)
    optimizer = torch.optim.AdamW(coder.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    best = _judged(coder, judge)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        index = torch.randint(len(given.mean), (config.batch_size,), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(coder.errors(given.at(index.to(order.device))).values())).sum().backward()
        optimizer.step()
        if (step + 1) % JUDGED_EVERY_STEPS == 0 or step + 1 == config.steps:
            best = min(best, _judged(coder, judge), key=lambda judged: sum(judged[0].values()))
    coder.load_state_dict(best[1])
    coder.get_buffer("num_fits").add_(1)
    return best[0]


@torch.no_grad()
def _judged(coder: SegmentCoder, judge: Recoverable) -> tuple[dict[str, float], dict[str, Tensor]]:
    errors = {f"codes/{name}_error": float(error) for name, error in coder.errors(judge).items()}
    return errors, {name: value.clone() for name, value in coder.state_dict().items()}


def save_coder(coder: SegmentCoder, path: str | Path, backbone: str) -> None:
    """Write one file; `backbone` is the fingerprint of the model whose segments it codes."""
    notes = {"shape": list(coder.shape), "config": coder.config.model_dump(), "backbone": backbone}
    files.write(Path(path), SCHEMA, coder.state_dict(), notes)


def load_coder(path: str | Path, backbone: str) -> SegmentCoder:
    """What was saved for the same model. Raises DataError, IncompatibleError."""
    tensors, notes = files.read(Path(path), SCHEMA, "coder")
    try:
        shape = StatisticsShape(*(int(size) for size in notes["shape"]))
        coder = SegmentCoder(shape, CodesConfig.model_validate(notes["config"]))
        coder.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"coder {path}: not readable ({str(error).splitlines()[0]}); it is damaged") from error
    if notes.get("backbone") != backbone:
        raise IncompatibleError(
            f"coder {path}: is for another backbone ({notes.get('backbone')}, this one is {backbone}); fit one for it"
        )
    return coder


def _bend(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    bend = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), last := nn.Linear(hidden, outputs))
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return bend


def _flat(given: Recoverable) -> Tensor:
    return torch.cat([part.flatten(1) for part in given], dim=1)
