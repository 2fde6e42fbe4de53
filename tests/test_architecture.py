"""Folders import lower folders only, modules form no circle, and third parties enter by few modules."""

import ast
import importlib
import pkgutil
from functools import cache

import pytest
from conftest import ROOT

import debias_diffusers

PACKAGE = ROOT / "debias_diffusers"

# Lower ones first: a folder (or a module directly in the package) imports those before it only.
ORDER = [
    "errors",
    "utils",
    "config",
    "remote",
    "diffusion",
    "data",
    "runs",
    "hub",
    "pipelines",
    "sampling",
    "play",
    "evaluation",
    "analysis",
    "tasks",
    "training",
    "convert",
    "parsing",
    "commands",
    "cli",
]

MAX_MODULES = 12  # directly in the package, and in each folder

# The modules, or whole folders, that may import a library.
USERS = {
    "datasets": {"data.sources.table", "data.shards.table_columns"},
    "pyarrow": {"data.sources.table", "data.shards.index", "data.shards.parquet", "data.shards.rows"},
    "diffusers": {"pipelines", "tasks", "training.device", "convert.guided_diffusion"},
    "accelerate": {"utils.distributed", "training", "sampling.generate", "evaluation", "tasks"},
    "torch_fidelity": {"evaluation.feature_extractors", "evaluation.metrics"},
    "tyro": {"parsing"},
    "yaml": {"config.loading"},
    "huggingface_hub": {"hub", "remote.http"},
    "httpx2": {"remote.http"},
    "PIL": {"data.images", "sampling.image_writer", "evaluation.image_sets"},
    "matplotlib": {"evaluation.plots", "analysis.figures", "analysis.charts"},
    "psutil": {"utils.memory"},
    "transformers": {"pipelines.loading", "pipelines.text_pipeline", "evaluation.feature_extractors", "tasks.frozen_parts"},
    "peft": {"tasks.lora"},
    "bitsandbytes": {"training.optimizer_step"},
    "gradio": {"play.page"},
}

WITHOUT_TORCH = {
    "errors",
    "utils.console",
    "utils.files",
    "utils.launcher",
    "utils.signals",
    "utils.text_libraries",
    "config",
    "remote",
    "data.captions",
    "data.image_folders",
    "data.image_metadata",
    "data.images",
    "data.labels",
    "data.shards.commands",
    "data.shards.files",
    "data.shards.index",
    "data.shards.parquet",
    "data.shards.remote_files",
    "data.shards.rows",
    "data.shards.source",
    "data.shards.table_columns",
    "data.shards.tar",
    "data.sources",
    "runs",
    "hub",
    "play.request",
    "play.space",
    "analysis.report_page",
    "analysis.run_files",
    "tasks.base_model",
    "convert.single_file_names",
    "convert.unet_names",
    "training.start",
    "parsing",
    "commands",
    "cli",
}


def modules():
    """Dotted names within the package by path, without `__init__` and the entry points of `python -m`."""
    paths = [path for path in PACKAGE.rglob("*.py") if not path.stem.startswith("__")]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


MODULES = modules()


@cache
def statements(module, everywhere):
    """Those that import."""
    tree = ast.parse(MODULES[module].read_text())
    return [node for node in (ast.walk(tree) if everywhere else tree.body) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(module, everywhere=True):
    """(library, None) or (None, module of the package) for each import; `everywhere` also within functions."""
    for node in statements(module, everywhere):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], None
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] + ([node.module] if node.module else [])
            names = {".".join([*base, alias.name]) for alias in node.names}
            yield from ((None, name) for name in (names & MODULES.keys()) | ({".".join(base)} & MODULES.keys()))


def neighbours(module, everywhere=True):
    return {other for _, other in imports(module, everywhere) if other}


def folder(module):
    return module.split(".")[0]


def belongs(module, names):
    """Whether a module is one of the names, or in a folder of theirs."""
    return any(f"{module}.".startswith(f"{name}.") for name in names)


def test_every_folder_has_its_place():
    assert {folder(module) for module in MODULES} == {*ORDER, "schedulers"}


@pytest.mark.parametrize("name", ORDER)
def test_a_folder_imports_lower_folders_only(name):
    allowed = {name, "schedulers", *ORDER[: ORDER.index(name)]}  # which has nothing of its own
    found = {(module, other) for module in MODULES if folder(module) == name for other in neighbours(module)}
    assert {(module, other) for module, other in found if folder(other) not in allowed} == set()


def test_no_module_imports_itself_through_others():
    below = {module: neighbours(module) for module in MODULES}
    for module in MODULES:
        seen, left = set(), set(below[module])
        while left:
            seen.add(found := left.pop())
            left |= below[found] - seen
        assert module not in seen


def test_no_folder_has_more_modules_than_one_looks_through():
    counts = {}
    for path in MODULES.values():
        counts[path.parent.name] = counts.get(path.parent.name, 0) + 1
    assert {name: count for name, count in counts.items() if count > MAX_MODULES} == {}


@pytest.mark.parametrize("library", USERS)
def test_a_library_is_imported_by_few_modules(library):
    users = {module for module in MODULES if (library, None) in imports(module)}
    assert {module for module in users if not belongs(module, USERS[library])} == set()
    assert all(any(belongs(module, {name}) for module in users) for name in USERS[library])


@pytest.mark.parametrize("module", sorted(module for module in MODULES if belongs(module, WITHOUT_TORCH)))
def test_configuration_and_run_directory_need_no_torch(module):
    assert ("torch", None) not in imports(module, everywhere=False)
    assert {other for other in neighbours(module, everywhere=False) if not belongs(other, WITHOUT_TORCH)} == set()


@pytest.mark.parametrize(
    "other", ["tasks.pixels", "tasks.pixel_data", "tasks.unet", "data.images", "data.sources", "pipelines.pixel_pipeline"]
)
def test_the_training_loop_is_given_its_task(other):
    assert not {"training.trainer", "training.optimizer_step", "training.state_dicts", "training.saver"} & {
        module for module in MODULES if any(belongs(found, {other}) for found in neighbours(module))
    }


@pytest.mark.parametrize("library", ["diffusers", "accelerate", "PIL", "transformers", "peft"])
def test_the_mathematics_needs_tensors_alone(library):
    assert {module for module in MODULES if folder(module) == "diffusion" and (library, None) in imports(module)} == set()


@pytest.mark.parametrize("library", ["torch_fidelity", "matplotlib"])
def test_training_without_figures_does_not_wait_for_the_import_of(library):
    left, found = {"training.setup.build"}, set()
    while left:
        found.add(module := left.pop())
        left |= neighbours(module, everywhere=False) - found
    assert {"pipelines.pixel_pipeline", "data.sources.opening"} < found
    assert not {module for module in found if (library, None) in imports(module, everywhere=False)}


@pytest.mark.parametrize("library", ["transformers", "peft"])
def test_pixel_models_need_no_library_of_text_models(library):
    assert {module for module in MODULES if (library, None) in imports(module, everywhere=False)} == set()


@pytest.mark.parametrize("name", debias_diffusers.__all__)
def test_what_the_package_offers_is_there_and_only_imported_when_asked_for(name):
    assert callable(getattr(debias_diffusers, name))
    assert name not in vars(debias_diffusers)


def test_every_module_can_be_imported():
    for found in pkgutil.walk_packages(debias_diffusers.__path__, "debias_diffusers."):
        if not found.name.endswith(("__main__", "play.page")):  # whose library takes seconds: the nightly tests import it
            importlib.import_module(found.name)


@pytest.mark.row(40, "no line of the package runs code from files")
def test_nothing_in_the_package_runs_foreign_code():
    words = ("pickle", "eval(", "exec(", "yaml.load(", "weights_only=False", "shell=True", "extractall", "trust_remote_code")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        assert not [word for word in words if word in text.replace("allow_pickle", "").replace(".eval()", "")], path
