"""What is trained: a task fits data, network and pipeline to the training loop."""
