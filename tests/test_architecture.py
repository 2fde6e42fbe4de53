"""The rooms import each other in one direction only, and third parties enter by few doors."""

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "debias_diffusers"

# Lower rooms first; a room may import rooms of lower rows only.
ORDER = [
    {"errors", "chance", "console", "ema", "background", "memory", "metadata", "launcher"},
    {"config", "files", "images", "cache", "labels"},
    {"folders"},
    {"rules", "schedule", "checkpoint", "model", "sources"},
    {"weighting", "timesteps", "variational", "data", "run", "schedulers", "snapshot", "card", "album", "guided", "extractors", "metrics"},
    {"hub", "feature_cache"},
    {"loss", "pipeline", "machine", "publish", "update"},
    {"pixels", "sampling", "window", "plots", "convert"},
    {"progress", "imagesets"},
    {"evaluation", "saving"},
    {"training", "likelihood"},
    {"cli"},
    {"__main__"},
]

DOORS = {
    "datasets": {"sources"},
    "pyarrow": {"sources"},
    "diffusers": {"model", "schedulers", "pipeline", "pixels", "machine", "convert"},
    "accelerate": {"machine", "progress", "training", "sampling", "evaluation", "likelihood"},
    "torch_fidelity": {"extractors", "metrics"},
    "tyro": {"cli"},
    "yaml": {"config"},
    "huggingface_hub": {"card", "hub", "publish"},
    "PIL": {"images", "album", "imagesets"},
    "matplotlib": {"plots"},
    "psutil": {"memory"},
}

WITHOUT_TORCH = {
    "errors",
    "config",
    "console",
    "rules",
    "files",
    "labels",
    "checkpoint",
    "run",
    "card",
    "hub",
    "publish",
    "cli",
    "launcher",
}


def imports(path, everywhere=True):
    """(module, names) of each import; `everywhere` also within functions."""
    tree = ast.parse(path.read_text())
    # A block for `python -m` stands at the end; there the command line, above all rooms, may be imported.
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "__main__" in ast.unparse(node.test))]
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.level, [alias.name for alias in node.names]


def rooms():
    return {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def neighbours(path, everywhere=True):
    for module, level, names in imports(path, everywhere):
        if level:
            yield from ({module} if module else set(names)) & set(rooms())


def test_every_room_has_its_place():
    assert set(rooms()) == set().union(*ORDER)


@pytest.mark.parametrize("room", sorted(set().union(*ORDER)))
def test_a_room_imports_only_rooms_below_it(room):
    level = next(k for k, row in enumerate(ORDER) if room in row)
    below = set().union(*ORDER[:level])
    assert set(neighbours(rooms()[room])) <= below


@pytest.mark.parametrize("library", DOORS)
def test_a_library_enters_by_its_doors(library):
    users = {room for room, path in rooms().items() if library in {module for module, level, _ in imports(path) if not level}}
    assert users == DOORS[library]


@pytest.mark.parametrize("room", sorted(WITHOUT_TORCH))
def test_configuration_and_run_directory_need_no_torch(room):
    path = rooms()[room]
    assert "torch" not in {module for module, _, _ in imports(path, everywhere=False)}
    assert set(neighbours(path, everywhere=False)) <= WITHOUT_TORCH


@pytest.mark.parametrize("library", ["torch_fidelity", "matplotlib"])
def test_training_without_figures_does_not_wait_for_the_import_of(library):
    imported, found = {"training"}, set()
    while imported:
        room = imported.pop()
        found.add(room)
        imported |= set(neighbours(rooms()[room], everywhere=False)) - found
    assert {"pipeline", "sources"} < found and not found & DOORS[library]


@pytest.mark.row(40, "no line of the package runs foreign code")
def test_nothing_in_the_package_runs_foreign_code():
    words = ("pickle", "eval(", "exec(", "yaml.load(", "weights_only=False", "shell=True", "extractall", "trust_remote_code")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not [word for word in words if word in text.replace("allow_pickle", "").replace(".eval()", "")], path
