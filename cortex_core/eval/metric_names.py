"""Names under which validations are reported. Whoever only reads them need not wait for the models that are asked."""

from __future__ import annotations

LOSS, RECALL = "validation/loss_nats", "validation/recall"
"""Negative log-likelihood of an answer's tokens (nats); share of answers exactly right."""
