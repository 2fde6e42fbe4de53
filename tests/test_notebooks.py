"""The notebooks: valid, small, and made of public names; nightly they are executed."""

import ast
import importlib.util
import re
import shutil

import nbformat
import pytest
from conftest import ROOT

import debias_diffusers

FOLDER = ROOT / "notebooks"
NAMES = ["first_steps", "objective"]
PUBLIC = {*debias_diffusers.__all__, "cli"}
MAX_BYTES = 1_000_000  # with their outputs


def test_every_notebook_is_tested():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_has_outputs_without_an_error(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < MAX_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "execute it from a new kernel"
    assert any(output.output_type == "display_data" for cell in code for output in cell.outputs)
    assert [output for cell in code for output in cell.outputs if output.output_type == "error"] == []
    assert re.findall(r"/home/\w+|/tmp/\w+|site-packages", path.read_text()) == []  # of the machine that executed it


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_parses_and_imports_public_names_that_exist(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    tree = ast.parse("\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    for node in ast.walk(tree):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module]
            if node.module.startswith("debias_diffusers"):
                assert node.module == "debias_diffusers"
                assert {alias.name for alias in node.names} <= PUBLIC
        packages = {module.partition(".")[0] for module in modules}  # to look into one would import it
        assert [package for package in packages if importlib.util.find_spec(package) is None] == []
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links and [link for link in links if not (FOLDER / link).exists()] == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path))  # else a cache of features that an earlier run left would spare some of the work
    shutil.copy(FOLDER / f"{name}.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()  # raises what a cell raises
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    assert len(pictures) >= 5
    assert (tmp_path / "runs").is_dir()
