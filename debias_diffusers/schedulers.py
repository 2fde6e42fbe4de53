"""The solvers under the name that saved pipelines have for their module; they are in `debias_diffusers.pipelines.solvers`."""

from .pipelines.solvers import DDIM, DDPM, EulerAncestral, Heun, UniPC

__all__ = ["DDIM", "DDPM", "EulerAncestral", "Heun", "UniPC"]
