"""What several tests use: the repository's root, the tiny configuration, and commands in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "tiny.yaml"
GOLDEN = ROOT / "tests" / "golden"

# No test may use the network; a library that tries gets an error at once.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONUNBUFFERED": "1"}
os.environ.update(OFFLINE)


def command(*args, **env):
    """Starts `python ARGS` in the repository's root."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*args, **env):
    """Runs `python ARGS` to its end; returns (exit code, stdout, stderr)."""
    process = command(*args, **env)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def train_args(output_dir, *flags):
    return ["train.py", "--config", TINY, "--output_dir", output_dir, *flags]


def metrics(run_dir):
    """Lines of metrics.jsonl without what depends on the time."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


def tensors(run_dir, step):
    """The bytes of every tensor file of a checkpoint."""
    folder = Path(run_dir) / "checkpoints" / f"step-{step:08d}"
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """An uninterrupted tiny run of 24 steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = run(*train_args(folder))
    assert code == 0, err
    return folder


@pytest.fixture(scope="session")
def trained_by_class(tmp_path_factory):
    """A tiny class-conditional run."""
    folder = tmp_path_factory.mktemp("runs") / "classes"
    code, _, err = run(*train_args(folder, "--class_conditional", "--max_steps", 6))
    assert code == 0, err
    return folder
