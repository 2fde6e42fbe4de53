"""A wrong command is refused at once, in words that help; and every field of a configuration does something."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, metrics, newest_step, run, train_args
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from here import tiny, trained_here
from PIL import Image as Picture
from test_config import WITHOUT_TORCH
from text_models import make_base

from debias_diffusers.cli import train_config
from debias_diffusers.config.loading import CHANGEABLE, NOT_STORED, differences, flatten, stored, to_json
from debias_diffusers.config.loading import update as updated
from debias_diffusers.config.schema.evaluation import ScoreConfig
from debias_diffusers.config.schema.network import ModelConfig
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.errors import InputError
from debias_diffusers.parsing import parse

TRAIN = ["--output_dir", "never/made"]
PUSH = ["--push_to_hub", "--hub_model_id", "user/digits"]
FILE = "FILE.yaml"  # stands for a configuration file of the content that follows

# (program, arguments, what is said); the table of test_config.py has 65 more, as fields and values.
WRONG_VALUES = [
    ("train", ["--batch_size", "many"], ["--batch_size"]),
    ("train", ["--batch_size", "1.5"], ["--batch_size"]),
    ("train", ["--seed", "zero"], ["--seed"]),
    ("train", ["--learning_rate", "fast"], ["--learning_rate"]),
    ("train", ["--prediction_type", "noise"], ["--prediction_type", "epsilon"]),
    ("train", ["--noise_schedule", "quadratic"], ["--noise_schedule", "cosine"]),
    ("train", ["--timestep_sampler", "importance"], ["--timestep_sampler", "loss_second_moment"]),
    ("train", ["--lr_schedule", "step"], ["--lr_schedule", "cosine"]),
    ("train", ["--mixed_precision", "fp8"], ["--mixed_precision", "bf16"]),
    ("train", ["--report_to", "neptune"], ["--report_to", "tensorboard"]),
    ("train", ["--channel_mult", "1", "x"], ["--channel_mult"]),
    ("train", ["--ema_decay", "slow"], ["--ema_decay"]),
    ("train", ["--cache_images_mb", "-1"], ["cache_images_mb is -1", "such as 1024"]),
    ("train", ["--compile", "--compile_mode", "fast"], ["--compile_mode", "reduce-overhead"]),
    ("train", ["--eval_every", "-1"], ["eval_every is -1", "5000"]),
    ("train", ["--eval_every", "500", "--eval_images", "0"], ["eval_images is 0", "1000"]),
    ("train", ["--eval_every", "500", "--eval_metrics", "lpips"], ["eval_metrics has lpips", "fid"]),
    ("train", ["--eval_every", "500", "--eval_metrics", "fid,fid"], ["eval_metrics is fid,fid", "once"]),
    ("train", ["--eval_every", "500", "--eval_metrics", ""], ["an empty name", "fid"]),
    ("train", [*PUSH, "--hub_every", "-1"], ["hub_every is -1", "10000"]),
    ("train", [*PUSH, "--hub_license", "MIT or so"], ["hub_license is 'MIT or so'", "apache-2.0"]),
    ("train", ["--init", ""], ["init is an empty name", "run directory"]),
    ("train", ["--weighting", ""], ["weighting is ,", "debiased"]),
    ("train", ["--p2_gamma", "-1", "--weighting", "p2"], ["p2_gamma is -1", "such as 1"]),
    ("train", ["--snr_floor", "nan"], ["snr_floor is nan", "1e-3"]),
    ("train", ["--schedule_shift", "inf"], ["schedule_shift is inf", "such as 1"]),
    ("train", ["--max_grad_norm", "nan"], ["max_grad_norm is nan", "such as 1"]),
    ("train", ["--config", "digit"], ["config 'digit'", "digits"]),
    ("train", ["--config", "missing.yaml"], ["missing.yaml", "cannot be read"]),
    ("train", ["--config", FILE, "wieghting: p2\n"], ["did you mean weighting?"]),
    ("train", ["--config", FILE, "batch_size: 1.5\n"], ["batch_size is 1.5", "a whole number"]),
    ("train", ["--config", FILE, "class_conditional: 1\n"], ["class_conditional is 1", "true or false"]),
    ("train", ["--config", FILE, "ema_decay: [0.9, fast]\n"], ["ema_decay is", "a list, each a number"]),
    ("train", ["--config", FILE, "- seed\n"], ["holds a list", "name: value"]),
    ("train", ["--config", FILE, "[\n" * 5_000], ["nested too deeply"]),
    ("train", ["--config", FILE, "a: &a [*a]\n"], ["'a' is not a field"]),
    ("sample", ["model", "--steps", "0"], ["steps is 0", "such as 20"]),
    ("sample", ["model", "--num_images", "0"], ["num_images is 0", "such as 64"]),
    ("sample", ["model", "--num_images", "99999999999"], ["num_images is 99999999999", "10 million"]),
    ("sample", ["model", "--batch_size", "0"], ["batch_size is 0", "such as 64"]),
    ("sample", ["model", "--eta", "2", "--scheduler", "ddim"], ["eta is 2", "to 1"]),
    ("sample", ["model", "--seed", "4294967296"], ["seed is 4294967296", "such as 0"]),
    ("sample", ["model", "--guidance_scale", "-1"], ["guidance_scale is -1", "such as 1"]),
    ("sample", ["model", "--clipping", "dynamic", "--clipping_quantile", "0"], ["clipping_quantile is 0", "such as 0.995"]),
    ("sample", ["model", "--weights", "best"], ["weights is 'best'", "such as 0.999"]),
    ("sample", ["model", "--scheduler", "plms"], ["--scheduler", "unipc"]),
    ("sample", ["model", "--timesteps", "100", "300"], ["timesteps is [100, 300]", "such as 900 600 300 0"]),
    ("sample", ["model", "--sections", "10", "0"], ["sections is [10, 0]", "such as 10 20 40"]),
    ("sample", ["model", "--dtype", "float64"], ["--dtype", "bfloat16"]),
    ("sample", ["model", "--format", "gif"], ["--format", "webp"]),
    ("sample", ["model", "--num_threads", "0"], ["num_threads is 0", "such as 2"]),
    ("evaluate", ["measure"], ["eval.py measure is not known", "score"]),
    ("evaluate", ["score", "x", "--metrics", "fid,lpips"], ["metrics has lpips", "kid"]),
    ("evaluate", ["score", "x", "--steps", "20,many"], ["steps is 20,many", "such as 10,20,50"]),
    ("evaluate", ["score", "x", "--schedulers", "plms"], ["schedulers has plms", "unipc"]),
    ("evaluate", ["score", "x", "--checkpoints", "last"], ["checkpoints is last", "all"]),
    ("evaluate", ["score", "x", "--bootstrap", "-1"], ["bootstrap is -1", "such as 200"]),
    ("evaluate", ["compare", "x", "--num_images", "0"], ["num_images is 0", "such as 64"]),
    ("evaluate", ["stats", "x"], ["FILE.safetensors"]),
    ("evaluate", ["stats", "x", "o", "--metrics", ""], ["an empty name", "fid"]),
    ("evaluate", ["bpd", "x", "--batch_size", "0"], ["batch_size is 0", "such as 64"]),
    ("evaluate", ["weights", "--weighting", "debias"], ["did you mean debiased?"]),
    ("convert", ["guide"], ["convert guide is not known", "guided, export, single, lora"]),
    ("cache", ["digits", "--base_model", "digits"], ["precompute_dir is missing"]),
]

WRONG_COMBINATIONS = [
    ("train", ["--rescale_betas_zero_snr"], ["rescale_betas_zero_snr is on", "epsilon", "v_prediction"]),
    ("train", ["--noise_schedule", "cosine"], ["weighting debiased", "noise_schedule cosine", "--snr_floor 1e-3"]),
    ("train", ["--prediction_type", "sample", "--weighting", "debiased_kohya"], ["debiased_kohya", "sample", "--weighting debiased"]),
    ("train", ["--prediction_type", "flow", "--noise_schedule", "linear"], ["noise_schedule is linear", "prediction_type flow"]),
    ("train", ["--prediction_type", "flow", "--learn_sigma"], ["learn_sigma is True", "prediction_type flow"]),
    ("train", ["--learn_sigma", "--variance_type", "fixed_small"], ["variance_type is fixed_small", "learn_sigma"]),
    ("train", ["--weighting", "variational"], ["weighting variational", "add --learn_sigma"]),
    ("train", ["--snr_gamma", "3"], ["snr_gamma is 3", "weighting is debiased", "min_snr"]),
    ("train", ["--snr_floor", "2", "--snr_ceiling", "1"], ["snr_ceiling is 1", "snr_floor is 2"]),
    ("train", ["--terminal_weight_floor", "0.5"], ["terminal_weight_floor is 0.5", "rescale_betas_zero_snr"]),
    ("train", ["--timestep_mean", "1"], ["timestep_mean is 1", "timestep_sampler is uniform"]),
    ("train", ["--num_train_timesteps", "10"], ["num_train_timesteps is 10", "noise_schedule linear", "21"]),
    ("train", ["--resolution", "9"], ["resolution is 9", "channel_mult has 2 levels", "take"]),
    ("train", ["--resolution", "64", "--attention_resolutions", "5"], ["attention_resolutions names 5", "resolution 64"]),
    ("train", ["--attention_head_dim", "48"], ["attention_head_dim is 48", "channels", "16 does"]),
    ("train", ["--label_dropout", "0.2"], ["label_dropout is 0.2", "--class_conditional"]),
    ("train", ["--label_column", "digit"], ["label_column is digit", "--class_conditional"]),
    ("train", ["--model_config", "unet.json", "--dropout", "0.1"], ["model_config", "dropout"]),
    ("train", ["--warmup_steps", "9", "--max_steps", "5"], ["warmup_steps is 9", "max_steps is only 5"]),
    ("train", ["--compile_mode", "max-autotune"], ["compile_mode is max-autotune", "compile is off", "--compile"]),
    ("train", ["--keep_best"], ["keep_best is True", "eval_every is 0"]),
    ("train", ["--feature_extractor", "digits"], ["feature_extractor is digits", "eval_every is 0"]),
    ("train", ["--keep_best", "--eval_every", "7", "--checkpoint_every", "5"], ["eval_every 7", "checkpoint_every 5", "--eval_every 5"]),
    ("train", ["--batch_size", "64", "WORLD_SIZE=3"], ["batch_size is 64", "3 processes", "take 63"]),
    ("train", ["--push_to_hub"], ["push_to_hub is on", "hub_model_id is missing", "user/digits"]),
    ("train", ["--hub_every", "1000"], ["hub_every is 1000", "push_to_hub is off"]),
    ("train", ["--hub_private", "--hub_tags", "--hub_model_id", "user/x"], ["hub_private", "hub_tags", "hub_model_id", "--push_to_hub"]),
    ("train", [*PUSH, "--hub_every", "7", "--checkpoint_every", "5"], ["hub_every is 7", "checkpoint_every is 5", "--hub_every 5"]),
    ("train", [*PUSH, "--hub_every", "7", "--checkpoint_every", "0"], ["hub_every is 7", "checkpoint_every is 0", "--hub_every 0"]),
    ("train", ["--allow_pickle_import"], ["allow_pickle_import is on", "init"]),
    ("train", ["--output_dir", "TRAINED", "--config", TINY, "--seed", "5"], ["seed: the run has 0", "output_dir"]),
    ("train", ["--output_dir", "TRAINED", "--config", TINY, "--model_channels", "16"], ["model_channels: the run has 8", "says 16"]),
    ("train", ["--output_dir", "TRAINED", "--config", TINY, "--max_steps", "12"], ["max_steps is 12", "at step 24"]),
    ("sample", ["model", "--eta", "0.5"], ["eta is 0.5", "--scheduler ddim"]),
    ("sample", ["model", "--clipping_quantile", "0.9"], ["clipping_quantile is 0.9", "--clipping dynamic"]),
    ("sample", ["model", "--guidance_interval", "0", "500"], ["guidance_interval is 0 500", "guidance_scale is 1"]),
    ("sample", ["model", "--steps", "20", "--timesteps", "900", "0"], ["steps is 20", "timesteps is", "leave the others out"]),
    ("sample", ["model", "--sections", "9", "--spacing", "trailing"], ["sections is", "spacing is trailing", "leave the others out"]),
    ("evaluate", ["weights", "--snr_gamma", "3"], ["snr_gamma is 3", "no weight of debiased"]),
    ("evaluate", ["weights", "--against", "variational"], ["variational", "leave it out"]),
]

# Runs each command of a list in a process that cannot import torch, and tells how it ended, what it said, and how long it computed.
ALL_AT_ONCE = """
import contextlib, io, json, os, time
for program, arguments, environment in json.load(sys.stdin):
    os.environ.pop("WORLD_SIZE", None)
    os.environ.update(environment)
    said, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stderr(said):
        code = getattr(cli, program)(arguments)
    print(json.dumps([code, said.getvalue(), time.process_time() - began]))
"""


def answers(commands):
    listed = json.dumps([(program, [str(a) for a in arguments], environment) for program, arguments, environment in commands])
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH + ALL_AT_ONCE], cwd=ROOT, input=listed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
@pytest.mark.parametrize("table", [WRONG_VALUES, WRONG_COMBINATIONS], ids=["values", "combinations"])
def test_a_wrong_command_is_refused_at_once_without_torch(table, trained, tmp_path, trials):
    commands = []
    for number, (program, arguments, _) in enumerate(table):
        arguments, environment = [str(trained) if a == "TRAINED" else a for a in arguments], {}
        if FILE in arguments:
            *arguments, content = arguments
            path = tmp_path / f"{number}.yaml"
            path.write_text(content)
            arguments = [str(path) if a == FILE else a for a in arguments]
        if str(arguments[-1]).startswith("WORLD_SIZE="):
            environment = {"WORLD_SIZE": arguments.pop().split("=")[1]}
        if program == "train" and "--output_dir" not in arguments:
            arguments += TRAIN
        commands.append((program, arguments, environment))
    for (program, arguments, _), (_, _, named), (code, said, seconds) in zip(commands, table, answers(commands), strict=True):
        trials()
        assert code == 2 and "Traceback" not in said, (program, arguments, said)
        assert all(text in said for text in named), (program, arguments, said)
        assert seconds <= 1, (program, arguments, seconds)
    assert not (ROOT / "never").exists()


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
def test_all_problems_of_a_command_are_told_together():
    """Every change of one value that is wrong by itself, all in one command."""
    wrong = {"batch_size": 0, "learning_rate": -1.0, "seed": -1, "dropout": 2.0, "weighting": "debias", "num_workers": -1, "max_steps": 0}
    wrong |= {"keep_checkpoints": 0, "ema_decay": (2.0,), "channels": 2, "rescale_betas_zero_snr": True, "label_dropout": 0.2}
    problems = train_problems(updated(train_config(TRAIN, None), wrong))
    assert all(any(name in problem for problem in problems) for name in wrong)
    ((code, said, _),) = answers([("train", [*TRAIN, "--batch_size", "0", "--seed", "-1", "--max_steps", "0", "--keep_best"], {})])
    assert code == 2 and all(name in said for name in ("batch_size is 0", "seed is -1", "max_steps is 0", "keep_best is True"))


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
@pytest.mark.parametrize(
    "arguments, named",
    [
        ([*train_args("RUN"), "--mixed_precision", "fp16", "--dataset", "nowhere"], ["mixed_precision is fp16", "bf16"]),
        ([*train_args("RUN"), "--report_to", "wandb", "--dataset", "nowhere"], ["report_to is wandb", "pip install wandb"]),
        (["sample.py", "TRAINED", "--guidance_scale", "2", "--output_dir", "RUN"], ["guidance_scale is 2", "--guidance_scale 1"]),
        (["sample.py", "TRAINED", "--class_labels", "1", "--output_dir", "RUN"], ["class_labels are given", "leave them out"]),
        (["sample.py", "TRAINED", "--steps", "1001", "--output_dir", "RUN"], ["1001", "1000"]),
        (["sample.py", "TRAINED", "--dtype", "float16", "--output_dir", "RUN"], ["dtype is float16", "bfloat16"]),
        (["sample.py", "TRAINED", "--weights", "0.5", "--output_dir", "RUN"], ["weights is 0.5", "[0.9, 0.99]"]),
        (["sample.py", "RUN"], ["RUN"]),
    ],
)
def test_what_machine_or_model_cannot_do_is_refused_before_data_or_network(arguments, named, trained, tmp_path):
    known = {"TRAINED": str(trained), "RUN": str(tmp_path / "RUN")}
    code, _, err = run(*(known.get(str(a), a) for a in arguments))
    assert code == 2 and "Traceback" not in err and all(text in err.splitlines()[-1] for text in named), err
    assert newest_step(tmp_path / "RUN") == 0 and not list(tmp_path.rglob("*.png"))


def flags_of(kind):
    """Names of the flags of a command."""
    for field in dataclasses.fields(kind):
        inner = field.default_factory if dataclasses.is_dataclass(field.default_factory) else None
        yield from (part.name for part in dataclasses.fields(inner)) if inner else [field.name]


def misspelt(name):
    """A letter left out, two letters swapped, no underscores."""
    middle = len(name) // 2
    without, swapped = name[:middle] + name[middle + 1 :], name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    return {without, swapped, name.replace("_", "")} - {name}


# Shorter names have nothing to be recognised by, and two are positions, not flags.
MISSPELT = [
    (kind, name, wrong)
    for kind in (TrainConfig, SampleConfig, ScoreConfig)
    for name in flags_of(kind)
    if len(name) >= 5 and name not in ("targets", "model")
    for wrong in sorted(misspelt(name))
]


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
@pytest.mark.parametrize("chosen", [MISSPELT[::28], pytest.param(MISSPELT, marks=pytest.mark.nightly)], ids=["some", "all"])
def test_a_misspelt_flag_suggests_the_right_one(chosen, trials):
    for kind, name, wrong in chosen:
        trials()
        with pytest.raises(InputError) as error:
            train_config([f"--{wrong}", "3"], None) if kind is TrainConfig else parse(kind, ["x", f"--{wrong}", "3"], "p")
        assert f"did you mean --{name}?" in str(error.value)


# ---- every field does something --------------------------------------------------------------------------------------

METRICS, WEIGHTS, SCHEDULER = "metrics", "weights", "scheduler"  # where the effect of a field is seen
FLOW = {"prediction_type": "flow", "noise_schedule": None}
CLASSES = {"class_conditional": True}
PUSHED = {"push_to_hub": True, "hub_model_id": "user/digits"}
# A text-to-image model, with the defaults for the fields of the network of a pixel model.
TEXT = {
    **{field.name: field.default for field in dataclasses.fields(ModelConfig)},
    "task": "text_to_image", "base_model": "BASE", "noise_schedule": "scaled_linear", "schedule_shift": 1.0,
}  # fmt: skip
BIASED = {
    "timestep_bias_strategy": "range", "timestep_bias_multiplier": 9.0, "timestep_bias_begin": 100, "timestep_bias_end": 900,
}  # fmt: skip
CAPTIONED = {**TEXT, "dataset": "CAPTIONED", "image_column": "image", "caption_column": "first"}

# field: (what both runs have, what one of them has, where they must differ; None where the training itself must not)
FIELDS = {
    "dataset": ({}, "OTHER", METRICS),
    "split": ({"dataset": "SAVED", "image_column": "one"}, "test", METRICS),
    "image_column": ({"dataset": "SAVED", "image_column": "one"}, "other", METRICS),
    "label_column": ({"dataset": "SAVED", "image_column": "one", "label_column": "odd", **CLASSES}, "third", METRICS),
    "resolution": ({}, 4, METRICS),
    "channels": ({}, 3, METRICS),
    "class_conditional": ({}, True, METRICS),
    "label_dropout": (CLASSES, 0.9, METRICS),
    "random_flip": ({}, True, METRICS),
    "shuffle_window": ({}, 2, METRICS),
    "folder_repeats": ({"dataset": "FOLDERS"}, True, METRICS),
    "validation_split": ({"validation_split": 0.1, "validation_every": 2}, 0.3, METRICS),
    "shard_cache_gb": ({}, 1.0, None),
    "check_images": ({}, "none", None),
    "skip_bad": ({}, True, None),
    "jpeg_draft": ({"dataset": "JPEGS"}, True, METRICS),
    "num_workers": ({}, 1, None),
    "cache_images_mb": ({}, 0, None),
    "base_model": (TEXT, "OTHER_BASE", METRICS),
    "vae": (TEXT, "OTHER_BASE", METRICS),
    "caption_column": ({**CAPTIONED, "caption_column": "first"}, "second", METRICS),
    "caption_dropout": (TEXT, 0.9, METRICS),
    "null_caption": ({**TEXT, "caption_dropout": 0.5}, "empty", METRICS),
    "shuffle_caption": (CAPTIONED, True, METRICS),
    "keep_tokens": ({**CAPTIONED, "shuffle_caption": True}, 2, METRICS),
    "caption_chunks": (TEXT, 2, METRICS),
    "crop": (CAPTIONED, "random", METRICS),
    "crop_per_image": ({**CAPTIONED, "crop": "random"}, True, METRICS),
    "aspect_ratio_buckets": ({**CAPTIONED, "resolution": 32}, True, METRICS),
    "precompute_dir": (TEXT, "elsewhere", None),
    "sample_prompts": (TEXT, ("a handwritten seven",), None),
    "sample_guidance_scale": (TEXT, 2.0, None),
    "clip_model": ({**TEXT, "eval_every": 5000, "eval_metrics": "clip_score", "clip_model": "one"}, "other", None),
    "lora_rank": (TEXT, 4, METRICS),
    "lora_alpha": ({**TEXT, "lora_rank": 4}, 8.0, METRICS),
    "lora_targets": ({**TEXT, "lora_rank": 4}, ("to_q",), METRICS),
    "lora_text_encoders": ({**TEXT, "lora_rank": 4}, True, METRICS),
    "size": ({}, "tiny", None),
    "model_channels": ({}, 16, METRICS),
    "channel_mult": ({}, (1, 1), METRICS),
    "layers_per_block": ({}, 2, METRICS),
    "attention_resolutions": ({}, (8, 4), METRICS),
    "attention_head_dim": ({}, 4, METRICS),
    "resblock_updown": ({}, True, METRICS),
    "resnet_time_scale_shift": ({}, "scale_shift", METRICS),
    "dropout": ({}, 0.5, METRICS),
    "model_config": ({}, "UNET", METRICS),
    "prediction_type": ({}, "v_prediction", METRICS),
    "weighting": ({}, "constant", METRICS),
    "snr_gamma": ({"weighting": "min_snr"}, 1.0, METRICS),
    "p2_k": ({"weighting": "p2"}, 2.0, METRICS),
    "p2_gamma": ({"weighting": "p2"}, 0.5, METRICS),
    "sigma_data": ({"weighting": "edm"}, 0.7, METRICS),
    "sigmoid_bias": ({"weighting": "sigmoid"}, 1.0, METRICS),
    "schedule_free_weights": ({}, True, METRICS),
    "learned_uncertainty": ({}, True, METRICS),
    "snr_floor": ({}, 0.1, METRICS),
    "snr_ceiling": ({}, 1.0, METRICS),
    "terminal_weight_floor": ({**FLOW, "num_train_timesteps": 4}, 0.5, METRICS),
    "normalize_weights": ({}, True, METRICS),
    "noise_schedule": ({"snr_floor": 1e-3}, "cosine", METRICS),
    "num_train_timesteps": ({}, 500, METRICS),
    "schedule_shift": ({}, 4.0, METRICS),
    "rescale_betas_zero_snr": ({"prediction_type": "v_prediction"}, True, METRICS),
    "learn_sigma": ({}, True, METRICS),
    "variance_type": ({}, "fixed_small", SCHEDULER),
    "timestep_sampler": ({}, "stratified", METRICS),
    "timestep_mean": ({"timestep_sampler": "logit_normal"}, 1.0, METRICS),
    "timestep_std": ({"timestep_sampler": "logit_normal"}, 2.0, METRICS),
    "laplace_mean": ({"timestep_sampler": "laplace"}, 1.0, METRICS),
    "laplace_scale": ({"timestep_sampler": "laplace"}, 2.0, METRICS),
    "mode_scale": ({"timestep_sampler": "mode"}, -0.5, METRICS),
    "speed_k": ({"timestep_sampler": "speed"}, 2.0, METRICS),
    "speed_portion": ({"timestep_sampler": "speed"}, 0.2, METRICS),
    "speed_lambda": ({"timestep_sampler": "speed"}, 0.9, METRICS),
    "timestep_sampler_after": ({"timestep_sampler_after": "stratified", "timestep_sampler_switch": 1}, "mode", METRICS),
    "timestep_sampler_switch": ({"timestep_sampler_after": "stratified", "timestep_sampler_switch": 1}, 2, METRICS),
    "timestep_bias_strategy": ({"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 3.0}, "later", METRICS),
    "timestep_bias_multiplier": ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 3.0}, 9.0, METRICS),
    "timestep_bias_portion": ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 9.0}, 0.9, METRICS),
    "timestep_bias_begin": (BIASED, 600, METRICS),
    "timestep_bias_end": (BIASED, 600, METRICS),
    "noise_offset": ({}, 0.1, METRICS),
    "pyramid_noise_discount": ({}, 0.5, METRICS),
    "pyramid_noise_iterations": ({"pyramid_noise_discount": 0.5}, 1, METRICS),
    "input_perturbation": ({}, 0.1, METRICS),
    "batch_size": ({}, 4, METRICS),
    "micro_batch_size": ({}, 4, None),
    "max_steps": ({}, 4, METRICS),
    "num_epochs": ({"max_steps": 100_000}, 2.0, None),
    "max_hours": ({}, 1.0, None),
    "optimizer": ({}, "adafactor", METRICS),
    "learning_rate": ({}, 1e-2, METRICS),
    "lr_schedule": ({}, "constant", METRICS),
    "warmup_steps": ({}, 2, METRICS),
    "weight_decay": ({}, 0.5, METRICS),
    "max_grad_norm": ({}, 0.01, METRICS),
    "ema_decay": ({}, (0.5,), WEIGHTS),
    "ema_warmup": ({}, True, WEIGHTS),
    "post_hoc_ema": ({"checkpoint_every": 1}, 32, None),
    "ema_on_cpu": ({}, True, None),
    "init": ({}, "TRAINED", METRICS),
    "allow_pickle_import": ({"init": "TRAINED"}, True, None),
    "mixed_precision": ({}, "bf16", METRICS),
    "param_dtype": ({"mixed_precision": "bf16"}, "bf16", METRICS),
    "gradient_checkpointing": ({}, True, None),
    "compile": ({}, True, None),
    "compile_mode": ({"compile": True}, "reduce-overhead", None),
    "deterministic": ({}, True, None),
    "num_threads": ({}, 2, None),
    "seed": ({}, 1, METRICS),
    "output_dir": ({}, "elsewhere", None),
    "checkpoint_every": ({}, 2, None),
    "keep_checkpoints": ({}, 1, None),
    "sharded_checkpoints": ({}, True, None),
    "sample_every": ({}, 2, None),
    "log_every": ({}, 2, None),
    "validation_every": ({"validation_split": 0.1, "validation_every": 1}, 3, None),
    "eval_every": ({}, 2, None),
    "eval_metrics": ({"eval_every": 2}, "colour", None),
    "eval_images": ({"eval_every": 2}, 80, None),
    "feature_extractor": ({"eval_every": 2}, "digits", None),
    "feature_extractor_weights": ({"eval_every": 2}, "some.safetensors", None),
    "cache_dir": ({"eval_every": 2}, "elsewhere", None),
    "keep_best": ({"eval_every": 2, "checkpoint_every": 2}, True, None),
    "ddp_timeout": ({}, 60, None),
    "report_to": ({}, ("tensorboard",), None),
    "allow_change": ({}, ("dataset",), None),
    "accept_changed_data": ({}, True, None),
    "dry_run": ({}, True, None),
    "verbose": ({"dry_run": True}, True, None),
    "push_to_hub": ({}, True, None),
    "hub_model_id": (PUSHED, "user/other", None),
    "hub_private": (PUSHED, True, None),
    "hub_every": (PUSHED, 0, None),
    "hub_tags": (PUSHED, True, None),
    "hub_license": (PUSHED, "apache-2.0", None),
}
SHAPING = [name for name, (_, _, seen) in FIELDS.items() if seen]
FEW = ["weighting", "label_dropout", "variance_type", "ema_decay"]


@pytest.fixture(scope="module")
def places(trained, tmp_path_factory):
    """What names in the table stand for: a folder of images, a saved data set with two of everything, a network, a run."""
    folder = tmp_path_factory.mktemp("fields")
    generator = np.random.default_rng(0)
    pictures = [Picture.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(24)]
    (folder / "images").mkdir()
    for number, picture in enumerate(pictures[:9]):
        picture.save(folder / "images" / f"{number}.png")
    features = Features({"one": Image(), "other": Image(), "odd": ClassLabel(2), "third": ClassLabel(3)})
    rows = [{"one": p, "other": pictures[k - 1], "odd": k % 2, "third": k % 3} for k, p in enumerate(pictures)]
    parts = {"train": rows[:12], "test": rows[12:]}
    DatasetDict({name: Dataset.from_list(part, features=features) for name, part in parts.items()}).save_to_disk(folder / "saved")
    network = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 8}
    (folder / "unet.json").write_text(json.dumps(network))
    for number, picture in enumerate(pictures[:8]):
        place = folder / "folders" / ("3_often" if number < 4 else "once") / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture.save(place)
    (folder / "jpegs").mkdir()
    for number, picture in enumerate(pictures[:8]):
        picture.resize((64, 64)).rotate(30).save(folder / "jpegs" / f"{number}.jpg")
    wide = [Picture.fromarray(generator.integers(0, 256, (8, 14, 3), dtype=np.uint8)) for _ in range(12)]
    words = [{"image": p, "first": f"{k}, a, b, c, d", "second": f"number {k}"} for k, p in enumerate(wide)]
    texts = Features({"image": Image(), "first": Value("string"), "second": Value("string")})
    Dataset.from_list(words, features=texts).save_to_disk(folder / "captioned")
    bases = {name: make_base(folder / name, seed=seed) for seed, name in enumerate(("BASE", "OTHER_BASE"))}
    named = {"OTHER": "images", "SAVED": "saved", "FOLDERS": "folders", "JPEGS": "jpegs", "CAPTIONED": "captioned", "UNET": "unet.json"}
    return {name: folder / file for name, file in named.items()} | {"TRAINED": trained, **bases}


TINY_CONFIG = tiny("x")


def pair(name, places, folder):
    """Two configurations of three steps that differ in one field."""
    base, value, _ = FIELDS[name]
    usual = {"max_steps": 3, "warmup_steps": 0, "checkpoint_every": 0, "ema_decay": (0.9,)}
    config = updated(TINY_CONFIG, {**usual, **base, "output_dir": str(folder / "before")})
    other = {name: value, "output_dir": str(folder / "after")} if name != "output_dir" else {name: value}
    if name == "model_config":
        other |= {field.name: field.default for field in dataclasses.fields(config.model) if field.name != name}
    if name == "push_to_hub":
        other["hub_model_id"] = "user/digits"
    changed = updated(config, other)
    return [
        updated(each, {k: str(places[v]) for k, v in flatten(each).items() if isinstance(v, str) and v in places})
        for each in (config, changed)
    ]


@pytest.mark.row(37, "changing any field of the configuration changes what is saved, and a field of the training changes the result")
def test_every_field_is_in_the_table():
    assert list(FIELDS) == [name for name in flatten(TrainConfig()) if name != "task"]  # which follows from base_model
    plain = TrainConfig()
    sections = (plain.data, plain.text, plain.lora, plain.model, plain.objective, plain.noise, plain.optimization)
    shaping = {name for section in sections for name in dataclasses.asdict(section)} - {
        "task",
        "sample_prompts",
        "sample_guidance_scale",
        "clip_model",
        "precompute_dir",  # the same bits from the disk: test_precompute
        "num_epochs",  # stands for max_steps
        "shard_cache_gb",
        "check_images",  # likewise
        "skip_bad",  # shapes the training where there are images to skip, which row 25 shows
        "num_workers",
        "cache_images_mb",
        "size",  # stands for numbers before anything is compared or stored: test_choices
        "ema_on_cpu",
        "post_hoc_ema",
        "gradient_checkpointing",
        "compile",  # to the last digits, which is said on a resume
        "compile_mode",
        "deterministic",
        "micro_batch_size",
        "max_hours",
        "num_threads",
        "allow_pickle_import",
    }
    assert set(SHAPING) == shaping


@pytest.mark.row(37, "changing any field of the configuration changes what is saved, and a field of the training changes the result")
def test_a_changed_field_is_seen_in_what_is_stored_and_stops_a_resume(places, tmp_path, trials):
    for name in FIELDS:
        trials()
        config, changed = pair(name, places, tmp_path)
        assert train_problems(config) == [] and train_problems(changed) == [], name
        assert (to_json(config) != to_json(changed)) == (name not in NOT_STORED), name
        before, now = (json.loads(json.dumps(stored(each))) for each in (config, changed))
        others = {field.name for field in dataclasses.fields(config.model)} if name == "model_config" else set()
        assert {line.split(":")[0] for line in differences(before, now)} - others == {name} - CHANGEABLE - others


def seen_in(folder, where):
    if where == SCHEDULER:
        return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() if where == WEIGHTS else metrics(folder)


@pytest.mark.row(37, "changing any field of the configuration changes what is saved, and a field of the training changes the result")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FEW else pytest.mark.nightly) for name in SHAPING])
def test_a_changed_field_is_seen_in_what_is_learned(name, places, tmp_path):
    for config in pair(name, places, tmp_path):
        trained_here(config)
    one, other = (seen_in(tmp_path / folder, FIELDS[name][2]) for folder in ("before", "after"))
    assert one != other


@pytest.mark.row(37, "changing any field of the configuration changes what is saved, and a field of the training changes the result")
def test_what_is_learned_does_not_change_by_itself(places, tmp_path):
    """So that a difference is the field's."""
    config, _ = pair("seed", places, tmp_path)
    for each in (config, updated(config, {"output_dir": str(tmp_path / "again")})):
        trained_here(each)
    for where in (METRICS, WEIGHTS, SCHEDULER):
        assert seen_in(tmp_path / "before", where) == seen_in(tmp_path / "again", where)
