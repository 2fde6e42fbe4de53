"""Shards: files of many images, read at random by an index, in an order that keeps reading local."""
