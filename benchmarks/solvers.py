"""How far each solver's images are from the true distribution, where that is known, as steps grow.

    python benchmarks/solvers.py docs/solvers.png

The data are a mixture of two Gaussians in one dimension, for which the best network has a closed form, so that solvers err by
their steps alone. Draws a picture and prints a table in Markdown. `tests/test_solvers.py` holds solvers to their orders.
"""

import argparse
import inspect
import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.schema.types import SchedulerName
from debias_diffusers.diffusion.noise_schedule import Schedule, make_schedule, prediction_of_x_0
from debias_diffusers.pipelines.solvers import FLOW, SCHEDULERS, exported_scheduler, make_scheduler

WEIGHTS, MEANS, STDS = torch.tensor([[0.35, 0.65], [-0.5, 0.4], [0.15, 0.25]], dtype=torch.float64)
CLEAN = torch.tensor([1.0, 0.0], dtype=torch.float64)  # a and s

# What the error should fall with, as a power of the steps. That of UniPC, whose corrector adds one, was measured.
ORDERS: dict[SchedulerName, int] = {
    "ddpm": 1,
    "ddim": 1,
    "dpmsolver": 2,
    "dpmsolver++": 2,
    "dpmsolver++sde": 2,
    "unipc": 3,
    "heun": 2,
    "euler": 1,
    "euler_ancestral": 1,
    "flow_euler": 1,
    "flow_heun": 2,
}


def probability_below(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """(N,) distribution function of x_t = a x_0 + s noise."""
    return (WEIGHTS * torch.special.ndtr((x[:, None] - a * MEANS) / (a**2 * STDS**2 + s**2).sqrt())).sum(1)


def quantile(u: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """(N,) inverse of `probability_below`, by bisection."""
    low, high = torch.full_like(u, -60.0), torch.full_like(u, 60.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = probability_below(middle, a, s) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def expected_x_0(x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """(N,) the mean of x_0 given x_t, which is what the best network knows."""
    means, variances = a * MEANS, a**2 * STDS**2 + s**2
    share = (WEIGHTS.log() - variances.log() / 2 - (x_t[:, None] - means) ** 2 / (2 * variances)).softmax(1)
    return (share * (MEANS + a * STDS**2 / variances * (x_t[:, None] - means))).sum(1)


def equal_in_log_snr(schedule: Schedule, steps: int) -> list[int]:
    """Timesteps between which the logarithm of the SNR changes by the same, descending: steps of an equal length to solvers.

    Cosine schedules end with two decades of noise in a few levels, which are left out.
    """
    log_snr = schedule.snr.log()
    wanted = torch.linspace(max(log_snr[-1].item(), -12.0), log_snr[0].item(), steps + 1)
    return sorted({(log_snr - value).abs().argmin().item() for value in wanted}, reverse=True)


def solver_error(name: SchedulerName, objective: ObjectiveConfig, steps: int, equal: bool = True, count: int = 2000) -> float:
    """Root mean square distance between the quantiles of what a solver draws and those of the true distribution.

    Starts from the exact quantiles of noise, so that solvers of an ODE err at each of them by their steps alone; those with
    fresh noise have an error of chance of about 1 / sqrt(count) besides.
    """
    schedule, own = make_schedule(objective), exported_scheduler(objective)
    if name not in FLOW:
        own.register_to_config(clip_sample=False)
    timesteps = equal_in_log_snr(schedule, steps) if equal and name not in FLOW else None
    scheduler = make_scheduler(name, own, "linspace", steps, timesteps)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    first = noise_level(scheduler.timesteps[0], schedule, name)
    x_t = _solved(scheduler, schedule, objective, name, quantile(u, *first))
    ends_noisy = scheduler.config.get("final_sigmas_type") == "sigma_min"
    exact = quantile(u, *(schedule.a[0], schedule.s[0]) if ends_noisy else CLEAN)
    return (x_t.sort().values - exact)[count // 500 : count - count // 500].square().mean().sqrt().item()  # without the rarest


def noise_level(t: Tensor, schedule: Schedule, name: SchedulerName) -> tuple[Tensor, Tensor]:
    """a and s of a timestep."""
    if name in FLOW:
        return 1 - t.double() / len(schedule), t.double() / len(schedule)
    return schedule.a[int(t)], schedule.s[int(t)]


def _solved(scheduler, schedule: Schedule, objective: ObjectiveConfig, name: SchedulerName, x_t: Tensor) -> Tensor:
    x_t = x_t[:, None]
    draws = "generator" in inspect.signature(scheduler.step).parameters and name not in FLOW
    chance = {"generator": torch.Generator().manual_seed(0)} if draws else {}
    for t in scheduler.timesteps:
        a, s = noise_level(t, schedule, name)
        x_0 = expected_x_0(x_t[:, 0], a, s)[:, None]
        prediction = prediction_of_x_0(objective.prediction_type, x_0, x_t, a, s)
        x_t = scheduler.step(prediction, t, x_t, **chance).prev_sample
    return x_t[:, 0]


def objective_for(name: SchedulerName, T: int = 1000) -> ObjectiveConfig:
    """The digits' schedule, or a flow."""
    if name in FLOW:
        return ObjectiveConfig(prediction_type="flow", num_train_timesteps=T)
    return ObjectiveConfig(noise_schedule="linear", schedule_shift=64.0, num_train_timesteps=T)


def main() -> None:
    """Measures, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture")
    parser.add_argument("--count", type=int, default=100_000, help="images of each solver with fresh noise")
    options = parser.parse_args()
    figure = Figure(figsize=(12, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("10000 noise levels, steps equally long in log SNR", "1000 noise levels, spacing linspace (the default)")
    for panel, title, equal, T in zip(panels, titles, (True, False), (10_000, 1000)):
        table(panel, equal, T, options.count)
        panel.set(title=title, xscale="log", yscale="log", xlabel="calls of the network")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("error of quantiles, standard deviation of the data 0.48")
    panels[1].legend(fontsize=8)
    figure.savefig(options.picture, dpi=90)


def table(panel, equal: bool, T: int, count: int) -> None:
    """One line for each solver."""
    steps = (5, 10, 20, 40, 80)
    print(f"\n| solver | {' | '.join(map(str, steps))} steps | order |\n|---|{'---|' * (len(steps) + 1)}")
    for k, name in enumerate(SCHEDULERS):
        draws = name in ("ddpm", "dpmsolver++sde", "euler_ancestral")
        errors = [solver_error(name, objective_for(name, T), n, equal, count if draws else 2000) for n in steps]
        order = math.log2(errors[1] / errors[3]) / 2
        calls = [2 * n - 1 if "heun" in name else n for n in steps]
        panel.plot(
            calls, errors, marker="o", markersize=3, color=f"C{k}" if k < 10 else "black", linestyle="--" if draws else "-", label=name
        )
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in errors)} | {order:.1f} |")


if __name__ == "__main__":
    main()
