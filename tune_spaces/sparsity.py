"""How seldom a memory writes: the dead zone, the penalty on gates near opening, and the filler that it is shown.

- `dead_zone`: gates up to here write exactly nothing. It is what a gap's length costs nothing for.
- `sparsity_weight`: force of the penalty, over three orders of magnitude: too little leaves leaks, which set the reach;
  too much shuts the gate before it has found what to write.
- `sparsity_margin`: how far below the dead zone unused gates are pushed.
- `filler_windows`: how much text without facts the penalty sees; 0 leaves it the gaps of the sequences.
"""

from __future__ import annotations

from tune_spaces.study import Real, Study, Whole

STUDY = Study(
    name="sparsity",
    about="how seldom a memory writes: dead zone, write penalty, margin, windows of filler",
    space={
        "fast_weights.dead_zone": Real(0.2, 0.7),
        "training.sparsity_weight": Real(0.1, 100.0, log=True),
        "training.sparsity_margin": Real(0.0, 0.5),
        "training.filler_windows": Whole(0, 4),
    },
)
