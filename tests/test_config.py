"""A configuration is checked as a whole, at once, without torch; flags, files and defaults are layered as documented."""

import dataclasses
import json
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, run

from debias_diffusers import train
from debias_diffusers.cli import train_command, train_config
from debias_diffusers.commands import evaluate
from debias_diffusers.config import loading
from debias_diffusers.config.loading import flatten, layered, read_config, resolved, update
from debias_diffusers.config.schema.evaluation import BiasConfig, BitsConfig, MeasureConfig, ScoreConfig, StatsConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.config.schema.types import SchedulerName
from debias_diffusers.config.validation.evaluation import bias_problems, bits_problems, score_problems, stats_problems
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.errors import InputError
from debias_diffusers.pipelines.solvers import SCHEDULERS
from debias_diffusers.tasks.pixels import network_arguments
from debias_diffusers.tasks.unet import build_unet

FLOW = {"prediction_type": "flow", "noise_schedule": None}
GOOD = resolved(layered(read_config("digits"), {"output_dir": "runs/x"}), None)


def test_the_packaged_configuration_is_sound():
    assert train_problems(GOOD) == []
    assert "digits" in loading.packaged_configs()


def test_names_of_choices_are_those_of_the_functions_behind_them():
    assert set(get_args(SchedulerName)) == set(SCHEDULERS)


def test_the_config_json_of_an_older_run_is_a_configuration(tmp_path):
    """It has the number of images of a measurement, which was 1000 by default, though nothing is measured."""
    (tmp_path / "config.json").write_text(json.dumps({"eval_every": 0, "eval_images": 1000}))
    config = train_config(["--config", str(tmp_path / "config.json")], None)
    assert not [problem for problem in train_problems(config) if "eval_images" in problem]
    assert [problem for problem in train_problems(update(config, {"eval_images": 80})) if "eval_images is 80" in problem]


def test_field_names_are_unique_over_the_sections():
    fields = [f.name for section in dataclasses.fields(TrainConfig) for f in dataclasses.fields(getattr(GOOD, section.name))]
    assert len(fields) == len(set(fields))


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
@pytest.mark.parametrize(
    "change, named",
    [
        ({"resolution": 0}, ["resolution is 0", "64"]),
        ({"resolution": 9}, ["resolution is 9", "channel_mult", "take"]),
        ({"channels": 2}, ["channels is 2", "3"]),
        ({"label_dropout": 1.0, "class_conditional": True}, ["label_dropout is 1.0", "0.1"]),
        ({"label_dropout": 0.2}, ["label_dropout is 0.2", "class_conditional"]),
        ({"label_column": "digit"}, ["label_column is digit", "class_conditional"]),
        ({"num_workers": -1}, ["num_workers is -1", "2"]),
        ({"model_channels": 0}, ["model_channels is 0", "128"]),
        ({"channel_mult": (1, 0)}, ["channel_mult is [1, 0]", "1 2 2"]),
        ({"channel_mult": ()}, ["channel_mult is missing", "resolution 8 take 1 2"]),
        ({"channel_mult": (), "resolution": 27}, ["channel_mult is missing", "take --resolution 28"]),
        ({"layers_per_block": 0}, ["layers_per_block is 0", "2"]),
        ({"attention_resolutions": (16,)}, ["attention_resolutions names 16", "[8, 4]"]),
        ({"attention_head_dim": 48}, ["attention_head_dim is 48", "64", "16 does"]),
        ({"dropout": 1.5}, ["dropout is 1.5", "0.1"]),
        ({"model_config": "unet.json"}, ["model_channels is 32", "model_config unet.json"]),
        ({"weighting": "debias"}, ["weighting is debias,", "did you mean debiased?"]),
        ({"weighting": "mine"}, ["weighting is mine,", "constant, debiased"]),
        (
            {**FLOW, "timestep_sampler": "log_normal", "terminal_weight_floor": 0.5},
            ["terminal_weight_floor is 0.5", "never draws the last timestep", "--timestep_sampler log_normal_corrected"],
        ),
        ({"snr_gamma": 3.0}, ["snr_gamma is 3.0", "weighting is debiased", "--weighting min_snr or soft_min_snr"]),
        ({"weighting": "edm", "sigma_data": 0.0}, ["sigma_data is 0.0", "0.5"]),
        ({"sigma_data": 0.3}, ["sigma_data is 0.3", "--weighting edm"]),
        ({"snr_ceiling": -1.0}, ["snr_ceiling is -1.0", "1000"]),
        ({"snr_floor": 2.0, "snr_ceiling": 1.0}, ["snr_ceiling is 1.0", "snr_floor is 2.0"]),
        ({"weighting": "constant", "snr_ceiling": 9.0}, ["snr_ceiling is 9.0", "changes nothing in weighting constant"]),
        ({"weighting": "truncated_snr", "snr_ceiling": 9.0}, ["snr_ceiling is 9.0", "changes nothing in weighting truncated_snr"]),
        ({"weighting": "min_snr", "snr_floor": 1e-3}, ["snr_floor is 0.001", "changes nothing in weighting min_snr"]),
        ({"terminal_weight_floor": -1.0}, ["terminal_weight_floor is -1.0", "0.5"]),
        ({"terminal_weight_floor": 0.5}, ["terminal_weight_floor is 0.5", "--rescale_betas_zero_snr", "flow"]),
        ({"weighting": "debiased_kohya", "prediction_type": "sample"}, ["debiased_kohya", "epsilon, v_prediction only", "sample"]),
        ({**FLOW, "weighting": "debiased_as_is"}, ["debiased_as_is", "flow", "--weighting debiased"]),
        (
            {"weighting": "debiased_as_is", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            ["debiased_as_is is infinite where the SNR is 0", "--snr_floor 1e-3"],
        ),
        ({"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr is on", "epsilon", "--prediction_type v_prediction"]),
        ({"prediction_type": "flow", "noise_schedule": "linear"}, ["noise_schedule is linear", "flow", "leave it out"]),
        ({**FLOW, "rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr is on", "flow"]),
        ({**FLOW, "learn_sigma": True}, ["learn_sigma is True", "flow", "v_prediction"]),
        ({**FLOW, "variance_type": "fixed_small"}, ["variance_type is fixed_small", "flow"]),
        ({"learn_sigma": True, "variance_type": "fixed_small"}, ["variance_type is fixed_small", "learn_sigma"]),
        ({"weighting": "variational"}, ["variational", "add --learn_sigma"]),
        ({**FLOW, "weighting": "variational"}, ["variational", "add --learn_sigma --prediction_type v_prediction"]),
        (
            {"weighting": "variational", "learn_sigma": True, "normalize_weights": True},
            ["normalize_weights is True", "changes nothing in weighting variational"],
        ),
        ({"timestep_std": 0.0, "timestep_sampler": "log_normal"}, ["timestep_std is 0.0", "such as 1"]),
        ({"timestep_mean": float("nan"), "timestep_sampler": "log_normal"}, ["timestep_mean is nan", "such as 0"]),
        ({"timestep_mean": 1.0}, ["timestep_mean is 1.0", "timestep_sampler is uniform", "logit_normal"]),
        ({"noise_schedule": "sigmoid", "num_train_timesteps": 20}, ["num_train_timesteps is 20", "sigmoid", "at least 21"]),
        ({"weighting": "p2", "p2_k": 0.0}, ["p2_k is 0.0", "such as 1"]),
        ({"snr_floor": -1.0}, ["snr_floor is -1.0", "1e-3"]),
        ({"weighting": "constant", "snr_floor": 1e-3}, ["snr_floor is 0.001", "changes nothing in weighting constant"]),
        ({"noise_schedule": "cosine"}, ["weighting debiased", "noise_schedule cosine", "--snr_floor 1e-3"]),
        ({"num_train_timesteps": 10}, ["num_train_timesteps is 10", "noise_schedule linear", "at least 21"]),
        ({"schedule_shift": 0.0}, ["schedule_shift is 0.0", "1"]),
        ({"batch_size": 0}, ["batch_size is 0", "64"]),
        ({"micro_batch_size": 0}, ["micro_batch_size is 0", "8"]),
        (
            {"micro_batch_size": 32, "compile": True, "compile_mode": "reduce-overhead"},
            ["micro_batch_size is 32", "CUDA graphs of compile_mode reduce-overhead", "leave one of the two out"],
        ),
        ({"max_steps": 0, "warmup_steps": 0}, ["max_steps is 0", "100000"]),
        ({"max_hours": float("nan")}, ["max_hours is nan", "12"]),
        ({"learning_rate": float("inf")}, ["learning_rate is inf", "1e-4"]),
        ({"warmup_steps": 5000}, ["warmup_steps is 5000", "max_steps is only 2500", "250"]),
        ({"weight_decay": -0.1}, ["weight_decay is -0.1", "0.01"]),
        ({"max_grad_norm": -1.0}, ["max_grad_norm is -1.0", "such as 1"]),
        ({"ema_decay": (0.9, 0.9)}, ["ema_decay is [0.9, 0.9]", "0.9999"]),
        ({"ema_decay": (0.0,), "ema_on_cpu": True}, ["ema_on_cpu is on", "--ema_decay 0.9999"]),
        ({"ema_decay": (1.0,)}, ["ema_decay is [1.0]", "0.9999"]),
        ({"num_threads": 0}, ["num_threads is 0", "2"]),
        ({"seed": -1}, ["seed is -1", "0"]),
        ({"checkpoint_every": -1}, ["checkpoint_every is -1", "1000"]),
        ({"keep_checkpoints": 0}, ["keep_checkpoints is 0", "2"]),
        ({"sample_every": -1}, ["sample_every is -1", "1000"]),
        ({"log_every": -1}, ["log_every is -1", "10"]),
        ({"output_dir": None}, ["output_dir is missing", "runs/first"]),
        ({"dataset": None}, ["dataset is missing", "Hub id"]),
    ],
)
def test_a_wrong_value_is_named_with_one_that_works(change, named):
    problems = train_problems(update(GOOD, change))
    assert len(problems) == 1, problems
    assert all(text in problems[0] for text in named), problems[0]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 2**32}, "seed is 4294967296, but must be at least 0 and below 2^32"),
        ({"bootstrap": 1}, "bootstrap is 1, but must be 0 (off) or at least 20"),
        ({"output": "."}, "output is '.', but must name a file, such as output.json"),
        ({"output": ""}, "output is '', but must name a file"),
        ({"output": "out/.."}, "output is 'out/..', but must name a file"),
        (
            {"measure": MeasureConfig(metrics="colour,swd", feature_extractor="vgg16")},
            "feature_extractor is vgg16, but metrics colour,swd take no features; add another metric, such as fid",
        ),
        (
            {"measure": MeasureConfig(metrics="colour", feature_extractor_weights="x.pth")},
            "feature_extractor_weights is x.pth, but metrics colour take no features",
        ),
    ],
)
def test_a_wrong_value_of_a_score_is_named_with_one_that_works(change, named):
    assert score_problems(ScoreConfig(targets=("x",))) == []
    (problem,) = score_problems(ScoreConfig(targets=("x",), **change))
    assert problem.startswith(named)


def test_an_extractor_is_refused_in_bias_only_where_metrics_are_named_that_take_no_features():
    assert bias_problems(BiasConfig(runs=("x",), feature_extractor="digits")) == []  # which then are fid,colour
    assert bias_problems(BiasConfig(runs=("x",), feature_extractor="digits", metrics="fid,colour")) == []
    (problem,) = bias_problems(BiasConfig(runs=("x",), feature_extractor="digits", metrics="channel_bias"))
    assert problem.startswith("feature_extractor is digits, but metrics channel_bias take no features")


def test_an_output_that_is_no_file_is_refused_before_the_work():
    assert "output is '.'" in bits_problems(BitsConfig(model="x", output="."))[0]
    assert "out is '.', but must name a file, such as out.safetensors" in stats_problems(StatsConfig(reference="x", out="."))[0]


@pytest.mark.parametrize("flags, bootstrap", [([], 200), (["--bootstrap", "0"], 0), (["--bootstrap", "30"], 30)])
def test_compare_draws_intervals_unless_they_are_off(monkeypatch, flags, bootstrap):
    seen = []
    monkeypatch.setattr(evaluate, "_scored", seen.append)
    evaluate._compare(["x", *flags], "eval.py compare")
    assert seen[0].bootstrap == bootstrap


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
def test_a_batch_is_shared_evenly():
    (problem,) = train_problems(GOOD, num_processes=3)
    assert "batch_size is 64" in problem and "take 63" in problem


def test_cuda_graphs_take_a_micro_batch_that_is_the_whole_share_of_a_process():
    graphs = update(GOOD, {"compile": True, "compile_mode": "reduce-overhead", "micro_batch_size": 32})
    assert train_problems(graphs) and not train_problems(graphs, num_processes=2)


def test_cuda_graphs_of_single_blocks_take_no_recomputation():
    changes = {"compile": True, "compile_mode": "reduce-overhead", "gradient_checkpointing": True}
    assert not train_problems(update(GOOD, changes))  # a pixel model is compiled as one
    (problem,) = train_problems(update(resolved(layered(read_config("digits_text"), {"output_dir": "runs/x"}), None), changes))
    assert "compile_mode is reduce-overhead" in problem and "gradient_checkpointing" in problem


def test_what_a_preset_has_gives_way_to_cuda_graphs_that_are_typed_and_the_other_way_round(tmp_path, capsys):
    text = ["--config", "sdxl", "--dataset", "digits", "--output_dir", "runs/x"]
    config = train_config([*text, "--compile", "--compile_mode", "reduce-overhead"], None)
    assert not config.optimization.gradient_checkpointing and not train_problems(config)
    assert "gradient_checkpointing is False, and not as configured: compile_mode is reduce-overhead" in capsys.readouterr().err
    preset = tmp_path / "graphs.yaml"
    preset.write_text("base_model: digits\ndataset: digits\nresolution: 64\ncompile: true\ncompile_mode: reduce-overhead\n")
    config = train_config(["--config", str(preset), "--output_dir", "runs/x", "--gradient_checkpointing"], None)
    assert config.optimization.compile_mode == "default" and not train_problems(config)


@pytest.mark.row(34, "weights that grow without bound as the SNR falls to 0 are an error")
@pytest.mark.parametrize("weighting", ("debiased", "inverse_snr", "truncated_snr", "edm", "debiased_as_is"))
def test_weights_without_bound_need_a_floor_on_the_cosine_schedule(weighting):
    change = {"noise_schedule": "cosine", "weighting": weighting}
    (problem,) = train_problems(update(GOOD, change))
    assert f"weighting {weighting}" in problem and "--snr_floor 1e-3" in problem
    assert train_problems(update(GOOD, {**change, "snr_floor": 1e-3})) == []
    assert train_problems(update(GOOD, {**change, "snr_floor": 1e-8})) == [problem]  # which bounds next to nothing


def test_an_unknown_weighting_hides_no_other_problem():
    problems = train_problems(update(GOOD, {"weighting": "debias", "rescale_betas_zero_snr": True, "snr_gamma": -1.0}))
    assert len(problems) == 3


def test_a_schedule_is_written_down_but_for_the_flow_that_has_its_own():
    assert train_config([], None).objective.noise_schedule == "linear"
    assert train_config(["--prediction_type", "flow"], None).objective.noise_schedule is None
    assert train_problems(train_config(["--prediction_type", "flow", "--output_dir", "x"], None)) == []


def test_the_floor_makes_debiased_on_the_cosine_schedule_usable():
    assert train_problems(update(GOOD, {"noise_schedule": "cosine", "snr_floor": 1e-3})) == []
    assert train_problems(update(GOOD, {"noise_schedule": "cosine", "prediction_type": "v_prediction"})) == []


WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(name, *_):
        assert name.split(".")[0] not in ("torch", "diffusers", "accelerate", "datasets"), name
sys.meta_path.insert(0, NoTorch)
from debias_diffusers import cli
"""

# A process that counts its calls of Python functions, and prints the number last.
COUNTED = """
import atexit, sys
def count(frame, event, argument):
    global calls
    calls += event == "call"
calls = 0
sys.setprofile(count)
atexit.register(lambda: print(calls, file=sys.stderr))
"""


def at_once(call, *flags):
    """Calls the command line where torch cannot be imported. Its limit is about a second, and the same on every machine, however busy."""
    done = subprocess.run([sys.executable, "-c", COUNTED + WITHOUT_TORCH + call, *flags], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stderr.split()[-1]) < 600_000
    return done


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
def test_three_mistakes_are_answered_together_at_once_without_torch():
    done = at_once("sys.exit(cli.train())", "--batch_size", "0", "--learning_rate=-1", "--snr-gamma", "3")
    assert done.returncode == 2
    assert "3 problems" in done.stderr and "Traceback" not in done.stderr
    assert all(name in done.stderr for name in ("batch_size is 0", "learning_rate is -1", "snr_gamma is 3"))


def test_a_parameter_that_nothing_uses_is_refused_also_where_its_default_is_typed():
    """In diffusers' scripts `--snr_gamma 5` is all that Min-SNR needs."""
    said = r"snr_gamma is 5\.0, but weighting is debiased, which does not have it; take --weighting min_snr or soft_min_snr or leave"
    with pytest.raises(InputError, match=said):
        train_command(["--snr_gamma", "5"], None)
    with pytest.raises(InputError, match=said):
        train("digits", output_dir="never", snr_gamma=5.0)
    assert train_command(["--weighting", "min_snr", "--snr_gamma", "5"], None)[0].objective.weighting == "min_snr"


@pytest.mark.parametrize("entry", ["train", "sample", "evaluate"])
def test_help_needs_no_torch(entry):
    done = at_once(f"sys.exit(cli.{entry}(['--help']))")
    assert done.returncode == 0 and "usage:" in done.stdout


def test_eval_names_its_commands():
    code, _, err = run("eval.py", "foo")
    said = "error: eval.py foo is not known; take one of score, compare, stats, bpd, bias, report, weights"
    assert code == 2 and err.strip().splitlines()[-1] == said


def test_a_malformed_value_is_one_sentence():
    with pytest.raises(InputError) as error:
        train_config(["--batch_size", "many"], None)
    assert "--batch_size" in str(error.value) and "\n" not in str(error.value)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("dataset: faces\nbatch_size: 16\nlearning_rate: 1e-3\nema_decay: 0.9\nmixed_precision: no\n")
    config = train_config(["--config", str(file), "--batch-size", "32"], "bf16")
    assert config.optimization.batch_size == 32
    assert config.optimization.learning_rate == 1e-3
    assert config.optimization.ema_decay == (0.9,)
    assert config.optimization.mixed_precision == "no"
    assert config.objective.schedule_shift == 1  # not the digits'


def test_hyphens_and_underscores_in_flags_are_the_same():
    command = ["--base_model", "user/model", "--dataset", "faces", "--resolution", "64", "--output_dir", "run"]
    hyphens = [word.replace("_", "-") for word in command]
    assert train_command(hyphens, None) == train_command(command, None)


def test_the_digits_configuration_is_taken_for_the_digits(tmp_path):
    for flags in ([], ["--dataset", "digits"], ["--config", "digits"]):
        assert train_config(flags, None).objective.schedule_shift == 64
    assert train_config(["--dataset", "faces"], None).objective.schedule_shift == 1
    assert train_config(["--dataset=digits", "--config", str(TINY)], None).objective.schedule_shift == 64
    for flags in (["--dataset", "emoji"], ["--config", "emoji"]):
        config = train_config(flags, None)
        assert train_problems(config) == [] and config.objective.schedule_shift == 16 == (64 / config.data.resolution) ** 2


def test_what_the_launcher_says_of_precision_is_taken_when_the_command_does_not():
    assert train_config([], "bf16").optimization.mixed_precision == "bf16"
    assert train_config(["--mixed_precision", "no"], "bf16").optimization.mixed_precision == "no"
    assert train_config([], None).optimization.mixed_precision == "no"
    with pytest.raises(InputError, match="mixed_precision is 'fp8'"):
        train_config([], "fp8")


def test_multipliers_follow_the_resolution_when_left_out():
    for resolution, multipliers in ((64, (1, 2, 3, 4)), (512, (1, 1, 2, 2, 4, 4)), (48, (1, 2, 2, 2)), (28, (1, 2, 2)), (27, ())):
        assert train_config(["--dataset", "faces", "--resolution", str(resolution)], None).model.channel_mult == multipliers


def test_a_network_file_replaces_the_numbers_of_the_configuration_below_it():
    config = train_config(["--model_config", "unet.json", "--output_dir", "x"], None)
    assert train_problems(config) == []
    with pytest.raises(InputError, match="leave out dropout, model_channels"):
        train_config(["--model_config", "unet.json", "--model-channels=128", "--dropout", "0"], None)


def test_a_flag_without_its_value_is_said():
    with pytest.raises(InputError, match="--config needs a value"):
        train_config(["--config"], None)


def test_all_mistakes_of_a_file_are_named_together(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("batch_size: many\nwieghting: p2\nprediction_type: noise\nmax_steps: 1.5\n")
    with pytest.raises(InputError) as error:
        read_config(str(file))
    for text in ("batch_size is 'many'", "did you mean weighting?", "one of epsilon, sample", "max_steps is 1.5"):
        assert text in str(error.value)


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\x00", "seed: 2020-13-45", "learning_rate: " + "9" * 400])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content):
    file = tmp_path / "wrong.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"wrong\.yaml"):
        read_config(str(file))


PAPER = {
    "celebahq256": 93_563_910,
    "ffhq256": 93_563_910,
    "afhq_dog256": 93_563_910,
    "metfaces256": 93_563_910,
    "cifar10": 30_468_870 + 10 * 512,
    "imagenet256": 93_563_910 + 1000 * 512,
}


def test_every_packaged_configuration_has_a_test():
    assert set(loading.packaged_configs()) == {*PAPER, "digits", "emoji", "reference_parity", "digits_text", "sdxl"}


@pytest.mark.parametrize("name", PAPER)
def test_the_runs_of_the_paper_are_configurations(name, tmp_path):
    config = train_config(["--config", name, "--dataset", str(tmp_path / "missing")], None)
    assert train_problems(config) == []
    objective, optim = config.objective, config.optimization
    assert (objective.weighting, objective.prediction_type, objective.noise_schedule) == ("debiased", "epsilon", "linear")
    assert objective.learn_sigma and objective.num_train_timesteps == 1000 and objective.schedule_shift == 1
    assert (optim.learning_rate, optim.max_steps, optim.ema_decay) == (2e-5, 500_000, (0.9999,))
    assert (optim.weight_decay, optim.max_grad_norm, optim.lr_schedule) == (0, 0, "constant")
    assert optim.batch_size == (32 if name == "cifar10" else 8)
    num_labels = {"imagenet256": 1000, "cifar10": 10}.get(name, 0)
    assert config.data.class_conditional == bool(num_labels) and (not num_labels or config.data.label_dropout == 0)
    with torch.device("meta"):
        network = build_unet(network_arguments(config, 3, num_labels))
    assert sum(p.numel() for p in network.parameters()) == PAPER[name]
    for weighting in ("constant", "p2", "min_snr", "debiased"):
        assert train_problems(train_config(["--config", name, "--dataset", "x", "--weighting", weighting], None)) == []


def test_the_parity_preset_is_what_the_reference_does():
    flags = ["--config", "reference_parity", "--dataset", "x", "--output_dir", "y", "--resolution", "64", "--attention_resolutions", "16"]
    config = train_config(flags, "bf16")
    assert train_problems(config) == []
    assert config.optimization.mixed_precision == "no" and config.optimization.max_grad_norm == 0
    assert config.objective.weighting == "debiased_as_is" and config.objective.learn_sigma


def test_an_unknown_configuration_lists_the_known():
    with pytest.raises(InputError, match="digits"):
        read_config("digit")


def test_config_json_reads_back_as_the_same_configuration(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(loading.to_json(GOOD))
    assert update(layered(read_config(str(file))), {"output_dir": "runs/x", "task": GOOD.data.task}) == GOOD


def test_every_field_is_written_down_but_the_places():
    """Of the run, and of what is published of it: who trains with the same configuration must overwrite neither.

    Nor what one command asks for or permits: `--config RUN/config.json` and `--resume RUN` would do so again.
    """
    written = json.loads(loading.to_json(GOOD))
    hub = {field.name for field in dataclasses.fields(GOOD.hub)}
    assert set(flatten(GOOD)) - set(written) == {"output_dir", "size", "num_epochs", *loading.OF_ONE_COMMAND, *hub, *loading.TEXT_FIELDS}


def test_a_resumed_run_is_compared_field_by_field():
    before = json.loads(loading.to_json(GOOD))
    now = json.loads(loading.to_json(update(GOOD, {"max_steps": 9, "weighting": "p2", "seed": 3})))
    lines = loading.differences(before, now)
    assert [line.split(":")[0] for line in lines] == ["seed", "weighting"]
    assert "debiased" in lines[1] and "p2" in lines[1]


def test_python_gives_numbers_of_numpy_and_torch():
    given = {"max_steps": np.int64(5), "random_flip": np.bool_(True), "channel_mult": np.array([1, 2]), "seed": torch.tensor(3)}
    values = loading.checked_values({**given, "learning_rate": np.float32(0.5)}, "train")
    assert values == {"max_steps": 5, "random_flip": True, "channel_mult": (1, 2), "seed": 3, "learning_rate": 0.5}
    assert {type(value) for value in values.values()} == {int, bool, tuple, float}
    with pytest.raises(InputError, match=r"max_steps is .*but must be a whole number"):
        loading.checked_values({"max_steps": np.float64(5)}, "train")
    with pytest.raises(InputError, match=r"max_steps is .*but must be a whole number"):
        loading.checked_values({"max_steps": np.array([5, 6])}, "train")


def test_a_configuration_made_in_python_is_looked_at(tmp_path):
    made = update(GOOD, {"prediction_type": "v", "max_steps": "5", "output_dir": str(tmp_path / "run")})
    with pytest.raises(InputError, match=r"train: 2 problems\n.*max_steps is '5'|train: 2 problems\n.*prediction_type is 'v'"):
        train(made)
    assert not (tmp_path / "run").exists()


def test_the_yaml_loader_is_the_safe_one(tmp_path):
    file = tmp_path / "hostile.yaml"
    file.write_text("seed: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read_config(str(file))
    assert yaml.safe_load(TINY.read_text())["dataset"] == "digits"
