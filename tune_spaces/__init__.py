"""Search spaces: a sample is a set of dotted overrides for one run's settings. Never imports torch."""
