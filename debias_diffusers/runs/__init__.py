"""What is on the disk of a run: the run directory, its metrics, its checkpoints. No torch."""
