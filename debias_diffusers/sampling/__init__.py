"""From a model and seeds to image files."""
