"""`python -m debias_diffusers.shards {make,index,verify} ...`."""

from ..cli import shards

if __name__ == "__main__":
    raise SystemExit(shards())
