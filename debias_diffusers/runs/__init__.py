"""Files of a run: the run directory, metrics.jsonl, checkpoints. No torch."""
