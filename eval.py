"""`python eval.py --help` says what it does."""

if __name__ == "__main__":
    from debias_diffusers.cli import evaluate

    raise SystemExit(evaluate())
