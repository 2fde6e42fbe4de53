"""Seconds until a command answers: its help, a mistake in it, the import of what it needs, the first step of the digits.

    python benchmarks/startup.py [--rounds 5] [--json FILE]

Each is a process of its own, all in turn; the table has medians. What the operating system reads for the first time takes longer:
one round before the others does not count.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROWS = {
    "python": ["-c", ""],
    "train.py --help": ["train.py", "--help"],
    "sample.py --help": ["sample.py", "--help"],
    "eval.py --help": ["eval.py", "--help"],
    "train.py with a mistake": ["train.py", "--batch_size", "0"],
    "import debias_diffusers": ["-c", "import debias_diffusers"],
    "import torch": ["-c", "import torch"],
    "import what train.py needs": ["-c", "import debias_diffusers.training.trainer"],
    "import what sample.py needs": ["-c", "import debias_diffusers.sampling.generate"],
    "train.py, one step of the digits, saved": ["train.py", "--max_steps", "1", "--warmup_steps", "0", "--output_dir", "FOLDER"],
}


def seconds(arguments: list[str]) -> float:
    """How long a command takes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(argument.replace("FOLDER", f"{folder}/run") for argument in arguments)]
        begun = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True)
        return time.perf_counter() - begun


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()
    measured = [{name: seconds(arguments) for name, arguments in ROWS.items()} for _ in range(options.rounds + 1)][1:]
    rows = {name: statistics.median(turn[name] for turn in measured) for name in ROWS}
    print("| | seconds |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} |")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
