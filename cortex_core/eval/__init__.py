"""Measurements of a trained memory: how far it reaches, what it costs the text, and how sure we are."""
