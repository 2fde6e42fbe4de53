"""Sampling: images from a model and seeds, and the image writer."""
