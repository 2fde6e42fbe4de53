"""Checkpoints of guided-diffusion to pipelines, and back."""
