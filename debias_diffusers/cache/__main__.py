"""`python -m debias_diffusers.cache DATA --base_model MODEL --precompute_dir DIR ...`."""

from ..cli import cache

if __name__ == "__main__":
    raise SystemExit(cache())
