"""The promises of a run, with real processes: resume, stop, lock, several processes, export."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import tracking
from conftest import (
    HANG,
    SERVER,
    SMALL,
    TINY,
    Forked,
    command,
    launched,
    metrics,
    newest_step,
    run,
    same,
    tensors,
    train_args,
    uncounted,
    writers,
)
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    RePaintScheduler,
    UNet2DModel,
)
from here import tiny, trained_here
from PIL import Image
from safetensors.torch import load

import debias_diffusers
from debias_diffusers import parsing
from debias_diffusers.cli import train_config
from debias_diffusers.config.loading import update
from debias_diffusers.config.registry import SOLVERS
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.config.schema.training import OptimizationConfig, TrainConfig
from debias_diffusers.config.validation.sampling import sample_problems
from debias_diffusers.data import images
from debias_diffusers.diffusion.loss import Terms, make_objective
from debias_diffusers.diffusion.timestep_samplers import make_timestep_sampler
from debias_diffusers.diffusion.weighting import effective_sample_size
from debias_diffusers.errors import InputError
from debias_diffusers.evaluation.monitor import Monitor
from debias_diffusers.hub.model_card import model_card, published
from debias_diffusers.pipelines.pixel_pipeline import PixelPipeline, load_pipeline
from debias_diffusers.runs import checkpoints
from debias_diffusers.runs.run_directory import open_run
from debias_diffusers.tasks import pixels
from debias_diffusers.training import saver
from debias_diffusers.training.ema import EMA
from debias_diffusers.training.logger import Logger
from debias_diffusers.training.loss_statistics import LossStatistics
from debias_diffusers.training.setup.build import run_training
from debias_diffusers.training.trainer import Trainer, learning_rate
from debias_diffusers.utils import distributed, files, seeding

LEARNING = ["--timestep_sampler", "loss_second_moment", "--num_train_timesteps", 8, "--noise_schedule", "cosine", "--snr_floor", 1e-3]


@pytest.mark.parametrize(
    "flags, stops, more",
    [
        (LEARNING, (9, 12), {"sampler.safetensors"}),  # at step 10 it has seen each t as often as it must
        (["--timestep_sampler", "stratified", "--learn_sigma", "--micro_batch_size", 3], (3, 6), set()),
        pytest.param(["--prediction_type", "flow", "--timestep_sampler", "logit_normal"], (3, 6), set(), marks=pytest.mark.nightly),
    ],
)
def test_every_way_to_draw_t_resumes_with_the_same_bits(tmp_path, flags, stops, more):
    """Checkpoints at steps 3, 6, ...; lines at 2, 4, ...: a resume falls between two lines."""
    last = stops[-1]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = [*flags, "--log_every", 2, "--checkpoint_every", 3, "--warmup_steps", 2, "--lr_schedule", "constant", "--max_grad_norm", 1]
    for folder, steps in ((whole, last), *((resumed, stop) for stop in stops)):
        code, _, err = run(*train_args(folder, *flags, "--max_steps", steps))
        assert code == 0, err
    same(whole, resumed, last, more)
    assert [line["step"] for line in metrics(whole)] == [*range(2, last + 1, 2)]


OWN_WEIGHTING = """
from debias_diffusers import cli, register_weighting

@register_weighting
def fourth_root(snr):
    return snr**-0.25

if __name__ == "__main__":
    raise SystemExit(cli.train())
"""


@pytest.mark.nightly
def test_a_script_with_a_weighting_of_its_own_is_launched(tmp_path):
    script = tmp_path / "my_train.py"
    script.write_text(OWN_WEIGHTING)
    flags = ["--config", TINY, "--output_dir", tmp_path / "run", "--weighting", "fourth_root"]
    code, err = launched(1, script, *flags, "--max_steps", 4)
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weighting"] == "fourth_root"
    (line, *_) = metrics(tmp_path / "run")
    u = torch.tensor([seeding.uniform(0, "timestep", p) for p in range(8)], dtype=torch.float64)
    schedule = make_objective(train_config(["--config", str(TINY)], None).objective).schedule
    expected = effective_sample_size(schedule.snr[(u * 1000).long()] ** -0.25)
    assert line["effective_sample_size"] == pytest.approx(expected, rel=1e-5)
    code, _, err = run("train.py", *flags, "--max_steps", 6)
    assert code == 2 and "weighting is fourth_root, which is not known" in err
    script.write_text(OWN_WEIGHTING.replace("snr**-0.25", "snr**-0.5"))
    process = command(script, *flags, "--max_steps", 6)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 2 and "holds another weighting" in err
    assert "weight at t = 999: the run has 4.43575, this command says 19.6759" in err


@pytest.mark.nightly
def test_loss_second_moment_learns_from_all_processes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [*LEARNING, "--dropout", 0, "--lr_schedule", "constant"]
    code, _, err = run(*train_args(one, *flags))
    assert code == 0, err
    code, err = launched(2, *train_args(two, *flags))
    assert code == 0, err
    alone, together = (load(tensors(folder, 24)["sampler.safetensors"]) for folder in (one, two))
    assert alone["counts"].sum() == 24 * 8 and torch.equal(alone["counts"], together["counts"])
    torch.testing.assert_close(alone["losses"], together["losses"], rtol=1e-4, atol=0)
    for left, right in zip(metrics(one), metrics(two)):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert [value or 0 for value in left["loss_by_t"]] == pytest.approx([value or 0 for value in right["loss_by_t"]], rel=1e-4)
        assert left["effective_sample_size"] == pytest.approx(right["effective_sample_size"], rel=1e-4)


def test_a_line_of_metrics_tells_what_every_noise_level_costs(tmp_path):
    """Of all samples since the line before: with 8 steps of 24 and one line, 192."""
    flags = [*SMALL, "--max_steps", 8, "--batch_size", 24, "--log_every", 8, "--learn_sigma", "--max_grad_norm", 3]
    code, _, err = run(*train_args(tmp_path / "run", *flags))
    assert code == 0, err
    (line,) = metrics(tmp_path / "run")
    assert all(len(line[name]) == 10 and None not in line[name] for name in ("loss_by_t", "mse_by_t", "bound_by_t"))
    assert line["loss_by_t"] == sorted(line["loss_by_t"])  # the debiased weight of the noise grows with t
    assert 0 < line["clip_rate"] < 1
    weights = make_objective(train_config(["--config", str(TINY)], None).objective).weights
    u = torch.tensor([seeding.uniform(0, "timestep", p) for p in range(192)], dtype=torch.float64)
    assert line["effective_sample_size"] == pytest.approx(effective_sample_size(weights[(u * 1000).long()]), rel=1e-5)


def test_losses_are_corrected_for_how_t_is_drawn(tmp_path):
    """With one sample in a bin the line tells its loss; their corrected mean is the step's loss, which the gradient is of."""
    flags = ["--timestep_sampler", "logit_normal_corrected", "--timestep_std", 0.7, "--batch_size", 2, "--max_steps", 12]
    assert run(*train_args(tmp_path / "run", *flags))[0] == 0
    config = train_config(["--config", str(TINY), *map(str, flags)], None).objective
    sampler = make_timestep_sampler(config, make_objective(config).schedule)
    u = torch.tensor([seeding.uniform(0, "timestep", p) for p in range(24)], dtype=torch.float64)
    t = sampler.draw(u, range(24)).view(12, 2)
    apart = [step for step in range(12) if t[step, 0] // 100 != t[step, 1] // 100]
    assert len(apart) > 6
    for step in apart:
        line = metrics(tmp_path / "run")[step]
        corrected = [sampler.corrections[level].item() * line["loss_by_t"][level // 100] for level in t[step].tolist()]
        assert line["loss"] == pytest.approx(sum(corrected) / 2, rel=1e-5)


def nearly_still(folder, *flags):
    """One step that moves nothing, then the exported network."""
    still = ["--max_steps", 1, "--warmup_steps", 0, "--learning_rate", 1e-30, "--lr_schedule", "constant"]
    code, _, err = run(*train_args(folder, *still, *flags))
    return code, err, (folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_a_run_starts_from_the_weights_of_another(trained, tmp_path):
    code, err, weights = nearly_still(tmp_path / "run", "--init", trained, "--prediction_type", "v_prediction")
    assert code == 0 and f"starting from the weights of {trained}" in err
    assert f"warning: prediction_type was epsilon in {trained}, here it is v_prediction" in err and "noise schedule is not" not in err
    before = load((trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    after = load(weights.read_bytes())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_another_schedule_than_the_weights_were_trained_for_is_said(trained, tmp_path):
    code, err, _ = nearly_still(tmp_path / "run", "--init", trained, "--schedule_shift", 16)
    assert code == 0 and f"warning: the noise schedule is not that of {trained}" in err


def test_a_resume_needs_no_more_what_the_run_started_from(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "first")
    flags = ["--init", tmp_path / "first", "--lr_schedule", "constant"]
    flags += ["--warmup_steps", 0]
    assert run(*train_args(tmp_path / "run", *flags, "--max_steps", 1))[0] == 0
    shutil.rmtree(tmp_path / "first")
    code, _, err = run(*train_args(tmp_path / "run", *flags, "--max_steps", 2))
    assert code == 0 and "resuming" in err and "starting from" not in err


def test_a_stock_unconditional_model_is_fine_tuned_as_it_is(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
                       down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "stock")
    flags = ["--init", tmp_path / "stock", "--model_config", tmp_path / "stock" / "unet" / "config.json"]
    code, err, weights = nearly_still(tmp_path / "run", *flags)
    assert code == 0, err
    after = load(weights.read_bytes())
    torch.testing.assert_close(after, dict(unet.state_dict()), rtol=0, atol=1e-20)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--model_channels", 16], ["is another network", "block_out_channels: init has [8, 16], this run [16, 32]", "--model_config"]),
        (["--learn_sigma"], ["out_channels: init has 1, this run 2", "its variance is not learned: take --no_learn_sigma)"]),
        (
            ["--class_conditional"],
            ["num_class_embeds: init has None, this run 11", "it has no class labels: leave out --class_conditional)"],
        ),
    ],
)
def test_weights_of_another_network_are_refused_with_what_differs(trained, tmp_path, flags, named):
    code, _, err = run(*train_args(tmp_path / "run", "--init", trained, *flags))
    assert code == 2 and all(text in err for text in named), err


def test_a_dry_run_checks_the_weights_it_would_start_from(trained, tmp_path):
    flags = ["--dry_run", "--init", trained]
    code, _, err = Forked(*train_args(tmp_path / "run", *flags, "--prediction_type", "sample"), before=uncounted).result()
    assert code == 0 and f"warning: prediction_type was epsilon in {trained}, here it is sample" in err, err
    code, _, err = Forked(*train_args(tmp_path / "run", *flags, "--learn_sigma"), before=uncounted).result()
    assert code == 2 and "is another network" in err


def started_from(pipeline, folder, *flags):
    """A run that starts from a pipeline: exit code, stderr."""
    pipeline.save_pretrained(folder / "other")
    return nearly_still(folder / "run", "--init", folder / "other", *flags)[:2]


def test_weights_with_a_learned_variance_are_taken_with_one(trained, tmp_path):
    pipeline = load_pipeline(str(trained))
    config = dict(pipeline.unet.config) | {"out_channels": 2}
    code, err = started_from(DDPMPipeline(UNet2DModel.from_config(config), DDPMScheduler()), tmp_path)
    assert code == 2 and "its variance is learned: take --learn_sigma)" in err


@pytest.mark.parametrize("scheduler, tells_its_schedule", [(CMStochasticIterativeScheduler(), False), (RePaintScheduler(), True)])
def test_what_the_scheduler_of_other_weights_does_not_tell_is_said(scheduler, tells_its_schedule, trained, tmp_path):
    code, err = started_from(DDPMPipeline(load_pipeline(str(trained)).unet, scheduler), tmp_path)
    assert code == 0 and f"warning: prediction_type was unknown in {tmp_path / 'other'}, here it is epsilon" in err, err
    assert (f"the noise schedule of {tmp_path / 'other'} is unknown" in err) != tells_its_schedule


def test_weights_that_are_not_finite_are_no_start(trained, tmp_path):
    pipeline = load_pipeline(str(trained))
    torch.nn.init.constant_(pipeline.unet.conv_in.bias, torch.nan)
    code, err = started_from(pipeline, tmp_path)
    assert code == 2 and f"init {tmp_path / 'other'} has weights that are not finite, such as conv_in.bias" in err


def test_a_label_that_meant_none_and_is_a_class_now_is_said(trained_by_class, tmp_path):
    pipeline = load_pipeline(str(trained_by_class))
    code, err = started_from(pipeline, tmp_path, "--class_conditional")
    assert code == 0 and "label 10" not in err, err
    shutil.rmtree(tmp_path / "run")
    pipeline = PixelPipeline(pipeline.unet, pipeline.scheduler)  # as converted weights are: every label is a class
    code, err = started_from(pipeline, tmp_path, "--class_conditional")
    assert code == 0 and f'label 10 was a class in {tmp_path / "other"}, here it is "none"' in err


def test_an_empty_name_of_weights_is_refused(tmp_path):
    code, _, err = run(*train_args(tmp_path / "run", "--init", ""))
    assert code == 2 and "init is an empty name" in err


def test_a_slash_after_the_folder_of_weights_makes_no_other_run():
    configs = [train_config(["--config", str(TINY), "--init", name], None) for name in ("runs/first", "runs/first/")]
    assert configs[0] == configs[1]


def test_weights_that_are_not_there_are_named(tmp_path):
    code, _, err = run(*train_args(tmp_path / "run", "--init", tmp_path / "missing"))
    assert code == 2 and f"{tmp_path / 'missing'} does not exist" in err


def test_a_picture_that_cannot_be_drawn_does_not_end_the_training(tmp_path, monkeypatch):
    def refuse(*_):
        raise torch.linalg.LinAlgError("singular")

    config = train_config(["--config", str(TINY), "--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--sample_every", "2"], None)
    monkeypatch.setattr(pixels, "make_scheduler", refuse)
    with open_run(config) as held:
        run_training(config, held, SimpleNamespace(signum=0, record=lambda: None))
    assert newest_step(tmp_path / "run") == 4


def test_the_mean_over_the_levels_is_the_loss(tmp_path):
    assert run(*train_args(tmp_path / "run", "--max_steps", 4))[0] == 0
    for line in metrics(tmp_path / "run"):
        seen = [value for value in line["loss_by_t"] if value is not None]
        assert min(seen) <= line["loss"] <= max(seen)


def test_a_line_over_several_processes_has_the_same_bits_after_a_save_and_a_resume():
    """What each process has is added up at the line: added up at the save, 1 would be lost in 2^24 + 1 + 1."""

    def statistics(*sums):
        found = [LossStatistics(10, "cpu") for _ in sums]
        for process, value in zip(found, sums):
            add(process, value)
        return found, lambda _: torch.stack([process.sums for process in found])

    def add(process, value):
        process.add(torch.zeros(1, dtype=torch.long), Terms(torch.tensor([value]), torch.ones(1)), torch.ones(10, dtype=torch.float64))

    (whole, gather), (resumed, gather_resumed), ((one,), _) = statistics(2.0**24, 1.0), statistics(0.0, 0.0), statistics(0.0)
    state = json.loads(json.dumps(whole[0].state(gather)))
    for process, each in enumerate(resumed):
        each.load(state, process, 2)
    for each in (whole, resumed):
        add(each[1], 1.0)
    mean = (2**24 + 2) / 3
    assert whole[0].values(gather)["loss_by_t"][0] == resumed[0].values(gather_resumed)["loss_by_t"][0] == mean
    one.load(state, 0, 1)
    older = {**state, "sums": torch.tensor(state["sums"]).sum(0).tolist()}  # as the first versions saved them
    assert one.sums.tolist() == older["sums"]
    for process, each in enumerate(resumed):
        each.load(older, process, 2)
    assert gather_resumed(None).sum(0).tolist() == older["sums"]


def test_the_tracker_gets_a_number_for_each_part_of_the_levels(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(*train_args(tmp_path / "run", "--max_steps", 8, "--batch_size", 16, "--log_every", 4, "--report_to", "tensorboard"))[0] == 0
    (events,) = (tmp_path / "run" / "logs").rglob("events.out*.0")
    tracked = EventAccumulator(str(events))
    tracked.Reload()
    lines = metrics(tmp_path / "run")
    values = [event.value for event in tracked.Scalars("loss_by_t/0.9-1.0")]
    assert values == pytest.approx([line["loss_by_t"][9] for line in lines])
    assert {"clip_rate", "effective_sample_size", "grad_norm", "mse_by_t/0.0-0.1"} <= set(tracked.Tags()["scalars"])


@pytest.mark.parametrize(
    "flags, kind",
    [
        (["--prediction_type", "flow"], FlowMatchEulerDiscreteScheduler),
        (["--learn_sigma", "--weighting", "variational"], DDPMScheduler),
        (["--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--terminal_weight_floor", 0.5], DDPMScheduler),
    ],
)
def test_stock_diffusers_draws_with_every_kind_of_model(tmp_path, flags, kind):
    code, _, err = run(
        *train_args(tmp_path / "run", *flags, "--max_steps", 1, "--warmup_steps", 0, "--batch_size", 64, "--sample_every", 1)
    )
    assert code == 0, err
    assert (tmp_path / "run" / "samples" / "step-00000001.png").is_file()
    pipeline = DDPMPipeline.from_pretrained(str(tmp_path / "run"))
    assert type(pipeline.scheduler) is kind
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=2, num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert drawn.shape == (2, 8, 8, 1) and np.isfinite(drawn).all()
    code, _, err = run("sample.py", tmp_path / "run", "--num_images", 4, "--steps", 5)
    solver = "flow_heun" if "flow" in flags else "unipc"
    assert code == 0 and (tmp_path / "run" / "samples" / f"{solver}-5" / "000003.png").is_file()


@pytest.mark.nightly
def test_what_only_the_second_process_meets_is_said_once(tmp_path):
    for k in range(8):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 20 * k).save(tmp_path / "images" / f"{k}.png")
    (tmp_path / "images" / "5.png").write_bytes(b"broken")  # the second process looks at every other image
    code, err = launched(2, *train_args(tmp_path / "run", "--dataset", tmp_path / "images", "--channels", 1))
    said = err.split("Traceback")[0]  # the launcher ends with one of its own
    assert code == 1 and said.count("error: ") == 1 and "images/5.png cannot be read" in said
    # The launcher may end the other process before it ends by itself.
    assert err.count("Traceback") == 1 and "exitcode  : 2" in err.split("Root Cause")[1]


def test_a_network_file_that_changed_is_not_resumed(tmp_path):
    network = tmp_path / "unet.json"
    values = {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 8}
    flags = ["--model_config", network, "--max_steps", 4]
    network.write_text(json.dumps({**values, "layers_per_block": 1}))
    assert run(*train_args(tmp_path / "run", *flags))[0] == 0
    network.write_text(json.dumps({**values, "layers_per_block": 2}))
    code, _, err = run(*train_args(tmp_path / "run", *flags, "--max_steps", 5))
    assert code == 2 and "layers_per_block: the run has 1, this command says 2" in err
    network.write_text(json.dumps({**values, "layer_per_block": 2}))
    code, _, err = run(*train_args(tmp_path / "other", *flags))
    assert code == 2 and "UNet2DModel does not know: layer_per_block" in err


def test_a_folder_with_other_files_is_not_made_a_run_directory(tmp_path):
    for name in ("README.md", "config.json"):  # as a model of somebody else has
        (tmp_path / name).write_text("mine")
    code, _, err = run(*train_args(tmp_path))
    assert code == 2 and "holds other files, such as README.md" in err
    assert {p.read_text() for p in tmp_path.iterdir()} == {"mine"}


STOCK = """
import json, sys
for name in [name for name in sys.modules if name.startswith("debias_diffusers")]:
    sys.modules[name] = None  # as if it were not installed
import numpy as np, torch
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained("{0}")
generators = [torch.Generator().manual_seed(json.loads(line)["seed"]) for line in open("{1}/ours/metadata.jsonl")]
images = pipeline(batch_size=6, generator=generators, num_inference_steps=15).images
np.save("{1}/stock.npy", np.stack([np.asarray(image) for image in images]))
"""


def test_stock_diffusers_loads_the_run_and_draws_the_same_images(trained, tmp_path):
    flags = [
        "--scheduler",
        "ddpm",
        "--steps",
        15,
        "--spacing",
        "leading",
        "--num_images",
        6,
        "--seed",
        5,
        "--output_dir",
        tmp_path / "ours",
    ]
    assert run("sample.py", trained, *flags)[0] == 0
    process = SERVER.Process(target=exec, args=(STOCK.format(trained, tmp_path), {}))
    process.start()
    process.join(HANG)
    assert process.exitcode == 0
    stock = np.load(tmp_path / "stock.npy")
    for k in range(6):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "ours" / f"{k:06d}.png")), stock[k])


def test_the_run_directory_is_laid_out_as_documented(trained):
    there = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    pipeline = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    files = ("model.safetensors", "ema_0.9.safetensors", "ema_0.99.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
    kept = {f"checkpoints/step-{step:08d}/{name}" for step in (18, 24) for name in files}
    drawn = {path for path in there if path.startswith("samples/")}
    assert there - drawn == {".lock", ".debias_diffusers.json", "config.json", "metrics.jsonl", "README.md"} | pipeline | kept
    assert json.loads((trained / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    line = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    told = {"loss", "loss_by_t", "mse_by_t", "learning_rate", "grad_norm", "clip_rate", "effective_sample_size"}
    assert set(line) == {"step", "images_per_second"} | told
    config = json.loads((trained / "config.json").read_text())
    card = (trained / "README.md").read_text()
    assert all(f"| {name} | " in card for name in config)
    exported = load((trained / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    averaged = load(tensors(trained, 24)["ema_0.9.safetensors"])
    assert all(torch.equal(exported[name], averaged[name]) for name in exported)
    assert set(load(tensors(trained, 24)["model.safetensors"])) == set(exported)


@pytest.mark.parametrize(
    "change, named",
    [
        ({}, "epsilon is weighted with `debiased`, a weight defined on the error of the noise"),
        ({"weighting": "debiased_kohya"}, "`debiased_kohya`, as other code has it"),
        ({"timestep_sampler": "logit_normal"}, "density `logit_normal` (mean 0.0, standard deviation 1.0) without correction"),
        ({"learn_sigma": True}, "The variance of a sampling step is learned"),
        ({"learn_sigma": True, "weighting": "variational"}, "the variational bound was minimised, without weights"),
        ({"learn_sigma": True, "weighting": "variational", "timestep_sampler": "log_normal"}, "density `log_normal`"),
    ],
)
def test_the_model_card_says_what_was_minimised(change, named):
    config = update(train_config(["--config", str(TINY)], None), change)
    assert named in model_card(config, 1, 0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow"])
def test_a_card_names_a_solver_and_a_class_of_the_model(prediction_type):
    config = update(train_config(["--config", str(TINY)], None), {"prediction_type": prediction_type})
    card = model_card(config, 1, 3, classes={"empty": 0, "cat": 3, "dog": 2})
    steps = 50 if prediction_type == "flow" else 1000
    assert f'class_labels=["cat"], num_inference_steps={steps})' in card and "| 1 | `cat` | 3 |" in card
    (command,) = re.findall(r"`debias-sample (.*?)`", card)
    flags = parsing.parse(SampleConfig, shlex.split(command), "sample.py")
    assert sample_problems(flags) == [] and SOLVERS[flags.scheduler].flow == (prediction_type == "flow")
    for name in ("a ``` b", "two\nlines", "PATH"):
        assert "class_labels=[0]," in model_card(config, 1, 1, classes={name: 1})
    _, text = published(card, "alice/pets", None, None).split("\n---\n", 1)
    assert text.startswith("\n# pets\n") and 'from_pretrained("alice/pets")' in text and "debias-sample " in text and "PATH" not in text


def test_sample_grids_and_the_tracker_are_written_when_asked(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--sample_every", 1, "--report_to", "tensorboard", "--max_grad_norm", 0.1, "--mixed_precision", "bf16"]
    flags += ["--max_steps", 2, "--warmup_steps", 1, "--batch_size", 64]
    assert run(*train_args(tmp_path / "run", *flags))[0] == 0
    assert [p.name for p in sorted((tmp_path / "run" / "samples").iterdir())] == ["step-00000001.png", "step-00000002.png"]
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents.*"))
    tracked = EventAccumulator(str(tmp_path / "run" / "logs"), size_guidance={"images": 0})
    tracked.Reload()
    assert [event.step for event in tracked.Images("samples")] == [1, 2]
    assert metrics(tmp_path / "run") != [] and json.loads((tmp_path / "run" / "config.json").read_text())["mixed_precision"] == "bf16"


@pytest.mark.parametrize("classes", [True, False])
def test_a_grid_while_training_is_small_and_has_a_class_a_row(classes, tmp_path, monkeypatch):
    """Also with the costliest of the default solvers, of two network evaluations in each step."""
    drawn, made = [], []
    call, grid, named_grid = PixelPipeline._call, images.grid, images.named_grid
    monkeypatch.setattr(PixelPipeline, "_call", lambda self, x_t, *rest: drawn.append(len(x_t)) or call(self, x_t, *rest))
    monkeypatch.setattr(images, "grid", lambda tiles: made.append(([], [tiles])) or grid(tiles))
    monkeypatch.setattr(images, "named_grid", lambda names, rows: made.append((names, rows)) or named_grid(names, rows))
    flags = ["--prediction_type", "flow", "--num_train_timesteps", 1000, "--max_steps", 1, "--warmup_steps", 0, "--sample_every", 1]
    trained_here(tiny(tmp_path / "run", *flags, *(["--class_conditional"] if classes else [])))
    ((names, rows),) = made
    assert (names, [len(row) for row in rows]) == (([str(k) for k in range(10)], [1] * 10) if classes else ([], [16]))
    default = TrainConfig()
    assert sum(drawn) <= 0.05 * default.run.sample_every * 3 * default.optimization.batch_size  # backward takes two forwards


def test_max_hours_stops_with_a_checkpoint(tmp_path):
    code, _, err = run(*train_args(tmp_path / "run", "--max_steps", 100_000, "--max_hours", 1e-4, "--checkpoint_every", 0))
    assert code == 0 and "stopped after max_hours" in err
    assert newest_step(tmp_path / "run") == metrics(tmp_path / "run")[-1]["step"]


def test_clipping_shortens_the_gradient_that_is_applied(tmp_path):
    """With a clip far below every gradient, AdamW's first moment has the clipped length."""
    assert run(*train_args(tmp_path / "run", "--max_grad_norm", 1e-3, "--max_steps", 1, "--warmup_steps", 1))[0] == 0
    state = load(tensors(tmp_path / "run", 1)["optimizer.safetensors"])
    moments = torch.cat([value.flatten() for name, value in state.items() if name.endswith("/exp_avg")])
    assert moments.norm().item() == pytest.approx(0.1 * 1e-3, rel=1e-3)  # exp_avg = (1 - beta_1) gradient
    assert metrics(tmp_path / "run")[0]["grad_norm"] > 1e-2


def test_the_learning_rate_is_a_function_of_the_step():
    config = OptimizationConfig(learning_rate=2.0, warmup_steps=4, max_steps=12, lr_schedule="linear")
    assert [learning_rate(config, step) for step in (0, 3, 4, 8)] == [0.5, 2.0, 2.0, 1.0]
    cosine = OptimizationConfig(learning_rate=2.0, max_steps=10, lr_schedule="cosine")
    assert learning_rate(cosine, 5) == pytest.approx(1.0) and learning_rate(cosine, 0) == 2.0
    assert learning_rate(OptimizationConfig(learning_rate=2.0), 99_999) == 2.0


def test_averages_that_depend_on_the_step_are_told_it():
    """Left out it was 0 in every update: a warm-up averaged at the rate 0.1 for ever."""
    for options in ({"rates": (0.9,), "warmup": True}, {"rates": (), "sigma_rels": (0.1,)}):
        ema = EMA({"w": torch.zeros(3)}, **options)
        ema.update(0)
        with pytest.raises(InputError, match=r"call update\(step\)"):
            ema.update()
    for rate in (1.0, -0.1, 1.5):
        with pytest.raises(InputError, match=f"a rate of EMA is {rate}"):
            EMA({"w": torch.zeros(3)}, (0.9, rate))


def test_averages_follow_their_closed_form():
    weight = torch.zeros(3)
    ema = EMA({"w": weight}, (0.9, 0.0))
    values = [1.0, -2.0, 5.0]
    for value in values:
        weight.fill_(value)
        ema.update()
    expected = sum(0.1 * 0.9 ** (2 - k) * value for k, value in enumerate(values))
    torch.testing.assert_close(ema.averages[0.9]["w"], torch.full((3,), expected))
    assert {**ema.weights, **ema.of(0.0)}["w"].tolist() == [5.0] * 3  # the weights as they are, without memory of their own


def test_out_of_memory_proposes_a_smaller_micro_batch(tmp_path, monkeypatch):
    config = train_config(["--config", str(TINY), "--output_dir", str(tmp_path / "run")], None)
    monkeypatch.setattr(Trainer, "_terms", lambda *_: torch.empty(2**60))
    with open_run(config) as held, pytest.raises(InputError, match="8 images per forward; add --micro_batch_size 4"):
        run_training(config, held, SimpleNamespace(signum=0, record=lambda: None))


def test_the_averaged_weights_are_measured_while_training_and_the_best_checkpoint_is_kept(tmp_path):
    flags = ["--eval_every", 4, "--eval_images", 66, "--checkpoint_every", 2, "--keep_checkpoints", 1, "--keep_best", "--batch_size", 66]
    flags += [*SMALL, "--lr_schedule", "constant"]  # which does not depend on max_steps
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(*train_args(whole, *flags, "--max_steps", 8))[0] == 0
    lines = [line for line in metrics(whole) if "eval_fid" in line]
    assert [line["step"] for line in lines] == [4, 8] and all("eval_brightness_bias" in line for line in lines)
    best = min(lines, key=lambda line: line["eval_fid"])["step"]
    kept = {f"step-{step:08d}" for step in (best, 8)}
    assert {path.name for path in (whole / "checkpoints").glob("step-*")} == kept
    assert run(*train_args(resumed, *flags, "--max_steps", 4))[0] == 0
    assert run(*train_args(resumed, *flags, "--max_steps", 8))[0] == 0
    assert metrics(resumed) == metrics(whole)
    same(whole, resumed, 8)
    # The figure is that of eval.py, which finds the same weights in the checkpoint.
    code, _, err = run(
        "eval.py", "score", whole, "--checkpoints", "8", "--num_images", 66, "--metrics", "fid", "--batch_size", 66, "--num_threads", 1,
        "--reference", "digits", "--output", tmp_path / "score.json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((tmp_path / "score.json").read_text())["targets"][0]["fid"] == pytest.approx(lines[-1]["eval_fid"], rel=1e-3)


def kept_after(folder, figures, monkeypatch, *flags):
    """The steps whose checkpoints are kept by a training that measures these figures, one after each step."""
    values = iter(figures)
    monkeypatch.setattr(Monitor, "figures", lambda *_: {"fid": next(values)})
    every = ["--eval_every", 1, "--eval_images", 66, "--checkpoint_every", 1, "--keep_checkpoints", 1]
    trained_here(tiny(folder, *every, "--lr_schedule", "constant", "--warmup_steps", 0, *flags))
    return [checkpoints.step_of_folder(path) for path in checkpoints.list_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("beside, written, best", [(True, False, 1), (False, False, 1), (True, True, 2)])
def test_the_best_checkpoint_stays_where_that_of_a_better_step_cannot_be_saved(beside, written, best, tmp_path, monkeypatch):
    """Or where it can, and what comes after it fails."""

    def write(folder, step, *others):
        with files.translate_write_errors(folder):
            if step != 2 or written:
                found = whole(folder, step, *others)
            if step == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return found

    whole = checkpoints.write
    monkeypatch.setattr(checkpoints, "write", write)
    if not beside:
        monkeypatch.setattr(saver.memory, "free_memory", lambda: 0)
    assert kept_after(tmp_path / "run", [3.0, 1.0, 4.0, 5.0], monkeypatch, "--keep_best", "--max_steps", 4) == [best, 4]
    assert checkpoints.newest_state(tmp_path / "run" / "checkpoints")["best"]["step"] == best


def test_a_best_checkpoint_that_was_not_kept_is_forgotten(tmp_path, monkeypatch):
    """As --keep_best was not there yet. Else none after it would be kept."""
    assert kept_after(tmp_path / "run", [1.0, 2.0], monkeypatch, "--max_steps", 2) == [2]
    assert kept_after(tmp_path / "run", [3.0, 4.0], monkeypatch, "--keep_best", "--max_steps", 4) == [3, 4]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--eval_images", "5"], "eval_every is 0"),
        (["--eval_every", "5", "--eval_metrics", "foo"], "eval_metrics has foo"),
        (["--eval_every", "5", "--keep_best"], "no multiple of checkpoint_every"),
        (["--eval_every", "8", "--eval_images", "20"], "need 65 images, but there are 20"),
    ],
)
def test_measuring_that_cannot_be_done_is_refused(tmp_path, flags, named):
    code, _, err = run(*train_args(tmp_path / "run", *flags))
    assert code == 2 and named in err, err


def test_a_run_that_is_older_than_a_field_goes_on(tmp_path):
    """As one of a version without --skip_bad: its checkpoint does not name the field, whose default is what it did."""
    folder = tmp_path / "run"
    assert run(*train_args(folder, "--max_steps", 6, "--lr_schedule", "constant"))[0] == 0
    config = train_config(["--config", str(TINY), "--output_dir", str(folder), "--lr_schedule", "constant"], None)
    found = checkpoints.latest_valid(folder / "checkpoints")[0]
    old = {name: value for name, value in found.state["config"].items() if name != "random_flip"}
    shutil.rmtree(folder / "checkpoints")
    checkpoints.write(folder / "checkpoints", 6, writers({"model.safetensors": b"weights"}), found.state | {"config": old}, keep=2)
    assert open_run(config).resume.step == 6
    with pytest.raises(InputError, match="random_flip: the run has False, this command says True"):
        open_run(update(config, {"random_flip": True, "output_dir": str(shutil.copytree(folder, tmp_path / "copy"))}))


def tracked(folder, monkeypatch):
    """What wandb would be begun with."""
    begun = []

    class Tracker:
        name = "wandb"
        start = finish = lambda self: None

        def __init__(self, project, **own):
            self.begun = [project, own]

        def store_init_configuration(self, values):
            begun.append((self.begun[0], values, {"wandb": self.begun[1]}))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    config = train_config(["--config", str(TINY), "--output_dir", str(folder), "--report_to", "wandb"], None)
    folder.mkdir(exist_ok=True)
    Logger(config, SimpleNamespace(folder=folder), accelerator, 0).bar.close()
    ((project, values, own),) = begun
    assert values["batch_size"] == 8
    return project, own["wandb"]


def test_a_resume_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    project, own = tracked(tmp_path / "run", monkeypatch)
    assert project == "debias_diffusers" and own["name"] == "run" and own["resume"] == "allow"
    assert tracked(tmp_path / "run", monkeypatch)[1] == own
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert tracked(tmp_path / "moved", monkeypatch)[1]["id"] == own["id"]
    assert tracked(tmp_path / "run", monkeypatch)[1]["id"] != own["id"]  # another run of the same name
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    project, own = tracked(tmp_path / "run", monkeypatch)
    assert project == "mine" and own["id"] == "abc"


def test_the_progress_bar_names_and_averages_the_loss(tmp_path):
    config = train_config(["--config", str(TINY), "--output_dir", str(tmp_path), "--log_every", "0"], None)
    progress = Logger(config, SimpleNamespace(), SimpleNamespace(), 0)
    shown = []
    for step in range(1, 151):
        progress.log_step(step, float(step), 0.1, 1.0, SimpleNamespace(values=None))
        shown.append(progress.bar.postfix.partition(", ")[0])
    progress.bar.close()
    assert shown[0] == "loss 1 (mean of 1 steps)" and shown[1] == "loss 1.5 (mean of 2 steps)"
    assert shown[-1] == f"loss {sum(range(51, 151)) / 100:.4g} (mean of 100 steps)"


def test_images_per_second_are_those_of_the_steps(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("debias_diffusers.training.logger.time", SimpleNamespace(monotonic=lambda: now[0]))
    config = train_config(["--config", str(TINY), "--output_dir", str(tmp_path), "--log_every", "1"], None)
    lines = []
    run_folder = SimpleNamespace(metrics=SimpleNamespace(append=lines.append))
    progress = Logger(config, run_folder, SimpleNamespace(log=lambda *_, **__: None, gather=None), 0)
    for step in (1, 2, 3):
        now[0] += 2
        progress.log_step(step, 1.0, 0.1, 1.0, SimpleNamespace(reset=lambda _: {}))
        with progress.paused():  # a grid
            now[0] += 100
    progress.bar.close()
    assert [line["images_per_second"] for line in lines] == [4.0, 4.0, 4.0]


@pytest.mark.parametrize(
    "given, of_launcher, threads",
    [
        ("3", None, 3),  # without a launcher
        ("", None, None),
        ("1", "", None),  # the launcher's own
        ("3", "3", 3),
        ("1", "1", 1),  # the user's, though it is the launcher's own, too
        ("6,2", None, 6),
        ("many", None, None),
    ],
)
def test_omp_num_threads_of_the_user_is_obeyed_and_that_of_the_launcher_not(given, of_launcher, threads, monkeypatch, capsys):
    if of_launcher is None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
            monkeypatch.delenv(name, raising=False)
        assert distributed._omp_num_threads() == threads
        return
    # The launcher was started with another environment than its children get.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": of_launcher} if of_launcher else {}
    parent = subprocess.Popen(["cat"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parent.stdin.write("it runs\n")  # the file of its environment is empty for a moment after its start
    parent.stdin.flush()
    assert parent.stdout.readline() == "it runs\n"
    monkeypatch.setattr(os, "getppid", lambda: parent.pid)
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert distributed._omp_num_threads() == threads
    parent.communicate()


def test_what_is_taken_of_omp_num_threads_is_said(monkeypatch, capfd):
    monkeypatch.setattr(distributed.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(distributed, "_omp_num_threads", lambda: 77)
    assert distributed.set_threads(None) == 77 and "77 CPU threads" in capfd.readouterr().err
    assert distributed.set_threads(2) == 2 and capfd.readouterr().err == ""
    monkeypatch.setattr(distributed, "_omp_num_threads", lambda: None)
    assert distributed.set_threads(None) >= 1 and capfd.readouterr().err == ""


def test_a_training_from_python_is_that_of_the_command(trained, tmp_path):
    config = train_config([str(arg) for arg in train_args(tmp_path / "run")[1:]], None)
    debias_diffusers.train(config)
    same(trained, tmp_path / "run", 24)
    with pytest.raises(InputError, match="max_steps is 0, but must be at least 1"):
        debias_diffusers.train(update(config, {"max_steps": 0}))
