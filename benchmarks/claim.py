"""When does the debiased weight help? Weightings side by side on data sets of the package; the plan is docs/claim_plan.md.

    python benchmarks/claim.py runs/claim --data emoji --list                 # the units in order of priority, and which are there
    python benchmarks/claim.py runs/claim --data emoji --jobs 2               # the same command continues
    python benchmarks/claim.py runs/claim --data emoji --only NAME [NAME...]  # some of them
    python benchmarks/claim.py runs/claim --data emoji --table                # only the table and the plot of the units that are there

A unit is a training and its evaluations: its figures are OUT/units/NAME.json, so that units of several machines are merged by
copying these files; its run directory is OUT/runs/NAME. A unit that is there is skipped, one that was killed is resumed. Equal seeds
see equal images, timesteps and noise. On a CUDA device: --mixed_precision bf16 --compile, and --jobs 4 or more for small networks.
Writes OUT/claim-DATA.md and OUT/claim-DATA.png.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5% quantile of Student's t by the number of seeds
TRIAL = 100  # --trial divides the numbers of steps by it


@dataclass(frozen=True)
class Scores:
    """Images of a finished run: which weights of which checkpoints, with which numbers of DDIM steps."""

    kind: str
    weights: str
    checkpoints: tuple[int, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """A training with its evaluations."""

    name: str
    group: str  # what is compared has the same
    variant: str
    seed: int
    flags: dict[str, object]  # of train.py, beside those of the data set
    scores: tuple[Scores, ...]


@dataclass(frozen=True)
class Plan:
    """What is equal for all units of a data set."""

    flags: dict[str, object]
    metrics: str
    images: int
    score_flags: dict[str, object]
    units: tuple[Unit, ...]


# ---- the plan --------------------------------------------------------------------------------------------------------


def emoji_units() -> tuple[Unit, ...]:
    """In order of priority: the two weights of the claim first."""
    shifts = (16, 1)  # (64 / side)^2, and the schedule as it is
    core = [(shift, weighting, seed) for seed in range(3) for shift in shifts for weighting in ("constant", "debiased")]
    others = [(shift, weighting, seed) for shift in shifts for seed in range(3) for weighting in ("min_snr", "sigmoid")]
    more = [(shift, w, seed) for seed in (3, 4) for shift in shifts for w in ("constant", "debiased", "min_snr", "sigmoid")]
    last = [(16, weighting, seed) for seed in range(3) for weighting in ("p2", "v")]
    scores = (
        Scores("training", "ema", (500, 1000, 2000), (50,)),
        Scores("raw", "raw", (2000,), (50,)),
        Scores("sampling", "ema", (2000,), (5, 10, 20)),
    )
    return tuple(
        Unit(
            f"emoji-shift{shift}-{weighting}-seed{seed}",
            f"shift {shift}",
            "v on v_prediction" if weighting == "v" else weighting,
            seed,
            {"schedule_shift": shift, "weighting": weighting, "prediction_type": "v_prediction" if weighting == "v" else "epsilon"},
            scores,
        )
        for shift, weighting, seed in (*core, *others, *more, *last)
    )


def digits_units() -> tuple[Unit, ...]:
    """Longer training in two regimes of the learning rate."""
    regimes = {"constant4e-4": ("constant", 4e-4), "cosine1e-3": ("cosine", 1e-3)}
    scores = (
        Scores("training", "ema", tuple(range(500, 4001, 500)), (50,)),
        Scores("raw", "raw", (2000, 4000), (50,)),
        Scores("ema 0.999", "0.999", (2000, 4000), (50,)),
        Scores("sampling", "ema", (4000,), (5, 10, 20)),
    )
    return tuple(
        Unit(
            f"digits-{regime}-{weighting}-seed{seed}",
            f"lr {rate:g} {schedule}",
            weighting,
            seed,
            {"weighting": weighting, "lr_schedule": schedule, "learning_rate": rate},
            scores,
        )
        for seed in range(3)
        for regime, (schedule, rate) in regimes.items()
        for weighting in ("constant", "debiased")
    )


def digits_text_units() -> tuple[Unit, ...]:
    """Captioned digits, in the latents of the packaged base model."""
    scores = (Scores("training", "ema", (500, 1000), (50,)), Scores("sampling", "ema", (1000,), (5, 10, 20)))
    return tuple(
        Unit(f"digits_text-{weighting}-seed{seed}", "v_prediction", weighting, seed, {"weighting": weighting}, scores)
        for seed in range(3)
        for weighting in ("constant", "debiased", "min_snr", "sigmoid")
    )


PLANS = {
    "emoji": Plan(  # half the channels and the batch of the packaged configuration: a CPU thread trains that in minutes
        {"model_channels": 32, "batch_size": 64, "max_steps": 2000, "checkpoint_every": 500},
        "fid,swd,colour,channel_bias",
        500,
        {},
        emoji_units(),
    ),
    "digits": Plan(
        {"max_steps": 4000, "checkpoint_every": 500, "ema_decay": (0.995, 0.999)},
        "fid,swd,colour",
        1000,
        {},
        digits_units(),
    ),
    "digits_text": Plan(
        {"max_steps": 1000, "checkpoint_every": 500},
        "fid,swd,colour,prompt_accuracy",
        500,
        {"guidance_scale": 2},
        digits_text_units(),
    ),
}


# Flags that are no part of the plan. All checkpoints are kept: what an interruption saves would push out one that is to be scored.
USUAL: dict[str, object] = {"sample_every": 0, "num_threads": 1, "keep_checkpoints": 100}


# ---- running ---------------------------------------------------------------------------------------------------------


def run(*words: object) -> None:
    """A python command; raises SystemExit with its last line if it fails."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SystemExit(f"{' '.join(map(str, command))}: {said[-1]}")


def words_of(flags: dict[str, object]) -> list[str]:
    """Flags as they are typed; a flag of a list has several values, and one that is on has none."""
    found: list[str] = []
    for name, value in flags.items():
        found += [f"--{name}", *([] if value is True else map(str, value if isinstance(value, tuple) else (value,)))]
    return found


def compute(unit: Unit, plan: Plan, data: str, out: Path, of_device: dict[str, object], trial: bool) -> None:
    """Trains and evaluates a unit in this process, and writes its figures."""
    import torch

    sys.path.insert(0, str(ROOT))
    from debias_diffusers import __version__, cli

    def command(function: object, *words: str) -> None:
        if code := function(list(words)):  # type: ignore[operator]
            raise SystemExit(code)  # why it ended has been printed

    started = time.perf_counter()
    shorter = TRIAL if trial else 1
    flags = plan.flags | unit.flags | of_device | {"seed": unit.seed}
    flags |= {name: int(flags[name]) // shorter for name in ("max_steps", "checkpoint_every")}  # type: ignore[call-overload]
    folder = out / "runs" / unit.name
    command(cli.train, "--config", data, *words_of(USUAL | flags | {"output_dir": folder}))
    trained = time.perf_counter() - started
    rows, images = [], 100 if trial else plan.images
    for scores in unit.scores:
        kept = folder / f"scores-{scores.kind.replace(' ', '-')}.json"
        if not kept.exists():
            how = {
                "checkpoints": ",".join(str(step // shorter) for step in scores.checkpoints),
                "weights": scores.weights,
                "schedulers": "ddim",
                "steps": ",".join(map(str, scores.steps)),
                "metrics": plan.metrics,
                "num_images": images,
                "batch_size": 500 if torch.cuda.is_available() else 100,
                "num_threads": 1,
                "output": kept,
            }
            command(cli.evaluate, "score", str(folder), *words_of(how | plan.score_flags))
        scored = json.loads(kept.read_text())
        rows += [{name: value for name, value in row.items() if name != "target"} | {"kind": scores.kind} for row in scored["targets"]]
    cuda = torch.cuda.is_available()
    record = {
        "unit": unit.name,
        "group": unit.group,
        "variant": unit.variant,
        "seed": unit.seed,
        "trial": trial,
        "flags": flags,
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.processor() or platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "debias_diffusers": __version__,
        "training_seconds": round(trained, 1),  # of the start that finished the unit
        "evaluation_seconds": round(time.perf_counter() - started - trained, 1),
        "halves_of_the_reference": scored["halves_of_the_reference"],
        "rows": rows,
    }
    path = figures_of(unit, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".part").rename(path)


def figures_of(unit: Unit, out: Path) -> Path:
    """Where the figures of a unit are."""
    return out / "units" / f"{unit.name}.json"


def compute_all(units: list[Unit], options: argparse.Namespace, more: list[str]) -> None:
    """Each unit in a process of its own, some at a time; a failure ends the others that wait."""
    start = (Path(__file__), options.out, "--data", options.data, "--jobs", 1, *more, "--only")
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = {pool.submit(run, *start, unit.name): unit for unit in units}
        try:
            for done in as_completed(waiting):
                done.result()
                print(f"{waiting[done].name} is there", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or the failure is said when all others are done, hours later
            raise


# ---- table and plot --------------------------------------------------------------------------------------------------


def bias_of(row: dict[str, float]) -> float:
    """The bias of the mean colour: the mean of the absolute biases of the channels, of grey images that of the brightness."""
    channels = [abs(row[name]) for name in ("red_bias", "green_bias", "blue_bias") if name in row]
    return statistics.mean(channels or [abs(row["brightness_bias"])])


FIGURES = {
    "distance": lambda row: row["fid"],
    "bias": bias_of,
    "colour distance": lambda row: row["colour_distance"],
    "sliced Wasserstein": lambda row: row["swd"],
}
Records = dict[tuple[str, str], list[dict]]  # by group and variant, one for each seed that is there


def rows_at(record: dict, over: str) -> dict[int, dict[str, float]]:
    """Rows by training step, or those of the end by DDIM steps."""
    training = {row["checkpoint"]: row for row in record["rows"] if row["kind"] == "training"}
    if over == "training":
        return training
    return {row["steps"]: row for row in (*(row for row in record["rows"] if row["kind"] == "sampling"), training[max(training)])}


def spread(values: list[float]) -> str:
    """The mean, and from the lowest to the highest."""
    return f"{statistics.mean(values):.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def table(found: Records, over: str, head: str) -> str:
    """Distance and bias over training or sampling."""
    places = sorted(rows_at(next(iter(found.values()))[0], over))
    lines = [f"| | weighting | seeds | {' | '.join(f'{place} {head}' for place in places)} |", f"|---|---|---|{'---|' * len(places)}"]
    for (group, variant), records in found.items():
        at = [[rows_at(record, over)[place] for record in records] for place in places]
        cells = [f"{spread([row['fid'] for row in rows])}, bias {statistics.mean(map(bias_of, rows)):.1f}" for rows in at]
        lines.append(f"| {group} | {variant} | {len(records)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def end_table(found: Records) -> str:
    """Every figure at the end of the training with the most DDIM steps, for each kind of weights."""
    kinds = list(dict.fromkeys(row["kind"] for records in found.values() for row in records[0]["rows"] if row["kind"] != "sampling"))
    known = ("fid", "swd", "brightness_bias", "colour_distance", "red_bias", "green_bias", "blue_bias", "prompt_accuracy")
    names = [name for name in known if name in next(iter(found.values()))[0]["rows"][0]]
    lines = [f"| | weighting | weights | {' | '.join(name.replace('_', ' ') for name in names)} |", f"|---|---|---|{'---|' * len(names)}"]
    for (group, variant), records in found.items():
        for kind in kinds:
            last = [max((row for row in record["rows"] if row["kind"] == kind), key=lambda row: row["checkpoint"]) for record in records]
            cells = [f"{statistics.mean(row[name] for row in last):.4g}" for name in names]
            lines.append(f"| {group} | {variant} | {'ema' if kind == 'training' else kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(found: Records, group: str, variant: str, place: int, figure: str) -> tuple[str, bool]:
    """The mean difference to the constant weight of the same seeds with its 95% interval, and whether the plan lets it be a result.

    That is: at least three seeds, an interval without 0, and one sign in all seeds, which with five or more does not follow from it.
    """
    base = {record["seed"]: record for record in found.get((group, "constant"), [])}
    apart = [
        FIGURES[figure](rows_at(record, "training")[place]) - FIGURES[figure](rows_at(base[record["seed"]], "training")[place])
        for record in found[group, variant]
        if record["seed"] in base
    ]
    if len(apart) < 2:
        return f"{apart[0]:+.2f}" if apart else "-", False
    mean, width = statistics.mean(apart), STUDENT[len(apart)] * statistics.stdev(apart) / math.sqrt(len(apart))
    one_sign = min(apart) > 0 or max(apart) < 0
    said = f"{mean:+.2f} ({mean - width:+.2f} to {mean + width:+.2f}), {len(apart)} seeds"
    return said, len(apart) >= 3 and abs(mean) > width and one_sign


def against_constant(found: Records) -> str:
    """Differences at each training step; results at the end, where the plan decides, are bold."""
    places = sorted(rows_at(next(iter(found.values()))[0], "training"))
    lines = [f"| | weighting | of | {' | '.join(f'{place} steps' for place in places)} |", f"|---|---|---|{'---|' * len(places)}"]
    for group, variant in found:
        for figure in FIGURES if variant != "constant" else ():
            cells = [difference(found, group, variant, place, figure) for place in places]
            said = [f"**{cell}**" if result and place == places[-1] else cell for place, (cell, result) in zip(places, cells)]
            lines.append(f"| {group} | {variant} | {figure} | {' | '.join(said)} |")
    return "\n".join(lines)


def chance(found: Records) -> str:
    """How many of the comparisons that the plan decides are results, and how many would be if no weight made a difference.

    Two weights that are one by another name, as p2 and sigmoid are with their defaults, count once.
    """
    place = max(rows_at(next(iter(found.values()))[0], "training"))
    ends: dict[tuple[str, str], set[tuple[float, ...]]] = {}  # by group and variant: seed and figures of each record
    twice = ""
    for (group, variant), records in found.items():
        if variant == "constant" or len(records) < 3:
            continue
        figures = {(record["seed"], *(of(rows_at(record, "training")[place]) for of in FIGURES.values())) for record in records}
        same = [other for (of_group, other), earlier in ends.items() if of_group == group and figures <= earlier]
        if same:
            twice += f" ({variant} has the figures of {same[0]} and is not counted)"
        else:
            ends[group, variant] = figures
    decided = [difference(found, *compared, place, figure)[1] for compared in ends for figure in FIGURES]
    if not decided:
        return "Of fewer than three seeds the plan decides nothing."
    return (
        f"At the end, {sum(decided)} of {len(decided)} comparisons are results by the plan's rule{twice}; if no weight made a "
        f"difference, {0.05 * len(decided):.1f} would be. Only with five or more seeds does one sign in all of them ask for more than "
        "an interval without 0."
    )


def picture(found: Records, path: Path) -> None:
    """Distance, bias and colour distance over training steps, and the distance over DDIM steps; a row for each group."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    groups = list(dict.fromkeys(group for group, _ in found))
    colours = {variant: f"C{k}" for k, variant in enumerate(dict.fromkeys(variant for _, variant in found))}
    figure = Figure(figsize=(16, 4 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 4, squeeze=False)
    for line, group in zip(panels, groups):
        columns = [*(("training", what) for what in ("distance", "bias", "colour distance")), ("sampling", "distance")]
        for panel, (over, what) in zip(line, columns):
            for variant in (variant for each, variant in found if each == group):
                rows = [rows_at(record, over) for record in found[group, variant]]
                places = sorted(rows[0])
                values = [[FIGURES[what](row[place]) for row in rows] for place in places]
                panel.plot(places, list(map(statistics.mean, values)), marker="o", markersize=3, color=colours[variant], label=variant)
                panel.fill_between(places, list(map(min, values)), list(map(max, values)), color=colours[variant], alpha=0.15)
            title = {"distance": "Frechet distance", "bias": "bias of the mean colour", "colour distance": "colour distance"}[what]
            panel.set(title=f"{group}\n{title}", xlabel="training step" if over == "training" else "DDIM steps")
            if what != "bias":
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter(LogFormatter())
                panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # 5 in place of 5 x 10^0
            else:
                panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    panels[0][0].legend()
    figure.savefig(path, dpi=80)


def report(data: str, out: Path, trial: bool) -> str:
    """Tables of the units that are there, and which are missing; writes them and the plot."""
    units = PLANS[data].units
    found: Records = {}
    for unit in sorted(units, key=lambda unit: [each.group for each in units].index(unit.group)):
        path = figures_of(unit, out)
        record = json.loads(path.read_text()) if path.exists() else {"trial": not trial}
        if record["trial"] == trial:
            found.setdefault((unit.group, unit.variant), []).append(record)
    there = {record["unit"] for records in found.values() for record in records}
    missing = [unit.name for unit in units if unit.name not in there]
    if not found:
        raise SystemExit(f"{out / 'units'} has no figures of {data}")
    every = [record for records in found.values() for record in records]
    made = sorted({f"{record['device']}, torch {record['torch']}" for record in every})
    seconds = statistics.median(record["training_seconds"] + record["evaluation_seconds"] for record in every)
    halves = every[0]["halves_of_the_reference"]["fid"]
    parts = [
        f"{len(there)} of {len(units)} units, on {'; '.join(made)}; {seconds:.0f} seconds for one (median). "
        f"Missing: {', '.join(missing) or 'none'}. Two halves of the data are at a distance of {halves:.1f}.",
        f"Frechet distance (lowest to highest seed) and bias of the mean colour over training steps, DDIM-50:\n\n"
        f"{table(found, 'training', 'steps')}",
        f"The same over DDIM steps, at the end of the training:\n\n{table(found, 'sampling', 'steps')}",
        f"Differences to the constant weight, seed by seed, with 95% intervals; results by the plan's rule are bold:\n\n"
        f"{against_constant(found)}",
        chance(found),
        f"All figures at the end of the training, DDIM-50, means over seeds:\n\n{end_table(found)}",
    ]
    text = "\n\n".join(parts) + "\n"
    (out / f"claim-{data}.md").write_text(text)
    picture(found, out / f"claim-{data}.png")
    return text


def main() -> None:
    """Computes what is missing, and writes tables and a plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", choices=PLANS, default="emoji")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="units to compute; all if left out")
    parser.add_argument("--list", action="store_true", help="list the units in order of priority, and which are there")
    parser.add_argument("--table", action="store_true", help="compute nothing")
    parser.add_argument("--jobs", type=int, default=1, help="units at a time, each with one CPU thread")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no", help="for a CUDA device")
    parser.add_argument("--compile", action="store_true", help="compile the network with CUDA graphs, for a CUDA device")
    parser.add_argument(
        "--trial", action="store_true", help=f"numbers of steps divided by {TRIAL}, 100 images: does it work? In another OUT"
    )
    options = parser.parse_args()
    plan = PLANS[options.data]
    if unknown := set(options.only or ()) - {unit.name for unit in plan.units}:
        parser.error(f"--only {sorted(unknown)[0]} is no unit of {options.data}; --list shows them")
    wanted = [unit for unit in plan.units if unit.name in (options.only or {unit.name})]
    if options.list:
        print("\n".join(f"{unit.name}{'  there' if figures_of(unit, options.out).exists() else ''}" for unit in wanted))
        return
    units = [unit for unit in wanted if not figures_of(unit, options.out).exists()]
    if units and not options.table:
        of_device: dict[str, object] = {"mixed_precision": options.mixed_precision}
        of_device |= {"compile": True, "compile_mode": "reduce-overhead"} if options.compile else {}
        if len(wanted) == 1:
            compute(units[0], plan, options.data, options.out, of_device, options.trial)
            return
        more = ["--mixed_precision", options.mixed_precision, *["--compile"] * options.compile, *["--trial"] * options.trial]
        compute_all(units, options, more)
    print(report(options.data, options.out, options.trial))


if __name__ == "__main__":
    main()
