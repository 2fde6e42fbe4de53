"""Comparing images: features, metrics, tables and plots; the likelihood."""
