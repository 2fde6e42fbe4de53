"""Configurations of publishing on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..ranges import at_least


@dataclass(frozen=True, kw_only=True)
class HubConfig:
    """Publishing on the Hub."""

    push_to_hub: bool = False  # push to the Hub at checkpoints, in the background, and at the end
    hub_model_id: str | None = None  # Hub repository, user/name or name; created if it does not exist
    hub_private: bool = False  # make the repository private
    # steps between pushes; every checkpoint if left out; 0 pushes at the end only
    hub_every: Annotated[int | None, at_least(0, 10_000, zero="at the end only")] = None
    hub_tags: bool = False  # tag each pushed revision with its step, such as step-00010000
    hub_license: str | None = None  # license of the model in its card, such as apache-2.0; unknown if left out


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Push a run to the Hub, or what is missing of it. The same command resumes a push."""

    run: str  # the run directory
    hub_model_id: str | None = None  # Hub repository, user/name or name; with all that follows, as in the last push if left out
    hub_private: bool = False  # make the repository private
    hub_tags: bool = False  # tag the pushed revision with its step
    hub_license: str | None = None  # license of the model in its card, such as apache-2.0; unknown if left out
    background: bool = False  # end when standard input is closed, as it is when the training that started this ends
