"""Converts checkpoints of guided-diffusion to pipelines, and back."""
