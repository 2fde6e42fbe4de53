"""The command `play`: drawing on a web page."""

from __future__ import annotations

from pathlib import Path

from .. import parsing
from ..config import hub_names
from ..config.schema.sampling import PlayConfig
from ..errors import raise_all
from ..play import request, space
from ..runs.model_folder import task_of
from ..utils import text_libraries


def run_play(argv: list[str], program: str) -> None:
    """Serves the page, or writes the folder of a Space."""
    config = parsing.parse(PlayConfig, argv, program)
    raise_all(request.play_problems(config))
    if config.space is not None:
        space.write(config)
        return
    if any(hub_names.is_model_id(model) or task_of(Path(model)) == "text_to_image" for model in config.models):
        text_libraries.show()
    from ..play import page

    page.serve(config)
