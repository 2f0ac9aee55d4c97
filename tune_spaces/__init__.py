"""Search spaces: what a sweep varies and over what range, each with the reason. Data alone: no ray, no torch."""
