"""Loss weightings side by side on the captioned digits: how many images show the digit of their prompt, and how far they are from the data.

    pip install -e ".[text]"
    python benchmarks/text_weightings.py runs/text_weightings          # about half an hour on two cores; the same command continues

Trains `--config digits_text` (v prediction, 1000 steps of 64) with each weighting and three seeds, all else equal, and scores the
exported weights with `eval.py score`: prompt_accuracy and the Frechet distance of the digits' classifier, 500 images at guidance 1
and 2, unipc with 20 steps. Writes OUT/text_weightings.md.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from defaults import ROOT, run

WEIGHTINGS = ("debiased", "constant", "min_snr")
SEEDS = 3
GUIDANCE = (1, 2)
IMAGES = 500
ONE_THREAD = ("--num_threads", 1)  # so that several run side by side


def measured(out: Path, weighting: str, seed: int) -> dict[int, dict[str, float]]:
    """Trains, and scores; the figures by guidance scale."""
    folder = out / f"{weighting}-seed{seed}"
    usual = ("--config", "digits_text", "--sample_every", 0, *ONE_THREAD)
    run(ROOT / "train.py", *usual, "--weighting", weighting, "--seed", seed, "--output_dir", folder)
    found = {}
    for scale in GUIDANCE:
        scores = folder / f"scores-{scale}.json"
        if not scores.exists():
            flags = ("--metrics", "fid,prompt_accuracy", "--num_images", IMAGES, "--guidance_scale", scale, "--output", scores)
            run(ROOT / "eval.py", "score", folder, *flags, *ONE_THREAD)
        (found[scale],) = json.loads(scores.read_text())["targets"]
    return found


def main() -> None:
    """Trains what is missing, measures, and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread")
    options = parser.parse_args()
    cases = [(weighting, seed) for seed in range(SEEDS) for weighting in WEIGHTINGS]
    with ThreadPoolExecutor(options.parallel) as pool:
        found = dict(zip(cases, pool.map(lambda case: measured(options.out, *case), cases)))
    lines = ["| weighting | guidance | prompts met, each seed | mean | Frechet distance, each seed | mean |", "|---|---|---|---|---|---|"]
    for weighting in WEIGHTINGS:
        for scale in GUIDANCE:
            rows = [found[weighting, seed][scale] for seed in range(SEEDS)]
            met, distances = ([row[name] for row in rows] for name in ("prompt_accuracy", "fid"))
            each, far = ", ".join(f"{value:.3f}" for value in met), ", ".join(f"{value:.2f}" for value in distances)
            lines.append(f"| {weighting} | {scale} | {each} | {statistics.mean(met):.3f} | {far} | {statistics.mean(distances):.2f} |")
    text = "\n".join(lines) + "\n"
    (options.out / "text_weightings.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
