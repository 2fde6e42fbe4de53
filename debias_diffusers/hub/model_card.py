"""The model card of a run (README.md): how to load the model, what was trained on which data, metrics, licence. No torch."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.hub_names import COMMIT, split_revision
from ..config.loading import is_text, stored
from ..config.registry import DEFAULT_FLOW_SOLVER, DEFAULT_SOLVER, TIMESTEP_BIASES, TIMESTEP_SAMPLERS, WEIGHTINGS, WeightingSpec
from ..config.schema.data import DIGITS, EMBEDDED, EMOJI
from ..config.schema.objective import NoiseConfig, ObjectiveConfig, is_straight, needs_own_scheduler
from ..config.schema.training import TrainConfig
from ..runs.lora_folder import BASE_RECORD, LORA_WEIGHTS

TITLE = "# A diffusion model trained with debias_diffusers"
TASK, TEXT_TASK = "unconditional-image-generation", "text-to-image"
ON_HUB = re.compile(rf"([\w-][\w.-]*/)?[\w-][\w.-]*@{COMMIT.pattern}", re.ASCII)  # user/name@commit
UNKNOWN = "unknown"  # the Hub's identifier for a licence that is not given
MAX_CLASSES = 1000  # rows of the table of classes
STEP = re.compile(r"^Step ([0-9]+) of [0-9]+; the weights are ", re.MULTILINE)
PLACEHOLDER = '"PATH"'  # `published` replaces it with the name of the repository

CITATION = """```bibtex
@article{yu2023unmasking,
  title   = {Unmasking Bias in Diffusion Model Training},
  author  = {Yu, Hu and Shen, Li and Huang, Jie and Li, Hongsheng and Zhao, Feng},
  journal = {arXiv preprint arXiv:2310.08442},
  year    = {2023}
}
```"""


def model_card(
    config: TrainConfig,
    step: int,
    num_classes: int,
    images: int | None = None,
    measured: Mapping[str, Any] | None = None,
    classes: Mapping[str, int] | None = None,
    own_scheduler: bool = False,
) -> str:
    """README.md of a run: what was trained, how to load and sample the model, metrics, and every field of the configuration.

    Args:
        config: of the run.
        step: of the checkpoint.
        num_classes: number of class labels; 0 for an unconditional model.
        images: number of training images.
        measured: the last evaluation as in state.json: `step`, `by` (extractor, number of images) and `figures` (metrics by name).
        classes: number of images of each class by its name, in the order of the labels.
        own_scheduler: whether a LoRA is drawn with another scheduler than its base model has.
    """
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in stored(config).items())
    return f"""---
{_front(config, measured)}
---

{TITLE}

Step {step} of {config.optimization.max_steps}; the weights are {_averaged(config.optimization.ema_decay[0])}.
{_objective(config.objective)}{_noise(config.noise)}
{_data(config, images)}

## Use it

```python
{_use_text(config) if is_text(config) else _use(num_classes, config.objective, classes)}
```
{_text_notes(config, own_scheduler) if is_text(config) else _others(num_classes, config.objective)}
or, with debias_diffusers installed, `{_command(config)}`.
{_variants(config)}
{_figures(measured)}{_classes(classes)}
## Licence

{_licence(config)}

## Citation

The debiased loss is that of [arXiv 2310.08442](https://arxiv.org/abs/2310.08442):

{CITATION}

## Configuration

| field | value |
|---|---|
{rows}
"""


def _averaged(rate: float) -> str:
    return f"averaged at the rate {rate}" if rate else "those of this step, not averaged"


def step_of_card(card: Path) -> int | None:
    """The step that the card of a run says; None if there is no card, or one of others."""
    try:
        found = STEP.search(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return int(found[1]) if found else None


def of_step(card: str, step: int) -> str:
    """The card of a run with this step in place of its own."""
    return STEP.sub(lambda found: found[0].replace(found[1], str(step), 1), card, count=1)


def changes_section(changes: Sequence[Mapping[str, Any]]) -> str:
    """The end of a card: what --allow_change changed in the middle of the run, as state.json has it; "" where nothing was."""
    lines = [f"- step {change['step']}: {_changed(change)}" for change in changes]
    return "\n## Changed in the middle of the run\n\n" + "\n".join(lines) + "\n" if lines else ""


def _changed(change: Mapping[str, Any]) -> str:
    if change["name"] == "data":
        return "the files of the data set"
    return f"{_code(change['name'])} from {_code(change['before'])} to {_code(change['after'])}"


def published(card: str, repo: str, license: str | None, grid: str | None) -> str:
    """The card of a run completed for a repository: its name, the licence, and the grid of samples (a file name) as a picture."""
    from huggingface_hub import ModelCard

    parsed: Any = ModelCard(card)
    parsed.data.license = license or UNKNOWN
    parsed.data.model_name = repo.split("/")[-1] if parsed.data.eval_results else None
    text = str(parsed).replace(PLACEHOLDER, f'"{repo}"').replace(f"model: {_code(UNKNOWN)}", f"model: {_code(parsed.data.license)}", 1)
    title = f"# {repo.split('/')[-1]}\n\nA diffusion model trained with debias_diffusers.\n"
    return text.replace(f"{TITLE}\n", title + (f"\n![Drawn while it was trained]({grid})\n" if grid else ""), 1)


def _front(config: TrainConfig, measured: Mapping[str, Any] | None) -> str:
    """The YAML metadata."""
    from huggingface_hub import ModelCardData

    objective, results = config.objective, _results(config, measured)
    base = _on_hub(config.text.base_model or config.optimization.init)
    data = ModelCardData(
        license=UNKNOWN,
        library_name="diffusers",
        pipeline_tag=TEXT_TASK if is_text(config) else TASK,
        tags=["debias_diffusers", objective.weighting, objective.prediction_type, *(["lora"] if config.lora.lora_rank else [])],
        datasets=_on_hub(config.data.dataset),
        base_model=base,
        base_model_relation="adapter" if base and config.lora.lora_rank else None,
        model_name="debias_diffusers" if results else None,
        eval_results=results or None,
    )
    front: str = data.to_yaml()
    return front


def _on_hub(name: str | None) -> list[str] | None:
    """The repository of a name that a run has pinned to a commit; None for local paths, which mean nothing to others."""
    return [name.partition("@")[0]] if name and ON_HUB.fullmatch(name) else None


def _results(config: TrainConfig, measured: Mapping[str, Any] | None) -> list[Any]:
    """The metrics for the model-index, which has no NaN."""
    from huggingface_hub import EvalResult

    if measured is None:
        return []
    name, _, commit = str(config.data.dataset).partition("@")
    shown = name if name in EMBEDDED or _on_hub(config.data.dataset) else "images"
    about: dict[str, Any] = {"task_type": TEXT_TASK if is_text(config) else TASK, "dataset_type": shown, "dataset_name": shown}
    about["dataset_revision"] = commit if _on_hub(config.data.dataset) else None
    figures = measured["figures"].items()
    return [
        EvalResult(**about, metric_type=kind, metric_value=value, metric_name=f"{kind} ({_by(measured)})")
        for kind, value in figures
        if math.isfinite(value)
    ]


def _by(measured: Mapping[str, Any]) -> str:
    """How the metrics were computed."""
    by = measured["by"]
    features = f"features of {by['extractor']}, " if "extractor" in by else ""
    return f"{features}{by['images']} images, step {measured['step']}"


def _data(config: TrainConfig, images: int | None) -> str:
    """The training data, and the initial weights."""
    (repo,) = _on_hub(config.data.dataset) or [str(config.data.dataset)]
    commit = str(config.data.dataset).removeprefix(repo).removeprefix("@")
    said = f"Trained on {_code(repo)}, split {_code(config.data.split)}"
    said += f" at revision `{commit}`" if commit else ""
    said += f", {images} images" if images else ""
    rank = config.lora.lora_rank
    start = config.optimization.init or (None if rank else config.text.base_model)
    said += f", starting from the weights of {_code(start)}" if start else ""
    if rank:
        targets = ", ".join(map(_code, config.lora.lora_targets))
        encoders = ", and on the text encoders" if config.lora.lora_text_encoders else ""
        said += f"; adapters of rank {rank} and alpha {config.lora.lora_alpha or rank:g} on {targets} of the UNet{encoders} of "
        said += f"{_code(config.text.base_model)} were trained; {config.text.caption_dropout:.0%} of the captions were dropped"
    elif is_text(config):
        said += f", of which the UNet was trained; {config.text.caption_dropout:.0%} of the captions were dropped"
    said += f", and the VAE is that of {_code(config.text.vae)}" if config.text.vae else ""
    return said + "."


def _use(num_classes: int, objective: ObjectiveConfig, classes: Mapping[str, int] | None) -> str:
    """Python code that draws an image with the exported scheduler."""
    T = objective.num_train_timesteps
    steps = f"num_inference_steps={min(50, T) if is_straight(objective) else T}"
    own = num_classes or needs_own_scheduler(objective)
    package, kind = ("debias_diffusers", "PixelPipeline") if own else ("diffusers", "DDPMPipeline")
    labels, note = (f"class_labels=[{_some_class(classes or {})}], ", f"  # labels 0 to {num_classes - 1}") if num_classes else ("", "")
    return (
        f"from {package} import {kind}\n\npipeline = {kind}.from_pretrained({PLACEHOLDER})\n"
        f"image = pipeline({labels}{steps}).images[0]{note}"
    )


def _use_text(config: TrainConfig) -> str:
    """Python code that draws an image of a prompt."""
    prompt = next(iter(config.text.sample_prompts), "a photograph")
    quoted = json.dumps(prompt if "`" not in prompt else "a photograph", ensure_ascii=False)
    side = config.data.resolution
    loaded = f"pipeline = DiffusionPipeline.from_pretrained({PLACEHOLDER})"
    if config.lora.lora_rank:
        base = str(config.text.base_model)
        name, commit = split_revision(base) if _on_hub(base) else (base, None)
        revision = f', revision="{commit}"' if commit else ""
        loaded = f"pipeline = DiffusionPipeline.from_pretrained({json.dumps(name.replace('`', ' '), ensure_ascii=False)}{revision})"
        loaded += f'\npipeline.load_lora_weights({PLACEHOLDER}, weight_name="{LORA_WEIGHTS}")'
    return (
        f"from diffusers import DiffusionPipeline\n\n{loaded}\n"
        f"image = pipeline({quoted}, height={side}, width={side}, guidance_scale={config.text.sample_guidance_scale:g}).images[0]"
    )


def _text_notes(config: TrainConfig, own_scheduler: bool) -> str:
    """The scheduler of a LoRA that is not that of its base model, and the prompts of the sample grids."""
    other = f"\nIts scheduler is not that of the base model: give the pipeline one by `from_config` with `scheduler` of `{BASE_RECORD}`.\n"
    prompts = "".join(f"\n- {_code(prompt)}" for prompt in config.text.sample_prompts)
    shown = f"\nThe grids that were drawn while it was trained have the prompts\n{prompts}\n" if prompts else ""
    return (other if own_scheduler else "") + shown


def _some_class(classes: Mapping[str, int]) -> str:
    """The first class with images as Python code: its name, or its number where the name has characters that end the code in Markdown."""
    label, name = next(((label, name) for label, (name, count) in enumerate(classes.items()) if count), (0, ""))
    quoted = json.dumps(name, ensure_ascii=False)
    return quoted if name and name.isprintable() and "`" not in name and quoted != PLACEHOLDER else str(label)


def _others(num_classes: int, objective: ObjectiveConfig) -> str:
    """Which other pipelines of diffusers work: few support other prediction types than epsilon, and none raises an error."""
    if num_classes:
        return "\nAfter this import `DiffusionPipeline.from_pretrained` loads it, too. Pipelines of diffusers itself know no labels.\n"
    if needs_own_scheduler(objective):
        return (
            "\nAfter this import `DiffusionPipeline.from_pretrained` loads it, too. Schedulers of diffusers itself take no x_0 on the "
            "straight path.\n"
        )
    if objective.prediction_type == "flow":
        return "\nNot with `DDIMPipeline`, which takes it for a model that predicts the noise and draws noise.\n"
    if objective.learn_sigma:
        return "\nNot with `DDIMPipeline`, which breaks on the channels of the learned variance.\n"
    return "\nWith `DDIMPipeline`, pass `use_clipped_model_output=True`.\n"


def _command(config: TrainConfig) -> str:
    objective = config.objective
    if is_text(config):
        return f'debias-sample {PLACEHOLDER} --prompt "a photograph" --output_dir samples'
    solver = DEFAULT_FLOW_SOLVER if is_straight(objective) else DEFAULT_SOLVER
    return f"debias-sample {PLACEHOLDER} --scheduler {solver} --steps {min(20, objective.num_train_timesteps // 2)} --output_dir samples"


def variant(rate: float) -> str:
    """The variant name of the weights averaged at a rate: ema_0_999. diffusers does not find names with a dot."""
    return f"ema_{rate}".replace(".", "_")


def _variants(config: TrainConfig) -> str:
    others = [f"`{variant(rate)}`" for rate in config.optimization.ema_decay[1:]]
    return f"On the Hub, weights averaged at other rates are variants: {', '.join(others)}.\n" if others else ""


def _figures(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return ""
    rows = "\n".join(f"| {_cell(name)} | {value:.4g} |" for name, value in measured["figures"].items())
    return f"## Figures\n\nAgainst the training images, {_by(measured)}:\n\n| figure | value |\n|---|---|\n{rows}\n"


def _classes(classes: Mapping[str, int] | None) -> str:
    """The table of labels and class names."""
    if not classes:
        return ""
    rows = [f"| {label} | {_cell(name)} | {count} |" for label, (name, count) in enumerate(classes.items())]
    more = f"\nand {len(rows) - MAX_CLASSES} more, which `model_index.json` names.\n" if len(rows) > MAX_CLASSES else ""
    table = "\n".join(rows[:MAX_CLASSES])
    return f"\n## Classes\n\n`class_labels` takes names or numbers.\n\n| label | name | images |\n|---|---|---|\n{table}\n{more}"


def _licence(config: TrainConfig) -> str:
    said = f"Licence of this model: {_code(UNKNOWN)}."
    if is_text(config):
        contains = "" if config.lora.lora_rank else f"contains parts of {_code(config.text.base_model)} and "
        from_it = f"from {_code(config.text.base_model)}" if config.lora.lora_rank else "from it"
        said += f" It {contains}was trained {from_it}, whose licence applies to it, too."
    if config.data.dataset == DIGITS:
        said += (
            " The digits are from *Optical Recognition of Handwritten Digits* by E. Alpaydin and C. Kaynak (UCI Machine Learning "
            "Repository, doi 10.24432/C50P49), CC BY 4.0."
        )
    if config.data.dataset == EMOJI:
        said += " The emoji are those of Noto Emoji by Google, Apache-2.0."
    return said


def _objective(objective: ObjectiveConfig) -> str:
    """The training objective in sentences; its numbers are in the table of the configuration."""
    predicted, name = objective.prediction_type, objective.weighting
    weighting = WEIGHTINGS.get(name, WeightingSpec(summary=""))  # of a run whose own function is not registered in this process
    if name == "variational":
        sentences = [f"The network predicts {predicted} and a variance; the variational bound was minimised, without weights."]
    elif weighting.repeats:
        sentences = [f"The squared error of the network's {predicted} is weighted with {_code(name)}, as other code has it."]
    else:
        sentences = [
            f"The squared error of the network's {predicted} is weighted with {_code(name)}, a weight defined on the error of the noise "
            f"and converted to what the network predicts."
        ]
    if weighting.source:
        sentences.append(f"{_code(name)} is {weighting.summary}, from {weighting.source}.")
    if objective.schedule_free_weights:
        sentences.append("The weights are on d log(SNR), so that the objective does not depend on the noise schedule.")
    if objective.learned_uncertainty:
        sentences.append("A learned uncertainty u(t) divides the weighted loss by e^u(t) and adds u(t), from arXiv 2312.02696.")
    for drawn, steps in _drawn(objective):
        if not (sampler := TIMESTEP_SAMPLERS[drawn]).corrected:
            values = sampler.card.format(**dataclasses.asdict(objective))
            density = f"{_code(drawn)}{f' ({values})' if values else ''}{steps}"
            sentences.append(f"t was drawn with the density {density} without correction, so the objective is multiplied by this density.")
    if (strategy := objective.timestep_bias_strategy) != "none":
        values = ", ".join(f"{name} {getattr(objective, name)}" for name in TIMESTEP_BIASES[strategy].parameters)
        sentences.append(f"Timesteps were drawn with the bias {_code(strategy)} ({values}) without correction: the objective has it, too.")
    if objective.learn_sigma and name != "variational":
        sentences.append("The variance of a sampling step is learned by the variational bound.")
    return "\n".join(sentences)


def _drawn(objective: ObjectiveConfig) -> list[tuple[str, str]]:
    """The samplers of t, each with the steps in which it drew."""
    switch = objective.timestep_sampler_switch
    if objective.timestep_sampler_after is None:
        return [(objective.timestep_sampler, "")]
    return [(objective.timestep_sampler, f" in the first {switch} steps"), (objective.timestep_sampler_after, f" from step {switch} on")]


def _noise(noise: NoiseConfig) -> str:
    """What noise was trained, where it was not standard normal; on a line of its own."""
    names = [name for name in ("noise_offset", "pyramid_noise_discount", "input_perturbation") if getattr(noise, name)]
    said = ", ".join(f"{_code(name)} {getattr(noise, name)}" for name in names)
    return f"\nThe noise in training was not standard normal: {said}." if said else ""


def _cell(value: object) -> str:
    """Inline code in a cell of a table."""
    return _code(value).replace("|", "\\|")


def _code(value: object) -> str:
    """Inline code, in which Markdown has no effect; a backtick or newline in the value (a name of a data set may have any) would end it."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'").strip()
    return f"`{text}`" if text else ""
