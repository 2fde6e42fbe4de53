"""The command that makes, indexes and verifies shards."""
