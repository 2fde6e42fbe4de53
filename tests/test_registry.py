"""One table for each kind: what is chosen by name stands there once, and flags, help, documentation and functions follow."""

import dataclasses
import inspect
import re
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import ROOT

from debias_diffusers import cli
from debias_diffusers.config import ranges, registry
from debias_diffusers.config.registry import METRICS, SOLVERS, TIMESTEP_BIASES, TIMESTEP_SAMPLERS, WEIGHTINGS
from debias_diffusers.config.schema import types
from debias_diffusers.config.schema.evaluation import ScoreConfig
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.diffusion.noise_schedule import make_schedule
from debias_diffusers.diffusion.timestep_samplers import make_timestep_sampler
from debias_diffusers.diffusion.weighting import REPEATED_FUNCTIONS, WEIGHTING_FUNCTIONS, weight
from debias_diffusers.evaluation import metrics
from debias_diffusers.evaluation.feature_extractors import FEATURE_EXTRACTORS_REGISTRY, INCEPTION, names
from debias_diffusers.evaluation.metrics import Sample

ALL = ("epsilon", "sample", "v_prediction", "flow")


def documented(page, flag):
    """Names in the first column of the table that begins with a flag."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    rows = lines[next(k for k, line in enumerate(lines) if re.match(rf"\| `?-*{flag}`? \|", line)) + 2 :]
    rows = rows[: next(k for k, line in enumerate([*rows, ""]) if not line.startswith("|"))]
    return {name.split(" (")[0].strip("` ") for row in rows for name in row.split("|")[1].split(",")}


@pytest.mark.parametrize(
    "table, page, flag",
    [
        (TIMESTEP_SAMPLERS, "weighting.md", "timestep_sampler"),
        (TIMESTEP_BIASES, "weighting.md", "timestep_bias_strategy"),
        (METRICS, "evaluation.md", "metric"),
        (SOLVERS, "sampling.md", "scheduler"),
    ],
)
def test_the_documentation_has_a_row_for_every_entry(table, page, flag):
    assert documented(page, flag) == set(table)


def test_the_documentation_has_a_row_for_every_weighting():
    shared = (ROOT / "docs" / "weighting.md").read_text()
    assert {name for name in WEIGHTINGS if f"| `{name}`" not in shared} == {"variational"}  # which is no function of the SNR
    assert "`--weighting variational`" in shared


@pytest.mark.parametrize(
    "entry, table",
    [("train", WEIGHTINGS), ("train", TIMESTEP_SAMPLERS), ("train", TIMESTEP_BIASES), ("train", METRICS), ("sample", SOLVERS)],
)
def test_the_help_says_what_every_entry_is(entry, table, capsys):
    assert getattr(cli, entry)(["--help"]) == 0
    said = "".join(capsys.readouterr().out.replace("│", "").split())
    assert not [name for name, spec in table.items() if f"{name}:{spec.summary}".replace(" ", "") not in said]


def test_choices_of_a_flag_are_the_entries_of_its_table():
    assert get_args(types.TimestepSamplerName) == tuple(TIMESTEP_SAMPLERS)
    assert get_args(types.SchedulerName) == tuple(SOLVERS)


@pytest.mark.parametrize(
    "kind, spec", [(ObjectiveConfig, spec) for table in (WEIGHTINGS, TIMESTEP_SAMPLERS, TIMESTEP_BIASES) for spec in table.values()]
    + [(SampleConfig, spec) for spec in SOLVERS.values()],
)  # fmt: skip
def test_a_parameter_is_a_field_with_a_range(kind, spec):
    assert set(spec.parameters) <= ranges.ranges(kind).keys()


def test_every_number_of_a_command_has_a_range():
    """Numbers in lists, and the few that are checked with others, aside."""
    for kind in (TrainConfig, SampleConfig, ScoreConfig):
        sections = [section for section in get_type_hints(kind).values() if dataclasses.is_dataclass(section)] or [kind]
        for section in sections:
            numbers = {name for name, hint in get_type_hints(section).items() if {int, float} & {hint, *get_args(hint)}}
            assert numbers - ranges.ranges(section).keys() <= {"channel_mult", "attention_resolutions", "ema_decay"} | {
                "timesteps", "sections", "guidance_interval"
            }, section  # fmt: skip


# ---- what a table says is what its functions do ----------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTING_FUNCTIONS)
def test_a_weighting_has_the_parameters_of_its_function_and_their_defaults(name):
    _, *parameters = inspect.signature(WEIGHTING_FUNCTIONS[name]).parameters.values()
    assert tuple(parameter.name for parameter in parameters) == WEIGHTINGS[name].parameters
    assert all(parameter.default == getattr(ObjectiveConfig(), parameter.name) for parameter in parameters)


@pytest.mark.parametrize("name", [*WEIGHTING_FUNCTIONS, *REPEATED_FUNCTIONS])
def test_a_weighting_is_unbounded_where_its_entry_says_so(name):
    spec, snr = WEIGHTINGS[name], torch.tensor([1e-18, 1e-20], dtype=torch.float64)
    values = {parameter: getattr(ObjectiveConfig(), parameter) for parameter in spec.parameters}
    growing = [kind for kind in spec.repeats or ALL if weight(snr, name, kind, **values).diff() > 1]
    assert tuple(growing) == spec.unbounded


@pytest.mark.parametrize("name", WEIGHTING_FUNCTIONS)
def test_a_weighting_is_constant_where_its_entry_says_so(name):
    spec, snr = WEIGHTINGS[name], torch.logspace(-6, 6, 13, dtype=torch.float64)
    values = {parameter: getattr(ObjectiveConfig(), parameter) for parameter in spec.parameters}
    weights = WEIGHTING_FUNCTIONS[name](snr, **values)
    below = getattr(ObjectiveConfig(), spec.constant_below) if isinstance(spec.constant_below, str) else spec.constant_below
    for same in (snr <= below, snr >= spec.constant_above):
        assert len(weights[same].unique()) <= 1
    if below == -torch.inf and spec.constant_above == torch.inf:
        assert weights[0] != weights[1] or weights[-1] != weights[-2]


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_a_timestep_sampler_does_what_its_entry_says(name):
    spec = TIMESTEP_SAMPLERS[name]
    config = ObjectiveConfig(timestep_sampler=name, rescale_betas_zero_snr=True, num_train_timesteps=100)
    schedule = make_schedule(config)
    sampler = make_timestep_sampler(config, schedule, 4)
    assert sampler.corrected == spec.corrected
    assert (sampler.probabilities[-1] > 0) == spec.draws_zero_snr
    for parameter in registry.parameters_of(TIMESTEP_SAMPLERS):
        other = dataclasses.replace(config, **{parameter: 2.0})
        changing = make_timestep_sampler(other, schedule, 4)
        changed = not all(torch.equal(getattr(changing, of), getattr(sampler, of)) for of in ("probabilities", "corrections"))
        assert changed == (parameter in spec.parameters)
    assert spec.corrected or not spec.parameters or all(f"{{{parameter}}}" in spec.card for parameter in spec.parameters)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_computes_the_figures_of_its_entry(name):
    spec = METRICS[name]
    one, other = (Sample.of({"x": torch.rand(40, 12, generator=torch.Generator().manual_seed(seed)) + seed}) for seed in (0, 1))
    found = metrics.figures(one, other, {name: "x"})
    assert set(spec.figures) - set(found) <= {"kid_std", "kid_rbf_std"}  # which there are of subsets only
    assert metrics.least_images({name: "x"}, one)[name] == (13 if spec.reference == "statistics" else spec.min_images)
    few = Sample.of({"x": one.features["x"][: spec.min_images]})
    assert set(metrics.figures(few, few, {name: "x"})) <= set(spec.figures)
    if spec.reference == "statistics":
        metrics.figures(one, Sample({}, {"x": other.moments("x")}, 40), {name: "x"})


def test_what_a_metric_needs_of_an_extractor_is_there():
    assert METRICS["is"].min_images == metrics.SPLITS and METRICS["prc"].min_images - 1 == metrics.NEIGHBOURS
    for name, spec in METRICS.items():
        assert spec.extractor is None or spec.extractor in names()
        if spec.layer is None:
            assert FEATURE_EXTRACTORS_REGISTRY[INCEPTION].get_default_feature_layer_for_metric(spec.layer_of), name
        else:
            assert spec.extractor or spec.layer in metrics.PIXEL_LAYERS or spec.of_prompts
    assert len(registry.FIGURES) == sum(len(spec.figures) for spec in METRICS.values())
