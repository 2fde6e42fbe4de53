"""What a run says of itself to others: the model card in its directory."""

from __future__ import annotations

import yaml

from .config import ObjectiveConfig, TrainConfig, stored
from .rules import SPACES_OF_OTHERS


def model_card(config: TrainConfig, step: int, num_classes: int) -> str:
    """README.md of a run: what was trained, how to draw with it, and every field of the configuration."""
    objective = config.objective
    front = yaml.safe_dump({"library_name": "diffusers", "tags": ["debias_diffusers", objective.weighting, objective.prediction_type]})
    how = (
        "from debias_diffusers import PixelPipeline\n\n"
        'pipeline = PixelPipeline.from_pretrained("PATH")\n'
        f"image = pipeline(class_labels=[0]).images[0]  # labels 0 to {num_classes - 1}"
        if num_classes
        else "from diffusers import DDPMPipeline\n\n"
        'pipeline = DDPMPipeline.from_pretrained("PATH")\n'
        "image = pipeline(num_inference_steps=1000).images[0]"
    )
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in stored(config).items())
    return f"""---
{front}---

# A diffusion model trained with debias_diffusers

Step {step} of {config.optimization.max_steps}; the weights are averaged at the rate {config.optimization.ema_decay[0]}.
{_objective(objective)}

```python
{how}
```

## Configuration

| field | value |
|---|---|
{rows}
"""


def _objective(objective: ObjectiveConfig) -> str:
    """What was minimised, in sentences; its numbers stand in the table."""
    space, name = objective.prediction_type, objective.weighting
    if name == "variational":
        sentences = [f"The network predicts {space} and a variance; the variational bound was minimised, without weights."]
    elif name in SPACES_OF_OTHERS:
        sentences = [f"The squared error of the network's {space} is weighted with {_cell(name)}, as other code has it."]
    else:
        sentences = [
            f"The squared error of the network's {space} is weighted with {_cell(name)}, a weight defined on the error of the noise and "
            f"converted to what the network predicts."
        ]
    if name == "debiased":
        sentences.append("`debiased` is 1/sqrt(SNR), from arXiv 2310.08442.")
    if objective.timestep_sampler in ("log_normal", "logit_normal"):
        sentences.append(
            f"t was drawn with the density `{objective.timestep_sampler}` (mean {objective.timestep_mean}, standard deviation "
            f"{objective.timestep_std}) without correction, so the objective is multiplied by this density."
        )
    if objective.learn_sigma and name != "variational":
        sentences.append("The variance of a sampling step is learned by the variational bound.")
    return "\n".join(sentences)


def _cell(value: object) -> str:
    """As code, in which no markup counts: a name of a data set may hold any, and what ends the line, the cell, or the code."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'").replace("|", "\\|").strip()
    return f"`{text}`" if text else ""
