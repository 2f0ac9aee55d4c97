"""Fast weights: the gated delta rule in a learned low-rank key space. Equations: README.md."""
