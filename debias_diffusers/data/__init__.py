"""Images: decoding, sources, and the dataset by position."""
