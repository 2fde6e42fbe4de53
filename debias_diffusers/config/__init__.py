"""Configurations: dataclasses, their files, and what they must satisfy. No torch."""
