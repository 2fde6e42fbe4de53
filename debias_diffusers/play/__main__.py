"""`python -m debias_diffusers.play --help` says what it does."""

from ..cli import play

if __name__ == "__main__":
    raise SystemExit(play())
