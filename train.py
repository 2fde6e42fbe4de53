"""`python train.py --help` says what it does."""

if __name__ == "__main__":
    from debias_diffusers.cli import train

    raise SystemExit(train())
