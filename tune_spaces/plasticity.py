"""What decides how strongly a token is written: the controller and its guard, and whether heads learn to forget.

- `controller`: whether surprise, uncertainty, reward and phase have a say in the gate at all.
- `uncertainty_threshold`, `uncertain_scale`: where the guard begins, and how much of a write it lets through. A
  threshold of 1 never guards; scales near 0 write nothing while the memory is unsure, which at the start is always.
- `learn_decay`: each head from the same decay, or to one of its own.
- `write_noise`: tokens that training writes by mistake, so that recall survives them. Above .02 noise outweighs facts.
"""

from __future__ import annotations

from tune_spaces.study import Choice, Real, Study

STUDY = Study(
    name="plasticity",
    about="what decides how strongly a token is written: controller, its guard, learned decay, noise",
    space={
        "fast_weights.controller": Choice((True, False)),
        "fast_weights.uncertainty_threshold": Real(0.5, 1.0),
        "fast_weights.uncertain_scale": Real(0.1, 1.0),
        "fast_weights.learn_decay": Choice((False, True)),
        "training.write_noise": Real(0.0, 0.02),
    },
)
