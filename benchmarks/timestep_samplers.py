"""How much each way to draw t lowers the variance of a step's loss, measured on a trained run.

    python benchmarks/timestep_samplers.py runs/digits

The losses of many images at every noise level are measured once with the run's averaged network. Then steps are drawn from
them as training would, with each sampler, and the mean losses of these steps are compared. Prints a table in Markdown.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from debias_diffusers.config.loading import layered, read_config, update
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.diffusion.loss import Objective, make_objective
from debias_diffusers.diffusion.noise_schedule import make_schedule
from debias_diffusers.diffusion.timestep_samplers import HISTORY, TimestepSampler, make_timestep_sampler
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.tasks.pixels import PixelTask

SAMPLERS = ("uniform", "stratified", "log_normal_corrected", "logit_normal_corrected", "loss_second_moment", "log_normal", "logit_normal")


@torch.no_grad()
def measured_losses(task: PixelTask, unet: torch.nn.Module, objective: Objective, draws: int) -> torch.Tensor:
    """(T, draws) weighted loss of random images and noise at each level."""
    columns = []
    network = task.network(unet, {"label": torch.zeros(len(objective.schedule), dtype=torch.long)}, "cpu")
    for k in range(draws):
        samples = [task.data[position] for position in range(k * len(objective.schedule), (k + 1) * len(objective.schedule))]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("image", "noise")}
        terms = objective(network, task.clean(batch, "cpu"), batch["noise"], torch.arange(len(objective.schedule)))
        columns.append(terms.loss.double())
    return torch.stack(columns, dim=1)


def step_means(sampler: TimestepSampler, losses: torch.Tensor, batch_size: int, steps: int) -> torch.Tensor:
    """(steps,) what each step would report as its loss."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(batch_size * steps, generator=generator, dtype=torch.float64)
    t = sampler.draw(u, range(batch_size * steps))
    which = torch.randint(losses.shape[1], (len(t),), generator=generator)
    return (losses[t, which] * sampler.corrections[t]).view(steps, batch_size).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draws", type=int, default=32, help="images per noise level")
    parser.add_argument("--steps", type=int, default=10_000)
    options = parser.parse_args()

    config = update(layered(read_config(str(options.run / "config.json"))), {"timestep_sampler": "uniform"})
    task = PixelTask(config, open_source(config.data))
    losses = measured_losses(task, load_pipeline(str(options.run)).unet.eval(), make_objective(config.objective), options.draws)
    batch_size = config.optimization.batch_size
    print("| timestep_sampler | mean loss of a step | standard deviation | variance, of that of uniform |\n|---|---|---|---|")
    baseline = 0.0
    for name in SAMPLERS:
        sampler = make_timestep_sampler(
            dataclasses.replace(config.objective, timestep_sampler=name), make_schedule(config.objective), batch_size
        )
        if sampler.learns:
            sampler.update(torch.arange(len(losses)).repeat(HISTORY), losses[:, :HISTORY].T.flatten())
        means = step_means(sampler, losses, batch_size, options.steps)
        baseline = baseline or means.var().item()
        ratio = f"{means.var().item() / baseline:.3g}" if sampler.corrected else "another objective"
        print(f"| {name} | {means.mean():.4g} | {means.std():.3g} | {ratio} |")


if __name__ == "__main__":
    main()
