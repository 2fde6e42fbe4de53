"""`python -m debias_diffusers COMMAND ...`: every command of the package."""

if __name__ == "__main__":
    from .cli import main

    raise SystemExit(main())
