"""Which weights of a network a command takes: averaged, raw, or of a given width."""

from __future__ import annotations

from ..schema.types import SIGMA_REL


def network_weights_problems(weights: str) -> list[str]:
    """A name that no weights have."""
    if weights in ("ema", "raw") or _is_rate(weights) or sigma_rel_of(weights) is not None:
        return []
    return [f"weights is {weights!r}, but must be ema, raw, an EMA decay rate such as 0.999, or sigma_rel=0.08"]


def sigma_rel_of(weights: str) -> float | None:
    """The width in `sigma_rel=0.08`; None of other weights, and of a width that no average has."""
    start, _, number = weights.partition("=")
    try:
        width = float(number)
    except ValueError:
        return None
    return width if start == "sigma_rel" and SIGMA_REL.holds(width) else None


def _is_rate(text: str) -> bool:
    try:
        return 0 <= float(text) < 1
    except ValueError:
        return False
