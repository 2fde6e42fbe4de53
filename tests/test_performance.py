"""A training that is fast is the same training: what is done beside it, kept, laid out or recomputed changes no result."""

import itertools
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import HANG, ROOT, SERVER, command, launched, metrics, run, same, tensors, train_args, wait_for
from here import tiny, trained_here
from PIL import Image
from safetensors.torch import load, load_file

from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.network import ModelConfig
from debias_diffusers.config.schema.training import RunConfig, TrainConfig
from debias_diffusers.data import decoded_cache, images
from debias_diffusers.data.dataset import PositionBatchSampler, TrainingData, micro_batches
from debias_diffusers.data.decoded_cache import make_cache
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.runs import checkpoints
from debias_diffusers.runs.run_directory import open_run
from debias_diffusers.tasks.pixels import PixelTask, network_arguments
from debias_diffusers.tasks.unet import build_unet
from debias_diffusers.training import device
from debias_diffusers.training.device import memory_format, start_accelerator, to_train
from debias_diffusers.training.hooks import Checkpointer
from debias_diffusers.training.setup.build import make_trainer
from debias_diffusers.training.trainer import Trainer
from debias_diffusers.utils import memory
from debias_diffusers.utils.background import BackgroundTask

START = BackgroundTask.start


class Slow:
    """Holds each write of a checkpoint up until the training has gone on, or waits for it, and notes whether it has gone on."""

    def __init__(self, patch):
        self.gone_on, self.trainer, self.waits = [], None, False
        write, launch, finish = checkpoints.write, Trainer._launch, Checkpointer._finish

        def start(background, work, in_background=True):
            self.waits = not in_background
            START(background, work, in_background)

        def waiting(checkpointer, final=False):
            self.waits = True
            finish(checkpointer, final)

        def slow(folder, step, *args):
            wait_for(lambda: self.trainer.step > step or self.waits)
            self.gone_on.append(self.trainer.step > step)
            return write(folder, step, *args)

        def seen(trainer, *args):
            self.trainer = trainer
            return launch(trainer, *args)

        patch.setattr(BackgroundTask, "start", start)
        patch.setattr(checkpoints, "write", slow)
        patch.setattr(Checkpointer, "_finish", waiting)
        patch.setattr(Trainer, "_launch", seen)


def test_a_save_beside_the_training_has_the_tensors_of_its_step(trained, tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    trained_here(tiny(tmp_path / "run", "--keep_checkpoints", 4))
    assert slow.gone_on == [True, True, True, False]  # the last is waited for
    for step in (18, 24):
        assert tensors(tmp_path / "run", step) == tensors(trained, step)
    same(trained, tmp_path / "run", 24)


def test_without_memory_for_a_copy_the_training_waits_for_the_save(trained, tmp_path, monkeypatch):
    slow = Slow(monkeypatch)
    monkeypatch.setattr(memory, "free_memory", lambda: 1)
    trained_here(tiny(tmp_path / "run", "--max_steps", 12, "--lr_schedule", "constant"))
    assert slow.gone_on == [False, False]


def test_what_goes_wrong_beside_is_raised_where_the_result_is_asked_for():
    background = BackgroundTask()
    assert background.result() is None
    for beside in (True, False):
        background.start(lambda: 1 / 0, beside)
        with pytest.raises(ZeroDivisionError):
            background.result()
        assert background.result() is None
    for ask in (background.check, lambda: background.__exit__()):
        background.start(lambda: 1 / 0, in_background=False)
        with pytest.raises(ZeroDivisionError):
            ask()
        ask()  # once
    background.start(lambda: 1, in_background=False)
    background.check()
    assert background.result() == 1
    background.start(lambda: 1 / 0, in_background=False)
    with pytest.raises(KeyError), background:
        raise KeyError


def test_a_mistake_of_ours_in_what_is_done_beside_ends_the_training_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "write", lambda *_: 1 / 0)
    monkeypatch.setattr(BackgroundTask, "start", lambda self, work, in_background: START(self, work, in_background=False))
    with pytest.raises(ZeroDivisionError):
        trained_here(tiny(tmp_path / "run"))
    assert metrics(tmp_path / "run")[-1]["step"] < 12  # steps at which it is saved: 6, 12, ...


def test_free_memory_is_no_more_than_the_machine_has():
    assert 2**20 < memory.free_memory() <= memory.psutil.virtual_memory().total


@pytest.mark.parametrize(
    "own, folder, limit, use, cache",
    [
        ("0::/job/step", "", "memory.max", "memory.current", "inactive_file"),
        ("4:cpu,memory:/job/step", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_free_memory_is_what_the_tightest_control_group_has_left(tmp_path, monkeypatch, own, folder, limit, use, cache):
    """As a batch system does it: the job is limited, and the step within it is not."""
    (tmp_path / "own").write_text(f"7:cpuset:/\n{own}\n")
    monkeypatch.setattr(memory, "OWN", tmp_path / "own")
    groups = {key: (tmp_path / root.relative_to(memory.GROUPS), *names) for key, (root, *names) in memory.FILES.items()}
    monkeypatch.setattr(memory, "FILES", groups)
    for group, most in (("job/step", "max"), ("job", "5000000")):
        place = tmp_path / folder / group
        place.mkdir(parents=True, exist_ok=True)
        (place / limit).write_text(f"{most}\n")
        (place / use).write_text("3000000\n")
        (place / "memory.stat").write_text(f"anon 2000000\n{cache} 1000000\n")
    assert memory.free_memory() == 3_000_000


@pytest.mark.parametrize(
    "device, precision, last",
    [("cpu", "no", True), ("cpu", "bf16", False), ("cuda", "bf16", True), ("cuda", "fp16", True), ("cuda", "no", False)],
)
def test_convolutions_lie_channels_last_where_that_is_faster(device, precision, last):
    accelerator = SimpleNamespace(device=torch.device(device), mixed_precision=precision)
    assert memory_format(accelerator) == (torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("attention", (8, 4))
def test_where_convolutions_lie_channels_last_nothing_in_between_lies_otherwise(tmp_path, attention):
    """diffusers' blocks make the input of their shortcut contiguous while they train, at the cost of a copy to and fro."""
    config = TrainConfig(
        data=DataConfig(dataset="digits", resolution=8),
        model=ModelConfig(
            model_channels=32, channel_mult=(1, 2), attention_resolutions=(attention,), attention_head_dim=16, resblock_updown=True
        ),
        run=RunConfig(output_dir=str(tmp_path)),
    )
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no")
    network = to_train(build_unet(network_arguments(config, 3, 0)), accelerator)
    seen = []

    def note(module, inputs, output):
        seen.extend((module, tensor) for tensor in (*inputs, output) if tensor.ndim == 4)

    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.GroupNorm)):
            module.register_forward_hook(note)
    network(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last), torch.zeros(2))
    assert len(seen) > 40
    assert not [module for module, tensor in seen if not tensor.is_contiguous(memory_format=torch.channels_last)]
    assert network.training and all(module.training for module in network.modules() if isinstance(module, torch.nn.Dropout))


def page_faults(keeping, context=SERVER):
    """Of filling 40 MB once more, in a process that has kept freed memory or not; the fewest, as the first may each find another place."""
    with context.Pool(1) as pool:
        return pool.apply(_page_faults, (keeping,))


def _page_faults(keeping):
    if keeping:
        device._keep_freed_memory()
    counts = []
    for _ in range(6):
        torch.ones(10_000_000)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(after - before for before, after in itertools.pairwise(counts))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or platform.libc_ver()[1] < "2.35", reason="of glibc")
def test_memory_that_was_freed_is_taken_again_without_asking_the_system():
    assert page_faults(keeping=False) > 1000  # 9766 pages of 4 KB
    # In a process where something lies behind the heap, it cannot grow; another process has its memory elsewhere.
    assert page_faults(keeping=True) < 100 or page_faults(True, multiprocessing.get_context("spawn")) < 100


def test_a_resumed_run_lays_its_moments_as_its_weights(trained, tmp_path):
    """Channels last on a CPU in float32; the files have the usual layout."""
    trained_here(tiny(tmp_path / "run", "--max_steps", 12, "--lr_schedule", "constant"))
    trainer = trained_here(tiny(tmp_path / "run", "--max_steps", 13, "--lr_schedule", "constant"))
    convolutions = [p for p in trainer.state.optimizer_step.parameters if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert convolutions and all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    for parameter, moments in trainer.state.optimizer_step.optimizer.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()
    kept = load(tensors(tmp_path / "run", 13)["model.safetensors"])
    for name, weight in trainer.state.model.named_parameters():
        assert torch.equal(kept[name], weight) and kept[name].is_contiguous()


# ---- images kept decoded ------------------------------------------------------------------------------------------------


def coloured(folder):
    """Images of several sizes and kinds, with labels."""
    draws = np.random.default_rng(0)
    for k in range(12):
        path = folder / "ab"[k % 2] / f"{k}.{('png', 'jpg')[k % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (9 + k, 12, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.mark.parametrize("workers", (0, 2))
def test_kept_images_have_the_pixels_of_decoded_ones_and_are_decoded_once(tmp_path, monkeypatch, workers):
    usual = {"dataset": str(coloured(tmp_path / "images")), "resolution": 8, "class_conditional": True, "random_flip": True}
    found, decoded = [], multiprocessing.get_context("fork").Value("i", 0)
    decode = images.decode

    def counted(*args):
        with decoded.get_lock():
            decoded.value += 1
        return decode(*args)

    monkeypatch.setattr(images, "decode", counted)
    for megabytes in (0, 1):
        config = DataConfig(**usual, num_workers=workers, cache_images_mb=megabytes)
        data = TrainingData(open_source(config), config, seed=0)
        assert (data.cache is not None) == bool(megabytes)
        decoded.value = 0  # the first one was looked at for its channels
        found.append(list(micro_batches(data, PositionBatchSampler(4, 4, 0, 1, range(30)), pin_memory=False)))
        assert decoded.value == 120 if not megabytes else 12 <= decoded.value <= 12 * max(1, workers)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_sets_that_do_not_fit_are_not_kept(monkeypatch):
    assert make_cache(1000, (1, 100, 100), 10, shared=False) is not None
    assert make_cache(1001, (1, 100, 100), 10, shared=False) is None
    monkeypatch.setattr(decoded_cache.shutil, "disk_usage", lambda _: decoded_cache.shutil._ntuple_diskusage(64_000_000, 0, 64_000_000))
    assert make_cache(1000, (1, 100, 100), 1000, shared=True) is not None
    assert make_cache(4000, (1, 100, 100), 1000, shared=True) is None  # more than half of a container's shared memory
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert make_cache(1000, (1, 100, 100), 1000, shared=True) is None


@pytest.mark.parametrize("shared", (False, True))
def test_sets_that_would_fill_the_main_memory_are_not_kept(monkeypatch, shared):
    monkeypatch.setattr(decoded_cache, "free_memory", lambda: 20_000_000)
    assert make_cache(1000, (1, 100, 100), 1000, shared) is not None
    assert make_cache(1001, (1, 100, 100), 1000, shared) is None


def test_pixels_that_are_not_wholly_there_are_not_taken():
    kept = make_cache(3, (1, 8, 8), 1, shared=False)
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    assert kept.get(1) is None
    kept.put(1, pixels, 5)
    assert torch.equal(kept.get(1)[0], pixels) and kept.get(1)[1] == 5 and kept.get(0) is None
    kept.pixels[1, 0, 7, 7] += 1  # as if the last byte had not arrived
    assert kept.get(1) is None


# ---- activations computed again, networks compiled ------------------------------------------------------------------------


def test_with_gradient_checkpointing_the_same_is_learned(trained, tmp_path):
    """The tiny run has dropout, which must fall on the same activations when they are computed again."""
    trained_here(tiny(tmp_path / "run", "--gradient_checkpointing"))
    same(trained, tmp_path / "run", 24)


@pytest.mark.nightly
@pytest.mark.parametrize("precision", ("no", "bf16"))
def test_a_compiled_network_learns_the_same_to_rounding_and_its_checkpoints_are_those_of_the_bare_one(tmp_path, precision):
    flags = ["--dropout", 0, "--lr_schedule", "constant", "--mixed_precision", precision]
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        code, _, err = run(*train_args(tmp_path / name, *flags, *more, "--max_steps", 6))
        assert code == 0, err
    plain, compiled = (load(tensors(tmp_path / name, 6)["model.safetensors"]) for name in ("plain", "compiled"))
    assert {name: value.shape for name, value in plain.items()} == {name: value.shape for name, value in compiled.items()}
    for left, right in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "compiled")):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5 if precision == "no" else 2e-2)
    code, _, err = run(*train_args(tmp_path / "compiled", *flags, "--max_steps", 7))
    assert code == 0 and "warning: compile was True, now it is False; the run goes on, but not bit for bit as before" in err


@pytest.mark.nightly
def test_a_compiled_run_over_two_processes_resumes_with_the_same_bits(tmp_path):
    one, other = tmp_path / "whole", tmp_path / "resumed"
    for folder, steps in ((one, 12), (other, 6), (other, 12)):
        code, err = launched(2, *train_args(folder, "--compile", "--lr_schedule", "constant", "--max_steps", steps))
        assert code == 0, err
    same(one, other, 12)


# ---- several processes ----------------------------------------------------------------------------------------------------

LAUNCHERS = {"one_gpu": (1, 1, False), "eight_gpus": (8, 1, False), "two_nodes": (16, 2, False), "two_cpu_processes": (2, 1, True)}
SHARDED = {"fsdp2_2gpu": (2, 1, False), "fsdp2_8gpu": (8, 1, False), "fsdp2_two_nodes": (16, 2, False)}


def test_the_packaged_configurations_of_the_launcher_are_accelerates_own():
    folder = ROOT / "debias_diffusers" / "config" / "presets" / "accelerate"
    assert {path.stem for path in folder.glob("*.yaml")} == {*LAUNCHERS, *SHARDED}
    for name, (processes, machines, cpu) in (LAUNCHERS | SHARDED).items():
        config = load_config_from_file(str(folder / f"{name}.yaml"))  # refuses keys that it does not know
        assert (config.num_processes, config.num_machines, config.use_cpu) == (processes, machines, cpu)
        assert config.mixed_precision == ("no" if cpu else "bf16")


def test_the_script_for_slurm_starts_the_launcher_on_each_node(tmp_path):
    """With stand-ins for what a cluster has."""
    stand_ins = {
        "srun": 'shift; SLURM_PROCID=1 exec "$@"',
        "scontrol": "echo host1; echo host2",
        "accelerate": "printf '%s\\n' \"$@\"",
        "debias-train": "",
        "python": f'exec {sys.executable} "$@"',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_CPUS_PER_TASK": "64", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host[1-2]"}
    environment = {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ROOT / "debias_diffusers" / "config" / "presets" / "accelerate" / "slurm.sh"
    done = subprocess.run(
        ["bash", script, "--config", "celebahq256", "--output_dir", "a b"], cwd=ROOT, env=environment, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "launch" and said[said.index("--config_file") + 1].endswith("two_nodes.yaml")
    for flag, value in (("--num_machines", "2"), ("--num_processes", "16"), ("--machine_rank", "1"), ("--main_process_ip", "host1")):
        assert said[said.index(flag) + 1] == value
    assert said[-5:] == [str(tmp_path / "debias-train"), "--config", "celebahq256", "--output_dir", "a b"]


@pytest.mark.nightly
def test_the_packaged_configuration_starts_two_processes_on_a_cpu(tmp_path):
    file = ROOT / "debias_diffusers" / "config" / "presets" / "accelerate" / "two_cpu_processes.yaml"
    process = command("-m", "accelerate.commands.launch", "--config_file", file, *train_args(tmp_path / "run", "--max_steps", 6))
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 0, err
    assert json.loads((tmp_path / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())["num_processes"] == 2


# ---- memory of a training ---------------------------------------------------------------------------------------------


def made(config):
    """A training that has not begun, its run directory held until the process ends."""
    return make_trainer(config, open_run(config), start_accelerator(config))[0]


def test_what_is_drawn_and_exported_has_the_tensors_of_the_training(tmp_path):
    """No second network on the device: the drawing one has the averages themselves, the exporting one the trained weights."""
    trainer = made(tiny(tmp_path / "run", "--sample_every", 6))
    average = trainer.state.optimizer_step.ema.averages[0.9]
    drawn = trainer.hooks[0].images.network
    exported = trainer.checkpointer.saver.network
    for name, parameter in trainer.state.model.named_parameters():
        assert dict(drawn.named_parameters())[name].data_ptr() == average[name].data_ptr() != parameter.data_ptr()
        assert dict(exported.named_parameters())[name].data_ptr() == parameter.data_ptr()
    assert trainer.state.model.training and not drawn.training


def test_frozen_weights_are_neither_trained_nor_averaged_and_are_exported(tmp_path, monkeypatch):
    build = PixelTask.build

    def partly_frozen(task):
        network = build(task)
        network.time_embedding.requires_grad_(False)
        # It lies channels last. (Behind conv_in without a gradient, GroupNorm's backward pass crashes in torch 2.9 to 2.11 on a CPU.)
        network.conv_out.requires_grad_(False)
        return network

    monkeypatch.setattr(PixelTask, "build", partly_frozen)
    trainer = trained_here(tiny(tmp_path / "run", "--max_steps", 4, "--lr_schedule", "constant"))
    frozen = {name: weight for name, weight in trainer.state.model.named_parameters() if not weight.requires_grad}
    assert len(frozen) == 6 and not trainer.state.optimizer_step.ema.averages[0.9].keys() & frozen.keys()
    assert len(trainer.state.optimizer_step.parameters) == len(list(trainer.state.model.parameters())) - 6
    exported = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    kept = load(tensors(tmp_path / "run", 4)["model.safetensors"])
    average = load(tensors(tmp_path / "run", 4)["ema_0.9.safetensors"])
    assert kept.keys() == exported.keys() == average.keys()  # each file is a whole network, which sample.py and the Hub take
    for name in exported:
        assert torch.equal(exported[name], average[name])
        assert name not in frozen or torch.equal(exported[name], frozen[name])
    whole = trained_here(tiny(tmp_path / "whole", "--max_steps", 6, "--lr_schedule", "constant"))
    resumed = trained_here(tiny(tmp_path / "run", "--max_steps", 6, "--lr_schedule", "constant"))
    assert all(torch.equal(one, other) for one, other in zip(whole.state.model.parameters(), resumed.state.model.parameters()))


def test_after_a_resume_nothing_of_the_checkpoint_stays_mapped(trained, tmp_path):
    """Its space would not be given back when it is removed, and on a network disk it could not be removed."""
    shutil.copytree(trained, tmp_path / "run")
    trainer = trained_here(tiny(tmp_path / "run", "--max_steps", 25))
    assert trainer.step == 25
    assert "step-000000" not in Path("/proc/self/maps").read_text()
