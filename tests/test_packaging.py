"""What an installed package has: commands, data files, types and completions."""

import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import PurePath

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

from debias_diffusers import cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = ROOT / "debias_diffusers"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lines(name):
    return [line for line in (ROOT / "constraints" / name).read_text().splitlines() if not line.startswith("#")]


def test_every_module_that_runs_is_a_command():
    commands = PYPROJECT["project"]["scripts"]
    assert all(callable(EntryPoint(name, target, "console_scripts").load()) for name, target in commands.items())
    modules = {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    named = {"push" if module == "hub" else module for module in modules}
    assert {f"debias-{name}" for name in named | {"train", "sample", "eval"}} == commands.keys()


def test_every_file_of_the_package_is_packaged():
    patterns = [
        f"{package.replace('.', '/')}/{pattern}"
        for package, each in PYPROJECT["tool"]["setuptools"]["package-data"].items()
        for pattern in each
    ]
    listed = subprocess.run(["git", "ls-files", "debias_diffusers"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [name for name in listed.stdout.splitlines() if not name.endswith(".py")]
    assert len(files) > 20
    assert [name for name in files if not any(PurePath(name).match(pattern) for pattern in patterns)] == []


@pytest.mark.nightly
def test_the_wheel_has_the_files_of_the_package_and_no_others(tmp_path):
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "clone"], check=True)  # what is committed, without an earlier build
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        tmp_path / "clone",
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    listed = subprocess.run(["git", "ls-files", "debias_diffusers"], cwd=tmp_path / "clone", capture_output=True, text=True, check=True)
    packaged = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert sorted(packaged) == sorted(listed.stdout.splitlines())


def test_the_lowest_constraints_are_the_bounds_of_the_package():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    required = [Requirement(text) for text in (*project["dependencies"], *extras["text"], *extras["tensorboard"])]
    pinned = {each.name: str(each.specifier) for each in map(Requirement, lines("lowest.txt"))}
    newest = {Requirement(line).name for line in lines("newest.txt")}
    for each in required:
        (bound,) = (str(one) for one in each.specifier if one.operator == ">=")
        assert f"{pinned[each.name]}.".startswith(bound.replace(">=", "==") + "."), each
        assert each.name in newest


@pytest.mark.parametrize("command", [["train"], ["sample"], ["evaluate", "score"]])
def test_bash_is_given_completions(command, tmp_path, capsys):
    function, *subcommand = command
    assert getattr(cli, function)([*subcommand, "--tyro-print-completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "--help" in script.read_text()


USE = """
import torch
from debias_diffusers import PixelPipeline, TrainConfig, loss_weight, make_objective, make_schedule, train

config: TrainConfig = TrainConfig()
steps: int = config.optimization.max_steps
alpha: torch.Tensor = make_schedule(config.objective).a
weights: torch.Tensor = loss_weight(object(), [1, 2], "debiased", p2_gamma=1.0)
"""


@pytest.mark.nightly
@pytest.mark.parametrize(("line", "mistakes"), [("", 0), ("wrong: str = config.optimization.max_steps\n", 1)])
def test_the_api_is_typed_for_those_who_use_it(line, mistakes, tmp_path):
    (tmp_path / "use.py").write_text(USE + line)
    skipped = [
        "torch",
        "numpy",
        "diffusers",
        "datasets",
        "accelerate",
        "transformers",
        "peft",
        "pyarrow",
        "tyro",
        "PIL",
        "huggingface_hub",
        "matplotlib",
        "rich",
    ]
    sections = "".join(f"[mypy-{library}.*]\nfollow_imports = skip\n" for library in skipped)  # to check them takes minutes
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = silent\n" + sections)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "use.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"})
    assert said.returncode == bool(mistakes), said.stdout + said.stderr
    assert said.stdout.count("error:") == mistakes
