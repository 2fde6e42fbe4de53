"""A folder that a Hugging Face Space runs: the playground of a model, with this package and what it needs. No torch."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

from ..config import hub_names
from ..config.schema.sampling import PlayConfig
from ..errors import InputError
from ..utils.console import say
from ..utils.files import filled_folder, new_folder, write_file

PACKAGE = "debias_diffusers"
GRADIO = "6.31.0"  # the version with which the page is tested

_APP = '''"""The playground of {names}."""

import os

from debias_diffusers.cli import play

# A Space is reached from outside of its machine; elsewhere this listens on this machine only.
HOST = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"

if __name__ == "__main__":
    raise SystemExit(play([*{models!r}, "--host", HOST{flags}]))
'''

_README = """---
title: {title}
emoji: 🎨
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
license: apache-2.0
{models}---

Draws with {names}, on the page that `python -m debias_diffusers.play` serves. `debias_diffusers/` is the package, and
`requirements.txt` what it needs. `python app.py` starts it on your own machine.
"""


def write(config: PlayConfig) -> None:
    """Writes the folder of a Space.

    Raises:
        InputError: the folder exists, or the package is not installed, so that what it needs is not known.
        CannotWriteError: it cannot be written.
    """
    folder = new_folder(config.space or "")
    needed = _requirements()
    names = " and ".join(config.models)
    ids = [hub_names.split_revision(model)[0] for model in config.models if hub_names.is_model_id(model)]
    readme = _README.format(
        title=json.dumps(f"Playground of {names}"[:60]),
        gradio=GRADIO,
        models="".join(["models:\n", *(f"  - {name}\n" for name in ids)]) if ids else "",
        names=names,
    )
    with filled_folder(folder, "app.py") as temporary:
        write_file(temporary / "app.py", _APP.format(names=names, models=list(config.models), flags=_flags(config)).encode())
        write_file(temporary / "requirements.txt", "".join(f"{line}\n" for line in needed).encode())
        write_file(temporary / "README.md", readme.encode())
        package = Path(__file__).parent.parent
        shutil.copytree(package, temporary / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    if any(not hub_names.is_model_id(name) for name in (*config.models, config.base_model) if name):
        say("warning: a Space has no files of this disk: push the model, and name its Hub id (python -m debias_diffusers.hub push RUN)")
    say(f"the Space is in {folder}; try it with python {folder / 'app.py'}, then upload it: hf upload user/name {folder} --repo-type space")


def _flags(config: PlayConfig) -> str:
    """The flags of the command that a Space keeps, as arguments of `play`."""
    neutral = PlayConfig(models=())
    kept = ("base_model", "max_image_steps", "max_queue", "batch_size", "dtype", "num_threads")
    given = {name: getattr(config, name) for name in kept if getattr(config, name) != getattr(neutral, name)}
    return "".join(f", {'--' + name!r}, {str(value)!r}" for name, value in given.items())


def _requirements() -> list[str]:
    """What the package and its text-to-image models need, as it was installed; Gradio is there in a Space."""
    try:
        found = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{PACKAGE} is not installed, so that what a Space must install is not known; run pip install -e .") from None
    pairs = [(line.partition(";")[0].strip(), re.search(r"extra == ['\"](\w+)['\"]", line)) for line in found]
    return sorted(name for name, extra in pairs if extra is None or extra[1] == "text")
