"""Setting up a training: configuration and data, network, and what a checkpoint says."""
