"""What the command line says: help, version, its own name, and what was meant by what it does not know."""

import os
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from conftest import ROOT

from debias_diffusers import __version__, cli
from debias_diffusers.config import aliases, loading
from debias_diffusers.config.ranges import field_types
from debias_diffusers.config.registry import SOLVERS, WEIGHTINGS
from debias_diffusers.config.schema.conversion import ExportConfig, GuidedConfig
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.evaluation import BiasConfig, BitsConfig, ScoreConfig, StatsConfig
from debias_diffusers.config.schema.hub import PushConfig
from debias_diffusers.config.schema.objective import WeightsConfig
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.config.validation.evaluation import score_problems
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.data.labels import label_indices
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation.feature_extractors import Extractor
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.utils import launcher
from debias_diffusers.utils.files import read_json_object

COMMANDS = (
    *(["train"], ["sample"], ["eval", "score"], ["eval", "compare"], ["eval", "stats"], ["eval", "bpd"], ["eval", "weights"]),
    *(["eval", "bias"], ["convert", "guided"], ["convert", "export"], ["hub", "push"]),
)


def said(capsys, *arguments):
    """What `python -m debias_diffusers` prints, without the boxes and on one line."""
    cli.main(arguments)
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).replace("│", " ").split())


def default(text, flag):
    """The default that a help prints for a flag; None if none."""
    return re.search(rf" --{flag} (?:(?! --).)*?\(default: ([^)]*)\)", text)


def test_help_has_the_defaults_of_the_fields_or_of_a_configuration(capsys):
    plain, digits = said(capsys, "train", "--help"), said(capsys, "train", "--config", "digits", "--help")
    for name, neutral, of_digits in (("model_channels", "128", "32"), ("max_steps", "100000", "2500"), ("schedule_shift", "1.0", "64.0")):
        assert (default(plain, name)[1], default(digits, name)[1]) == (neutral, of_digits)
    assert said(capsys, "train", "-h", "--config", "digits") == digits
    assert "--resolution INTEGER image size in pixels: resize of the shorter side, then center crop --channels" in plain  # left out


def test_help_says_which_packaged_configuration_changes_what(capsys):
    text, defaults = said(capsys, "train", "--help"), loading.flatten(TrainConfig())
    assert "digits: dataset digits, resolution 8, num_workers 0, model_channels 32, channel_mult 1 2," in text
    changes = loading.preset_changes()
    assert sorted(name for names in changes for name in names.split(", ")) == loading.packaged_configs()
    for names, values in changes.items():
        assert f"{names}: {values}" in text
        for name in names.split(", "):
            changed = {key for key, value in loading.read_config(name).items() if value != defaults[key]} - {"output_dir"}
            assert {value.split()[0] for value in values.split(", ")} == changed


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_and_version_of_every_command(command, capsys):
    text = said(capsys, *command, "--help")
    assert text.startswith(f"usage: python -m debias_diffusers {' '.join(command)} [-h]")
    assert not re.search(r"None\||\{None|\[\[|\b(STR|INT|FLOAT)\b|default: (None|''|\))", text), text
    assert said(capsys, *command, "--version") == f"debias_diffusers {__version__}"


def test_version_of_what_has_commands(capsys):
    for command in ([], ["eval"], ["convert"], ["hub"]):
        assert said(capsys, *command, "--version") == f"debias_diffusers {__version__}"


@pytest.mark.parametrize(
    "entry, argv, name",
    [
        ("train", ["train.py", "--max_stepz", "1"], "train.py"),
        ("train", ["/opt/bin/debias-train", "--max_stepz", "1"], "debias-train"),
        ("main", ["/x/debias_diffusers/__main__.py", "train", "--max_stepz", "1"], "python -m debias_diffusers train"),
        ("main", ["/x/debias_diffusers/__main__.py", "eval", "bpd", "x", "--max_stepz"], "python -m debias_diffusers eval bpd"),
        ("evaluate", ["/opt/bin/debias-eval", "stats", "x", "y", "--max_stepz"], "debias-eval stats"),
        ("convert", ["/x/debias_diffusers/convert/__main__.py", "export", "x"], "python -m debias_diffusers.convert export"),
        ("push", ["/x/debias_diffusers/hub/__main__.py", "push"], "python -m debias_diffusers.hub push"),
    ],
)
def test_a_command_names_itself_as_it_was_called(entry, argv, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", argv)
    assert getattr(cli, entry)() == 2
    assert capsys.readouterr().err.endswith(f"; {name} --help lists all flags\n")


# ---- what was meant --------------------------------------------------------------------------------------------------

KINDS = (
    *(TrainConfig, WeightsConfig, SampleConfig, ScoreConfig, StatsConfig),
    *(BitsConfig, BiasConfig, GuidedConfig, ExportConfig, PushConfig),
)


def test_flags_of_the_table_of_other_trainers_are_answered():
    """Of diffusers' scripts and sd-scripts, whose settings are flags; of those that have another meaning here, none can be."""
    table = (ROOT / "docs" / "text_to_image.md").read_text().partition("## Moving from another trainer")[2].partition("## Not there")[0]
    rows = [line.split("|")[2:4] for line in table.splitlines() if line.startswith("| `")]
    names = {name for row in rows for cell in row for name in re.findall(r"`(\w+)[ `]", cell)} - field_types(TrainConfig).keys()
    assert len(names) > 30 and [name for name in names if not aliases.suggestion(name, TrainConfig)] == []


def test_every_suggestion_is_a_flag_with_a_value_that_it_has():
    for names, meant, differs in aliases._ROWS:
        fields = aliases.fields_of(f"{meant} {differs}")
        positions = {name.lower() for name in re.findall(r"\b[A-Z]+\b", meant)}
        kinds = [kind for kind in KINDS if fields | positions <= field_types(kind).keys()]
        assert kinds, names
        assert all(set(names.split()) - field_types(kind).keys() for kind in kinds), names
        for name, value in re.findall(r"--(\w+) (?!or\b)(\w+)", meant):
            hint = field_types(kinds[0])[name]
            choices = {*get_args(hint), *(choice for one in get_args(hint) for choice in get_args(one))}
            assert value in choices or value in WEIGHTINGS or int in choices, (names, value)
    for name, values in aliases._VALUES.items():
        hints = [field_types(kind)[name] for kind in KINDS if name in field_types(kind)]
        known = {choice for hint in hints for one in (hint, *get_args(hint)) for choice in get_args(one)} or {*WEIGHTINGS, *SOLVERS}
        assert set(values.values()) <= known and not known & values.keys(), name


MEANT = {  # by eye; "" where no flag is the same
    **dict.fromkeys(("lr", "learningrate", "peak_lr", "train_lr"), "--learning_rate"),
    **dict.fromkeys(("steps", "max_train_steps", "num_steps", "max_step"), "--max_steps"),
    **dict.fromkeys(("epochs", "num_train_epochs"), "--num_epochs"),
    **dict.fromkeys(("train_batch_size", "batch"), "--batch_size"),
    **dict.fromkeys(("gradient_accumulation_steps", "microbatch"), "--micro_batch_size"),
    **dict.fromkeys(("lr_scheduler", "lr-scheduler"), "--lr_schedule"),
    **dict.fromkeys(("lr_warmup_steps", "warmup_epochs", "warm"), "--warmup_steps"),
    **dict.fromkeys(("schedule", "scheduler"), "--noise_schedule or --lr_schedule"),
    **dict.fromkeys(("ema", "ema_rate"), "--ema_decay"),
    **dict.fromkeys(("image_size", "img_size"), "--resolution"),
    **dict.fromkeys(("num_heads", "heads"), "--attention_head_dim"),
    "threads": "--num_threads",
    "resum": "--resume",
    "sampling_timesteps": "",
    "num_channels": "--model_channels",
    "save_every": "--checkpoint_every",
    "sample_steps": "--sample_every",
    "pretrained_model_name_or_path": "--init or --base_model",
    "unconditional": "--no_class_conditional",
    "decay": "--ema_decay or --weight_decay",
    "grad_norm": "--max_grad_norm",
    "fp16": "--mixed_precision fp16",
    "v_prediction": "--prediction_type v_prediction",
    "dropout_rate": "--dropout",
    "hub_repo": "--hub_model_id",
    "use_8bit_adam": "--optimizer adamw8bit",
    "optim": "--optimizer",
    **dict.fromkeys(("num_samples", "patch_size", "momentum", "beta_start", "adam_beta1", "eval_batch_size", "gpu"), ""),
    **dict.fromkeys(("network_dim", "rank"), "--lora_rank"),
    "validation_prompt": "--sample_prompts",
    "scale_v_pred_loss_like_noise_pred": "--weighting constant",
    **dict.fromkeys(("lora_dropout", "huber_schedule", "save_precision"), ""),
    **dict.fromkeys(("proportion_empty_prompts", "caption_dropout_rate"), "--caption_dropout"),
    **dict.fromkeys(("resume_from_checkpoint", "num_images", "size", "rate", "name", "val_data", "temperature"), ""),
}


def test_what_people_type_leads_to_the_flag_of_the_same_meaning():
    for typed, meant in MEANT.items():
        found = re.match(r"did you mean (.*)\?", aliases.suggestion(typed, TrainConfig))
        assert (found[1] if found else "") == meant, typed
    assert aliases.suggestion("steps_", SampleConfig) == "did you mean --steps?"
    assert aliases.suggestion("batch", SampleConfig) == "did you mean --batch_size? (images of one process)"
    assert aliases.suggestion("ckpt", SampleConfig) == "did you mean MODEL? (it stands first, without a flag)"


def test_flags_of_the_reference_lead_to_what_the_documentation_says():
    text = (ROOT / "docs" / "from_the_reference.md").read_text()
    rows = re.findall(r"^\| (`[a-z].*?) \| (.*) \|$", text[text.index("| reference (default) | here |") :], re.M)
    assert len(rows) > 20
    for left, right in rows:
        kind = SampleConfig if "sample.py" in right or "clipping" in right else TrainConfig
        for name in re.findall(r"`([a-z_0-9]+)`", left):
            flags = aliases.fields_of(aliases.suggestion(name, kind)) | ({name} & field_types(kind).keys())
            assert flags & aliases.fields_of(right), (name, right)


@pytest.mark.parametrize(
    "typed, differs",
    [
        ("pretrained_model_name_or_path", "a text-to-image model"),
        ("train_batch_size", "all processes"),
        ("gradient_accumulation_steps", "one forward pass"),
        ("num_train_epochs", "in place of --max_steps"),
        ("resume_from_checkpoint", "the same command"),
        ("network_dim", "did you mean --lora_rank"),
        ("network_alpha", "did you mean --lora_alpha"),
        ("validation_prompt", "prompts of the sample grids"),
        ("proportion_empty_prompts", "did you mean --caption_dropout"),
        ("caption_dropout_rate", "did you mean --caption_dropout"),
        ("use_8bit_adam", "did you mean --optimizer adamw8bit"),
    ],
)
def test_a_flag_of_another_trainer_is_refused_with_what_differs(typed, differs):
    with pytest.raises(InputError, match=rf"^Unrecognized options: --{typed}, 1; .*{differs}"):
        cli.train_config([f"--{typed}", "1"], None)


def test_every_unknown_flag_of_a_command_is_answered():
    with pytest.raises(InputError) as error:
        cli.train_config(["--lr", "1e-4", "--num_train_epochs=3", "--zzz"], None)
    first, *lines, last = str(error.value).splitlines()
    assert first == "Unrecognized options: --lr, 1e-4, --num_train_epochs=3, --zzz" and last == "train.py --help lists all flags"
    assert [line.split("?")[0] for line in lines] == [
        "  - --lr: did you mean --learning_rate",
        "  - --num_train_epochs: did you mean --num_epochs",
    ]


@pytest.mark.parametrize(
    "flags, meant",
    [
        (["--prediction_type", "v"], "did you mean v_prediction?"),
        (["--prediction_type", "eps"], "did you mean epsilon?"),
        (["--prediction_type=x0"], "did you mean sample?"),
        (["--noise_schedule", "squaredcos_cap_v2"], "did you mean cosine?"),
        (["--timestep_sampler", "loss-second-moment"], "did you mean loss_second_moment?"),
        (["--mixed_precision", "bfloat16"], "did you mean bf16?"),
        (["--channel_mult", "1,2,2"], "it takes INTEGER ..., but has 1,2,2; separate the values by spaces: --channel_mult 1 2 2"),
        (["--attention_resolutions=16, 8"], "separate the values by spaces: --attention_resolutions 16 8"),
        (["--max_steps", "1e5"], "'1e5'; did you mean 100000?"),
        (["--resolution", "many"], "Error parsing --resolution: invalid literal for int() with base 10: 'many'; train.py"),
        (["--class_conditional", "True"], "--class_conditional takes no value; type --class_conditional or --no_class_conditional"),
        (["--random_flip=1"], "--random_flip takes no value"),
        (["--random_flip", "--lr", "1"], "Unrecognized options: --lr, 1; did you mean --learning_rate?"),
        (["--size", "huge"], "invalid choice 'huge' for argument '--size'"),
    ],
)
def test_a_value_as_others_write_it_is_told_how_to_type_it(flags, meant):
    with pytest.raises(InputError) as error:
        cli.train_config(flags, None)
    assert meant in str(error.value) and "\n" not in str(error.value)


def test_class_labels_with_commas_are_told_to_be_apart():
    with pytest.raises(InputError, match=r"has cat,dog, but the model's classes are cat, dog; separate the values by spaces: cat dog$"):
        label_indices(("cat,dog",), ["cat", "dog"])


def test_a_configuration_file_has_the_same_suggestions(tmp_path):
    file = tmp_path / "other.yaml"
    file.write_text(
        "lr: 1\nnum_images: 3\nprediction_type: v\nchannel_mult: 1,2,2\nmax_steps: 1e5\nfp16: true\nseed: no\nlr_schedule: step\n"
    )
    with pytest.raises(InputError) as error:
        loading.read_config(str(file))
    assert [line.partition("; ")[2] for line in str(error.value).splitlines()[1:]] == [
        "did you mean learning_rate?", "that is a flag of sample.py", "did you mean v_prediction?", "write [1, 2, 2]",
        "did you mean 100000?", "did you mean mixed_precision fp16?", "", "",
    ]  # fmt: skip


def test_a_weighting_or_solver_by_another_name():
    (problem,) = score_problems(ScoreConfig(targets=("x",), schedulers="DDIM"))
    assert problem == "schedulers has DDIM, which is not known; take ddim"
    for field, typed, meant in (("dtype", "float64", ""), ("dtype", "bfloat", ""), ("dtype", "fp16", "float16"), ("format", "jpg", "")):
        choices = get_args(field_types(SampleConfig)[field])
        assert aliases.value_suggestion(field, typed, choices) == meant
    for typed, meant in (("min-snr", "min_snr"), ("debias", "debiased"), ("uniform", "constant")):
        problems = train_problems(cli.train_config(["--weighting", typed], None))
        assert [problem for problem in problems if f"weighting is {typed}, which is not known; did you mean {meant}?" in problem]


# ---- what a problem advises works ------------------------------------------------------------------------------------

ADVISED = (  # commands whose problem names what to take instead
    *(
        "--max_steps -5",
        "--warmup_steps -1 --max_steps 50",
        "--warmup_steps 9 --max_steps 5",
        "--prediction_type flow --noise_schedule linear",
    ),
    *("--keep_best --eval_every 7 --checkpoint_every 0", "--keep_best --eval_every 7 --checkpoint_every -1"),
    *(
        "--push_to_hub --hub_model_id u/x --hub_every 7 --checkpoint_every 5",
        "--push_to_hub --hub_model_id u/x --hub_every 7 --checkpoint_every -5",
    ),
    *(
        "--rescale_betas_zero_snr --batch_size 0",
        "--noise_schedule cosine --seed -1",
        "--terminal_weight_floor 0.5",
        "--num_train_timesteps 10",
    ),
    "--attention_head_dim 48 --model_channels 20 --channel_mult 3 4 --attention_resolutions 8",
    "--channel_mult 0 --resolution 9 --attention_resolutions 9",
)


def advised(problem):
    """Fields and values that a problem names, or values for the field that it is about; {} if none."""
    flags = re.search(r"(?:take|add) (--.*?)(?:, or |$)", problem)
    values = re.search(r"(?:such as|take at least|take|;) ([\d. e-]+?)(?: does)?$", problem)
    text = flags[1] if flags else f"--{problem.split()[0]} {values[1]}" if values else ""
    found = {name: value.split() for name, value in re.findall(r"--(\w+) ?([^-]*(?:-\d)?)", text)}
    return {
        name: yaml.safe_load(f"[{', '.join(value)}]") if len(value) > 1 else yaml.safe_load("".join(value) or "true")
        for name, value in found.items()
    }


@pytest.mark.parametrize("command", ADVISED)
def test_what_a_problem_advises_is_no_problem_itself(command):
    config = cli.train_config(["--output_dir", "x", *command.split()], None)
    problems = train_problems(config)
    assert problems and not [problem for problem in problems if re.search(r"--\w+ (-\d|None)", problem)], problems
    for problem in problems:
        if changes := advised(problem):
            after = train_problems(loading.update(config, loading.checked_values(changes, problem)))
            assert problem not in after and not [each for each in after if each.split()[0] in changes], (problem, changes, after)


# ---- paths -----------------------------------------------------------------------------------------------------------

ABSENT = [
    ("sample", ["no/such/run"], "model no/such/run does not exist"),
    ("sample", ["absent", "--weights", "raw"], "model absent does not exist"),
    ("evaluate", ["score", "absent", "--reference", "digits"], "target absent does not exist"),
    ("evaluate", ["score", "no/such/run"], "target no/such/run does not exist"),
    ("evaluate", ["compare", "pictures", "no/such.npz", "--reference", "digits"], "target no/such.npz does not exist"),
    ("evaluate", ["score", "pictures", "--reference", "./no/such"], "no/such does not exist"),
    ("evaluate", ["score", "pictures", "--reference", "no/such.npz"], "no/such.npz does not exist"),
    ("evaluate", ["stats", "absent", "out.safetensors"], "absent does not exist; absent@main asks the Hub for it"),
    ("evaluate", ["bpd", "absent"], "model absent does not exist"),
    ("evaluate", ["bpd", "absent", "--reference", "no/such.safetensors"], "no/such.safetensors does not exist"),
    ("train", ["--config", "no/such.yaml"], "no/such.yaml does not exist"),
    ("train", ["--config", "no/such"], "config 'no/such' does not exist"),
    ("convert", ["guided", "no/such.pt", "out", "--flags", "--image_size 8 --num_heads 1"], "no/such.pt does not exist"),
    ("convert", ["guided", "no/such.pt", "out"], "no/such.pt does not exist"),
    ("convert", ["guided", "no/such.pt", "out", "--flags", "no/such.json"], "no/such.json does not exist"),
    ("convert", ["export", "absent", "out.pt"], "absent does not exist"),
    ("push", ["push", "absent", "--hub_model_id", "user/x"], "absent does not exist"),
]


@pytest.mark.parametrize("entry, argv, sentence", ABSENT, ids=[" ".join(argv[:3]) for _, argv, _ in ABSENT])
def test_a_path_that_does_not_exist_is_said_to_not_exist(entry, argv, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    assert getattr(cli, entry)(argv) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_data_and_files_of_a_training_that_do_not_exist_are_said_to_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("absent", "./no/such", "no/such/deep", "/no/such", "~/absent", "absent.parquet", "no/such.parquet"):
        with pytest.raises(InputError, match=rf"^dataset {re.escape(name)} is neither .*: /.*{name.lstrip('~./')} does not exist"):
            open_source(DataConfig(dataset=name))
    with pytest.raises(InputError, match=r"^there is no such folder here, and dataset no/such with split train cannot be loaded"):
        open_source(DataConfig(dataset="no/such"))
    for name in ("absent", "no/such/deep", "/no/such"):
        with pytest.raises(InputError, match=f"^{name} does not exist; name a run directory"):
            load_pipeline(name)
    with pytest.raises(InputError, match=r"^model_config no/such\.json cannot be read: no/such\.json does not exist"):
        read_json_object("model_config", Path("no/such.json"))
    with pytest.raises(InputError, match=r"^feature_extractor_weights no/such\.pt does not exist"):
        Extractor("digits", ["fid"], "no/such.pt")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_a_number_of_processes_that_is_none_is_said_without_a_traceback(name, monkeypatch, capsys, tmp_path):
    """As a shell leaves it that set a variable of another program."""
    command = ["--config", "digits", "--max_steps", "2", "--warmup_steps", "0", "--output_dir", str(tmp_path / "run"), "--dry_run"]
    for wrong in ("x", "0", "2.5"):
        monkeypatch.setenv(name, wrong)
        assert cli.train(command) == 2
        assert f"error: launcher: {name} is {wrong}, but must be the number of processes; unset it" in capsys.readouterr().err
    monkeypatch.setenv(name, "")
    assert launcher.world_size(name) == 1


def test_the_home_folder_is_meant_where_the_shell_leaves_it(monkeypatch, tmp_path):
    """After --flag= it does, and in a configuration or in Python nothing else writes it out: a folder named ~ was made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    for argument in ("--output_dir=~/runs", "~/runs", "--output-dir=/runs", "--prompt=a ~/", "~user/x"):
        assert cli._run_command(lambda argv, _: seen.extend(argv), [argument], "train.py") == 0
    assert seen == [f"--output_dir={tmp_path}/runs", f"{tmp_path}/runs", "--output-dir=/runs", "--prompt=a ~/", "~user/x"]
    given = {"output_dir": Path("~/runs"), "cache_dir": "~/cache", "sample_prompts": ["~"]}
    assert loading.checked_values(given, "train") == {
        "output_dir": f"{tmp_path}/runs",
        "cache_dir": f"{tmp_path}/cache",
        "sample_prompts": ("~",),
    }


def test_a_rank_that_is_none_hides_no_error(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x")
    assert cli.sample(["--steps", "0"]) == 2 and "model is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, left",
    [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
    ids=["neither", "policy", "count"],
)
def test_threads_that_wait_sleep_soon_unless_the_environment_says_how_they_wait(given, left, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is put back, too
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == left
