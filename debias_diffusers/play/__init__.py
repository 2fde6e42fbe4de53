"""A web page on which a model draws: `python -m debias_diffusers.play MODEL`. docs/playground.md describes it."""
