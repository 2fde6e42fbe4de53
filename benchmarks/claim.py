"""When does the debiased weight help? Weightings side by side on the digits, fixed beforehand.

    python benchmarks/claim.py runs/claim            # about two hours on two cores; the same command continues
    python benchmarks/claim.py runs/claim --quick    # one seed, the packaged shift only, under fifteen minutes

Trains constant, p2, min_snr and debiased with the packaged preset of the digits, at `schedule_shift` 64 with five seeds and at
1 and 16 with two. Equal seeds see equal images, timesteps and noise. Measured are the Frechet distance in the digits'
classifier and the bias of the mean brightness (grey levels of 255), of 1000 images of the averaged weights: over training steps
with the solver of the preset, and at the end over network evaluations with DDIM. Writes OUT/claim.md and OUT/claim.png.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
WEIGHTINGS = ("constant", "p2", "min_snr", "debiased")
SOLVER_STEPS = (5, 10, 20, 50)
EVALUATIONS = "ddim.json"  # in the folder of a run: the figures of its end over network evaluations
STUDENT = {2: 12.71, 5: 2.776}  # 97.5% quantile of Student's t by the number of seeds


@dataclass(frozen=True)
class Plan:
    """What is trained: seeds by shift, steps, and how often it is measured."""

    seeds: dict[int, range]
    steps: int
    every: int


FULL = Plan({64: range(5), 16: range(2), 1: range(2)}, steps=1500, every=375)
QUICK = Plan({64: range(1)}, steps=1000, every=250)


def run(*words: object) -> None:
    """One of our commands on one thread, so that several at a time take turns on nothing."""
    command = [sys.executable, *map(str, words), "--num_threads", "1"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SystemExit(f"{' '.join(map(str, command))}: {said[-1]}")


def train(folder: Path, shift: int, weighting: str, seed: int, plan: Plan) -> None:
    """One run with the packaged preset, and the figures of its end over network evaluations."""
    flags = {
        "output_dir": folder,
        "weighting": weighting,
        "schedule_shift": shift,
        "seed": seed,
        "max_steps": plan.steps,
        "eval_every": plan.every,
        "eval_images": 1000,
        "checkpoint_every": plan.steps,
        "sample_every": 0,
    }
    run(ROOT / "train.py", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    kept = folder / EVALUATIONS
    if not kept.exists():
        by_steps = ("--metrics", "fid,colour", "--num_images", 1000, "--schedulers", "ddim", "--steps", ",".join(map(str, SOLVER_STEPS)))
        run(ROOT / "eval.py", "score", folder, *by_steps, "--output", kept)


def measured(folder: Path) -> dict[int, tuple[float, float]]:
    """(distance, brightness bias) by training step."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: (line["eval_fid"], line["eval_brightness_bias"]) for line in lines if "eval_fid" in line}


def over_evaluations(folder: Path) -> dict[int, tuple[float, float]]:
    """(distance, brightness bias) of the finished run by steps of DDIM."""
    rows = json.loads((folder / EVALUATIONS).read_text())["targets"]
    return {row["steps"]: (row["fid"], row["brightness_bias"]) for row in rows}


Curves = dict[tuple[int, str], list[dict[int, tuple[float, float]]]]  # by shift and weighting, one for each seed


def table(curves: Curves, head: str) -> str:
    """Means over seeds with the lowest and the highest, for each place of the curves."""
    places = sorted(next(iter(curves.values()))[0])
    lines = [f"| shift | weighting | {' | '.join(f'{place} {head}' for place in places)} |", f"|---|---|{'---|' * len(places)}"]
    for (shift, weighting), seeds in curves.items():
        cells = []
        for place in places:
            values, bias = zip(*(seed[place] for seed in seeds))
            between = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{between}, bias {statistics.mean(bias):+.1f}")
        lines.append(f"| {shift} | {weighting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against_constant(curves: Curves, place: int) -> str:
    """Difference of the distance to that of the constant weight, seed by seed, with its 95% interval."""
    lines = ["| shift | weighting | difference of the distance (95% interval) | seeds |", "|---|---|---|---|"]
    for (shift, weighting), seeds in curves.items():
        if weighting == "constant":
            continue
        differences = [seed[place][0] - base[place][0] for seed, base in zip(seeds, curves[shift, "constant"])]
        mean, n = statistics.mean(differences), len(differences)
        width = STUDENT[n] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
        interval = f" ({mean - width:+.2f} to {mean + width:+.2f})" if n > 1 else ""
        lines.append(f"| {shift} | {weighting} | {mean:+.2f}{interval} | {n} |")
    return "\n".join(lines)


def picture(by_step: Curves, by_evaluation: Curves, path: Path) -> None:
    """Distance and bias over training steps and over network evaluations, a row for each shift."""
    shifts = list(dict.fromkeys(shift for shift, _ in by_step))
    figure = Figure(figsize=(16, 4 * len(shifts)), layout="constrained")
    panels = figure.subplots(len(shifts), 4, squeeze=False)
    for row, shift in zip(panels, shifts):
        for column, (curves, what) in enumerate(((by_step, 0), (by_step, 1), (by_evaluation, 0), (by_evaluation, 1))):
            panel = row[column]
            for k, weighting in enumerate(WEIGHTINGS):
                seeds = curves[shift, weighting]
                places = sorted(seeds[0])
                values = [[seed[place][what] for seed in seeds] for place in places]
                panel.plot(places, [statistics.mean(at) for at in values], marker="o", markersize=3, color=f"C{k}", label=weighting)
                panel.fill_between(places, [min(at) for at in values], [max(at) for at in values], color=f"C{k}", alpha=0.15)
            title = ("Frechet distance", "bias of the mean brightness")[what]
            panel.set(title=f"shift {shift}: {title}", xlabel="training step" if curves is by_step else "network evaluations (DDIM)")
            panel.grid(alpha=0.3)
            if what == 0:
                panel.set_yscale("log")
    panels[0][0].legend()
    figure.savefig(path, dpi=80)


def main() -> None:
    """Trains what is missing, measures, and writes tables and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, each with one thread")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    cases = [(shift, weighting, seed) for shift, seeds in plan.seeds.items() for seed in seeds for weighting in WEIGHTINGS]
    folders = {case: options.out / f"shift{case[0]}-{case[1]}-seed{case[2]}-{plan.steps}" for case in cases}
    with ThreadPoolExecutor(options.parallel) as pool:
        try:
            for done in as_completed([pool.submit(train, folders[case], *case, plan) for case in cases]):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the failure is said when all others are done, hours later
            raise
    by_step: Curves = {}
    by_evaluation: Curves = {}
    for shift, weighting, seed in cases:
        by_step.setdefault((shift, weighting), []).append(measured(folders[shift, weighting, seed]))
        by_evaluation.setdefault((shift, weighting), []).append(over_evaluations(folders[shift, weighting, seed]))
    parts = [
        f"Frechet distance (lowest to highest seed) and bias of the mean brightness over training steps:\n\n{table(by_step, 'steps')}",
        f"The same over network evaluations (DDIM), after {plan.steps} steps of training:\n\n{table(by_evaluation, 'evaluations')}",
        f"After {plan.steps} steps, seed by seed against the constant weight:\n\n{against_constant(by_step, plan.steps)}",
    ]
    text = "\n\n".join(parts) + "\n"
    (options.out / "claim.md").write_text(text)
    picture(by_step, by_evaluation, options.out / "claim.png")
    print(text)


if __name__ == "__main__":
    main()
