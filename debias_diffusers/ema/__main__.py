"""`python -m debias_diffusers.ema reconstruct RUN --sigma_rel 0.08`."""

from ..cli import ema

if __name__ == "__main__":
    raise SystemExit(ema())
