"""Optimizers: APOLLO, which keeps little state. What is projected and how it is scaled: projection.py and apollo.py."""
