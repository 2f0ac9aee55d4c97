"""What a memory holds and for how long: rank, decay, strength of a write, width of the gate's dead zone.

- `rank`: a head keeps about as many facts as it has dimensions. Six facts over four heads are near the bound at 4 and
  far from it at 32; above that only the state grows.
- `decay`: per full write. At .9 the first of six facts is at .59 when the last is written; above .99 old facts
  interfere with new ones in few dimensions.
- `write_strength`: 1 replaces what a key held. Below, a fact needs to be told again; above, errors at the key change
  sign, and 2 is the stability bound.
- `dead_zone`: how sure the gate must be before it writes at all. Wide zones keep filler out, and facts if too wide.
"""

from __future__ import annotations

from tune_spaces.study import Choice, Real, Study

STUDY = Study(
    name="fast_weights",
    about="what a memory holds and for how long: rank, decay, write strength, dead zone",
    space={
        "fast_weights.rank": Choice((4, 8, 16, 32)),
        "fast_weights.decay": Choice((0.9, 0.95, 0.98, 0.995)),
        "fast_weights.write_strength": Real(0.5, 1.5),
        "fast_weights.dead_zone": Real(0.2, 0.7),
    },
)
