"""The edge: Ray, DeepSpeed and MLflow around the core. Start at `cli` (what users type), `config` (a run)."""
