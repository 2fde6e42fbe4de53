"""The command `eval` and its sub-commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .. import parsing
from ..config import hub_names
from ..config.schema.evaluation import BiasConfig, BitsConfig, ReportConfig, ScoreConfig, StatsConfig
from ..config.schema.objective import WeightsConfig
from ..config.validation.evaluation import bias_problems, bits_problems, report_problems, score_problems, stats_problems
from ..config.validation.objective import weights_problems
from ..errors import CannotWriteError, raise_all
from ..runs.model_folder import bias_model_problems, pixel_problems, task_of
from ..utils import console, text_libraries
from ..utils.files import require_replaceable
from .base import dispatch, raise_problems

EVAL_HELP = """
Evaluate diffusion models and their objectives. COMMAND --help lists the flags of each.

  score TARGET...    FID, sFID, IS, KID, precision, recall and colour shift of models or images against a reference
  compare RUN...     the same for runs side by side, with confidence intervals
  stats REF OUT      statistics of a reference, to score against
  bpd MODEL          bits per dimension: variational bound, or likelihood by the probability-flow ODE
  bias RUN...        errors, colour bias and estimates of x_0 over the timesteps, images over the steps of the solver; an HTML report
  report RUN...      curves, grids over time, metrics, weights and configuration of runs side by side, as one HTML file
  weights            the weights of an objective over t and log SNR in every prediction space, as a picture and as numbers"""

WEIGHTS_HELP = """Draw the weights of an objective, over t and over log SNR and in every prediction space: weights.png and weights.csv.

The flags of the objective are those of train.py. --prediction_type flow takes the noise schedule of rectified flow; all spaces are
drawn anyhow."""


def run_evaluate(argv: list[str], program: str) -> None:
    """Runs one of `EVALUATIONS`."""
    dispatch(EVALUATIONS, EVAL_HELP, argv, program)


def _score(argv: list[str], program: str) -> None:
    _scored(parsing.parse(ScoreConfig, argv, program))


def _compare(argv: list[str], program: str) -> None:
    summary = "Score runs side by side, with confidence intervals (--bootstrap 200 if left out)."
    given = parsing.parse(ScoreConfig, argv, program, summary)
    _scored(dataclasses.replace(given, bootstrap=200 if given.bootstrap is None else given.bootstrap))


def _scored(config: ScoreConfig) -> None:
    absent = [problem for target in config.targets for problem in hub_names.target_problems(target)]
    raise_problems(score_problems(config) + absent + hub_names.data_problems("reference", config.reference))
    if "clip_score" in config.measure.metrics or any(task_of(Path(target)) == "text_to_image" for target in config.targets):
        text_libraries.require()
    elif any(map(hub_names.is_model_id, config.targets)):
        text_libraries.show()  # which they may need
    from ..evaluation import score

    score.score(config)
    if not config.output and (problem := console.stdout_error()):
        raise CannotWriteError(f"the figures cannot be printed: {problem.strerror}; write them to a file with --output scores.json")


def _stats(argv: list[str], program: str) -> None:
    config = parsing.parse(StatsConfig, argv, program)
    raise_problems(stats_problems(config) + hub_names.data_problems("reference", config.reference))
    from ..evaluation import statistics

    statistics.stats(config)


def _bits(argv: list[str], program: str) -> None:
    config = parsing.parse(BitsConfig, argv, program)
    absent = hub_names.model_problems("model", config.model) + hub_names.data_problems("reference", config.reference)
    raise_problems(bits_problems(config) + absent + pixel_problems(config.model, "bpd"))
    from ..evaluation import likelihood

    likelihood.bits_per_dimension(config)


def _bias(argv: list[str], program: str) -> None:
    config = parsing.parse(BiasConfig, argv, program)
    absent = [problem for run in config.runs for problem in hub_names.model_problems("run", run)]
    local = {run: Path(run) for run in config.runs if Path(run).is_dir()}
    if len(local) == len(config.runs):
        absent += bias_model_problems(config, local)
    raise_problems(bias_problems(config) + absent + hub_names.data_problems("reference", config.reference))
    if any(task_of(folder) == "text_to_image" for folder in local.values()):
        text_libraries.require()
    elif len(local) < len(config.runs):
        text_libraries.show()  # which those of the Hub may need
    from ..analysis import bias

    bias.measure_bias(config)


def _report(argv: list[str], program: str) -> None:
    config = parsing.parse(ReportConfig, argv, program)
    from ..analysis.report_page import is_our_page
    from ..analysis.run_files import run_problems

    raise_all(report_problems(config) + run_problems(config.runs))
    require_replaceable("output", Path(config.output), is_our_page)
    from ..analysis import run_report

    run_report.write_report(config)


def _weights(argv: list[str], program: str) -> None:
    config = parsing.parse(WeightsConfig, argv, program, WEIGHTS_HELP)
    raise_all(weights_problems(config))
    from ..evaluation import plots

    plots.plot_weights(config)


EVALUATIONS = {"score": _score, "compare": _compare, "stats": _stats, "bpd": _bits, "bias": _bias, "report": _report, "weights": _weights}
