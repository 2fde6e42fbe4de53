"""What a plain command chooses: values that suit the data, chosen once, and network sizes."""

import json
import re
from importlib import resources

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from debias_diffusers import cli
from debias_diffusers.config import choices
from debias_diffusers.config.loading import flatten, resolved, update
from debias_diffusers.config.schema.network import SIZE_FIELDS, ModelConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.diffusion.loss import make_objective
from debias_diffusers.diffusion.noise_schedule import require_noise_at_the_end
from debias_diffusers.errors import InputError
from debias_diffusers.tasks.unet import build_unet, unet_config
from debias_diffusers.training import dry_run

PLAIN = ["--dataset", "photos", "--output_dir", "run", "--resolution"]


def chosen(*args, images=400, gpu=False):
    """What a plain command trains, its lines, and the names that it may choose."""
    config, names = cli.train_command([*map(str, args)], None)
    config, lines = choices.choose(config, names, images, gpu)
    return config, lines, names


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--max_steps 1",
        "--max_steps 300 --eval_every 100 --keep_best",
        "--push_to_hub --hub_model_id a/b --hub_every 700",
        "--prediction_type flow",
        "--prediction_type sample --learn_sigma",
        "--weighting min_snr --rescale_betas_zero_snr",
        "--size large --batch_size 3",
        "--model_channels 96 --attention_head_dim 32",
        "--model_channels 48",
        "--channel_mult 1 2 2",
        "--noise_schedule cosine --snr_floor 1e-3",
        "--noise_schedule scaled_linear",
        "--noise_schedule sigmoid",
        "--timestep_sampler log_normal --timestep_std 2",
        "--init model --class_conditional",
    ],
)
def test_what_is_chosen_goes_with_what_is_typed(flags):
    for resolution in (32,) if flags else (2, 4, 12, 28, 96, 100, 512):
        typed, names = cli.train_command([*PLAIN, str(resolution), *flags.split()], None)
        for images, gpu in ((1, False), (400, True), (50_000, True), (10**6, True)):
            config, lines = choices.choose(typed, names, images, gpu)
            assert train_problems(config) == []
            changed = {name for name, value in flatten(config).items() if value != flatten(typed)[name]}
            assert changed <= names and not any(f"--{name} " in flags for name in names)
            assert all(any(f"--{name} " in line for line in lines) for name in changed)
        require_noise_at_the_end(config.objective, make_objective(config.objective).schedule)


def test_the_values_that_suit_some_data():
    config = flatten(chosen(*PLAIN, 32)[0])
    expected = {
        "prediction_type": "v_prediction", "schedule_shift": 4, "timestep_sampler": "stratified", "max_grad_norm": 1, "batch_size": 32,
        "max_steps": 10_000, "model_channels": 32, "channel_mult": (1, 2, 2, 2), "attention_resolutions": (8,), "ema_decay": (0.999,),
        "lr_schedule": "cosine", "warmup_steps": 500, "sample_every": 500, "checkpoint_every": 500,
    }  # fmt: skip
    assert {name: config[name] for name in expected} == expected
    config = flatten(chosen(*PLAIN, 256, images=10**6, gpu=True)[0])
    expected = {"schedule_shift": 1 / 16, "model_channels": 192, "max_steps": 100_000, "ema_decay": (0.9999,), "learning_rate": 1e-4}
    assert {name: config[name] for name in expected} == expected
    # A shift is for every schedule that ends in noise.
    schedules = {"linear": 4, "cosine": 4, "sigmoid": 4, "scaled_linear": 1}
    assert {name: chosen(*PLAIN, 32, "--noise_schedule", name)[0].objective.schedule_shift for name in schedules} == schedules
    # A typed number of the network leaves the others to be chosen, and they go with it.
    model = chosen(*PLAIN, 48, "--channel_mult", 1, 2, gpu=True)[0].model
    assert (model.model_channels, model.channel_mult, model.attention_resolutions) == (64, (1, 2), ())
    # Of a model that is continued, network and parameterization are its own.
    config, _, names = chosen(*PLAIN, 32, "--init", "model")
    assert config.objective.prediction_type == "epsilon" and config.objective.schedule_shift == 1 and config.model.model_channels == 128
    assert "learning_rate" in names


def test_the_average_is_over_a_tenth_of_the_steps_at_most():
    for steps in (1, 500, 2500, 10_000, 10**6):
        (decay,) = chosen(*PLAIN, 32, "--max_steps", steps)[0].optimization.ema_decay
        assert 1 / (1 - decay) <= max(steps / 10, 100) * 1.001


def test_configurations_digits_and_python_choose_nothing():
    for command in (["--config", str(TINY)], [], ["--dataset", "digits"], ["--config", "reference_parity", *PLAIN, "32"]):
        config, _, names = chosen(*command)
        assert not names and config == cli.train_config(command, None)
    objective = TrainConfig().objective
    assert (objective.prediction_type, objective.schedule_shift, objective.timestep_sampler) == ("epsilon", 1, "uniform")


def images(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{k}.png")


def test_it_is_chosen_once_said_and_kept(tmp_path, capsys, monkeypatch):
    images(tmp_path / "photos", 6)
    run = tmp_path / "run"
    monkeypatch.setattr(dry_run, "estimated_memory", lambda *_: dry_run.MemoryEstimate({}, 0))  # counting takes seconds
    command = ["--dataset", tmp_path / "photos", "--resolution", 8, "--output_dir", run, "--sample_every", 0, "--num_workers", 0]
    # A dry run chooses the same, and leaves nothing.
    assert cli.train([*map(str, command), "--dry_run"]) == 0
    shown = capsys.readouterr()
    assert "--schedule_shift 64" in shown.err and "from step 0 to 10000" in shown.out and not run.exists()
    assert cli.train([*map(str, command), "--max_steps", "2", "--batch_size", "2"]) == 0
    said = capsys.readouterr().err
    assert "chosen for 6 images of 8x8 pixels" in said
    assert "--prediction_type v_prediction --schedule_shift 64" in said and "another with --size" in said
    values = json.loads((run / "config.json").read_text())
    assert (values["prediction_type"], values["schedule_shift"], values["model_channels"]) == ("v_prediction", 64, 32)
    # A resume keeps them, whatever would be chosen now, with more steps, too.
    monkeypatch.setattr(choices, "SIZES", {})
    assert cli.train([*map(str, command), "--max_steps", "3", "--batch_size", "2"]) == 0
    said = capsys.readouterr().err
    assert f"as in {run}: --" in said and "--schedule_shift 64" in said and "resuming" in said and "chosen for" not in said
    assert json.loads((run / "config.json").read_text()) == values | {"max_steps": 3}
    hyphens = ["--output-dir" if word == "--output_dir" else str(word) for word in command]
    assert cli.train_command(hyphens, None) == cli.train_command([*map(str, command)], None)
    # What is typed now, and was not then, is refused as ever.
    assert cli.train([*map(str, command), "--max_steps", "3", "--batch_size", "2", "--schedule_shift", "1"]) == 2
    assert "schedule_shift: the run has 64.0, this command says 1.0" in capsys.readouterr().err
    # Also where config.json is damaged.
    (run / "config.json").write_text("{")
    assert cli.train_config([*map(str, command), "--max_steps", "3"], None).objective.prediction_type == "v_prediction"
    # What starts from its weights has its network and its parameterization.
    started = cli.train_config([*map(str, command[:4]), "--output_dir", "other", "--init", str(run), "--max_steps", "2"], None)
    assert (started.objective.prediction_type, started.objective.schedule_shift) == ("v_prediction", 64)
    assert started.model == cli.train_config(["--resume", str(run)], None).model


def test_a_size_stands_for_five_numbers(tmp_path):
    config = cli.train_config([*PLAIN, "64", "--size", "small"], None)
    assert config == cli.train_config(
        [*PLAIN, "64", *["--model_channels", "64", "--channel_mult", "1", "2", "3", "4", "--attention_resolutions", "16", "8"]], None
    )
    base = cli.train_config([*PLAIN, "64", "--size", "base"], None).model
    assert base == cli.train_config([*PLAIN, "64"], None).model == resolved(update(TrainConfig(), {"resolution": 64}), None).model
    # It replaces the numbers of a configuration, and stands in one.
    config = cli.train_config(["--config", "celebahq256", "--dataset", "x", "--size", "tiny"], None)
    assert config.model.model_channels == 32 and config.model.resblock_updown and config.model.size is None
    file = tmp_path / "sized.yaml"
    file.write_text("dataset: photos\nresolution: 32\nsize: large\n")
    assert cli.train_config(["--config", str(file)], None).model.model_channels == 192
    for other in ("model_channels: 96", "model_config: unet.json"):
        file.write_text(f"dataset: photos\nresolution: 32\nsize: large\n{other}\n")
        with pytest.raises(InputError, match=rf"size large decides .*; leave out {other.replace(':', '')}, or size"):
            cli.train_config(["--config", str(file)], None)
    with pytest.raises(InputError, match="size describes the whole network; leave out layers_per_block"):
        cli.train_config([*PLAIN, "64", "--size", "small", "--layers_per_block", "3"], None)


def test_every_size_grows_and_every_number_of_it_is_a_field():
    assert set(SIZE_FIELDS) <= vars(ModelConfig()).keys()
    widths = [cli.train_config([*PLAIN, "32", "--size", size], None).model.model_channels for size in ("tiny", "small", "base", "large")]
    assert widths == sorted(set(widths))


def test_python_trains_in_five_lines(tmp_path):
    from debias_diffusers import PixelPipeline, TrainConfig, train

    steps = []
    pipeline = train(
        TINY,
        output_dir=tmp_path / "run",
        max_steps=2,
        warmup_steps=0,
        callback=lambda step, numbers: steps.append((step, numbers)),
    )
    assert isinstance(pipeline, PixelPipeline) and len(pipeline(batch_size=2, num_inference_steps=2).images) == 2
    assert [step for step, _ in steps] == [1, 2]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1][1] == {name: logged[-1][name] for name in ("loss", "learning_rate", "grad_norm")}
    # Another one in the same process, with another precision.
    assert train(TINY, output_dir=tmp_path / "half", max_steps=1, warmup_steps=0, mixed_precision="bf16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["mixed_precision"] == "bf16"
    with pytest.raises(InputError, match="'resolutoin' is not a field; did you mean resolution"):
        train(TrainConfig(), resolutoin=8)


@pytest.mark.parametrize("name", ["celebahq256", "cifar10"])
def test_the_operations_that_a_preset_names_are_counted(name):
    config = cli.train_config(["--config", name], None)
    labels = 10 if name == "cifar10" else 0
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_unet(unet_config(config.model, config.data.resolution, 3, labels, config.objective.learn_sigma))
        image = torch.zeros(1, 3, config.data.resolution, config.data.resolution)
        network(image, torch.zeros(1), torch.zeros(1, dtype=torch.long) if labels else None).sample.sum().backward()
    text = resources.files("debias_diffusers.config").joinpath("presets", f"{name}.yaml").read_text()
    assert float(re.search(r"([\d.]+) GFLOP per image and step", text)[1]) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.005)
    assert (
        int(re.search(r"([\d ]+) parameters", text)[1].replace(" ", ""))
        == sum(p.numel() for p in network.parameters()) - labels * 4 * config.model.model_channels
    )
