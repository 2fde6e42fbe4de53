"""The solvers under the name of their module in saved pipelines of older versions; see `debias_diffusers.pipelines.solvers`."""

# DiffusionPipeline.from_pretrained looks for SchedulerMixin beside the classes of a saved pipeline.
from .pipelines.solvers import DDIM, DDPM, EulerAncestral, Heun, SampleFlowMatchEuler, SampleFlowMatchHeun, SchedulerMixin, UniPC

__all__ = ["DDIM", "DDPM", "EulerAncestral", "Heun", "SampleFlowMatchEuler", "SampleFlowMatchHeun", "SchedulerMixin", "UniPC"]
