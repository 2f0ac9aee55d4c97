"""Tests of attaching, reading, sessions and generation."""
