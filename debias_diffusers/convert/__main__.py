"""`python -m debias_diffusers.convert {guided,export,lora} ...`."""

from ..cli import convert

if __name__ == "__main__":
    raise SystemExit(convert())
