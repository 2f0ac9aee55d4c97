"""Training: objectives, the step, checkpoints."""
