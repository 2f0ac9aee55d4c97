"""The only place that knows transformers: loading, attaching, sessions, the model."""
