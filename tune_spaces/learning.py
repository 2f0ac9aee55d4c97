"""How a memory is trained: a learning rate per kind of parameter, clipping, weight averaging.

- The three rates range over a factor of thirty around their defaults, evenly in the logarithm. Those
  of the gates and the output gate are larger than that of the addresses: they start at 0 and have few parameters.
- `clip_norm`: gradients of a memory are heavy-tailed while its gate opens; below .1 nothing is learned in a short run,
  at 10 nothing is clipped.
- `ema_decay`: averages over about 1 / (1 - decay) steps. 0 exports the last weights.
"""

from __future__ import annotations

from tune_spaces.study import Choice, Real, Study

STUDY = Study(
    name="learning",
    about="how a memory is trained: learning rates, clipping, weight averaging",
    space={
        "optimizer.learning_rate": Real(5e-4, 1.5e-2, log=True),
        "optimizer.gate_learning_rate": Real(2e-3, 6e-2, log=True),
        "optimizer.output_learning_rate": Real(1e-2, 3e-1, log=True),
        "optimizer.clip_norm": Real(0.1, 10.0, log=True),
        "training.ema_decay": Choice((0.0, 0.9, 0.98)),
    },
)
