"""`python -m debias_diffusers.hub push RUN`."""

from ..cli import push

if __name__ == "__main__":
    raise SystemExit(push())
