"""The command that reconstructs averaged weights after a training (post-hoc EMA)."""
