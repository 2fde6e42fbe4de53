"""Sharded trainings (FSDP2) over processes of the CPU: the same training as in one process, with a part of its memory in each."""

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import FSDP, ROOT, as_ranks, metrics, newest_step, run, same, tensors, train_args
from here import tiny, trained_here
from PIL import Image
from safetensors.torch import load
from text_models import make_base, text_args

from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.schema.training import OptimizationConfig
from debias_diffusers.config.validation.optimization import sharding_problems
from debias_diffusers.errors import CannotWriteError, InputError
from debias_diffusers.hub import publish
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.runs import checkpoints
from debias_diffusers.sampling import job
from debias_diffusers.training import hooks
from debias_diffusers.training.trainer import Trainer
from debias_diffusers.utils import launcher, sharding
from debias_diffusers.utils.sharding import local, read_shards

FLAGS = [
    "--lr_schedule",
    "constant",
    "--warmup_steps",
    0,
    "--checkpoint_every",
    2,
    "--max_grad_norm",
    1,
    "--batch_size",
    12,
    "--dropout",
    0,
]


def _counting(folder):
    """To be called in each process: a training writes how many bytes of weights, moments and averages the process holds at its end."""
    train = Trainer.train

    def counted(trainer, stop):
        ended = train(trainer, stop)
        step = trainer.state.optimizer_step
        parts = {
            "weights": trainer.state.model.parameters(),
            "moments": [value for values in step.optimizer.state.values() for name, value in values.items() if name != "step"],
            "averages": [average for rate in step.ema.averages.values() for average in rate.values()],
        }
        count = {name: sum(local(value).untyped_storage().nbytes() for value in values) for name, values in parts.items()}
        (folder / f"{os.environ.get('RANK', 0)}.json").write_text(json.dumps(count))
        return ended

    Trainer.train = counted


def sharded(processes, folder, steps, *flags, count=None, fsdp=True):
    before = partial(_counting, count) if count else None
    args = train_args(folder, *FLAGS, "--max_steps", steps, *flags)
    code, err = as_ranks(processes, *args, environment=FSDP if fsdp else None, before=before)
    assert code == 0, err
    return err


def cut(folder, step, to):
    """A copy of a run as if it had been killed after a step."""
    shutil.copytree(folder, to)
    for path in (to / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return to


def close(one, other, rel=1e-5):
    """Losses and gradient norms are those of another run."""
    for name in ("loss", "grad_norm"):
        left, right = ([line[name] for line in metrics(folder) if name in line] for folder in (one, other))
        assert left == pytest.approx(right, rel=rel), name


def test_two_processes_train_the_same_with_half_of_the_memory_and_their_checkpoint_goes_on_in_one(tmp_path):
    trained_here(tiny(tmp_path / "one", *FLAGS, "--max_steps", 4))
    (tmp_path / "bytes").mkdir()
    sharded(2, tmp_path / "two", 2, count=tmp_path / "bytes")
    # Each process has half of everything, but for single values and what does not divide by two.
    weights = sum(value.nbytes for value in load(tensors(tmp_path / "one", 4)["model.safetensors"]).values())
    for rank in range(2):
        count = json.loads((tmp_path / "bytes" / f"{rank}.json").read_text())
        assert all(0.45 < count[name] / (copies * weights) < 0.55 for name, copies in (("weights", 1), ("moments", 2), ("averages", 2)))
    trained_here(tiny(tmp_path / "two", *FLAGS, "--max_steps", 4))
    close(tmp_path / "two", tmp_path / "one")
    for name, values in tensors(tmp_path / "one", 4).items():
        whole, found = load(values), load(tensors(tmp_path / "two", 4)[name])
        assert {key: value.shape for key, value in whole.items()} == {key: value.shape for key, value in found.items()}, name


def test_what_does_not_go_with_shards_is_refused_in_a_sentence():
    optimization = OptimizationConfig(optimizer="adamw8bit", mixed_precision="fp16", compile=True, ema_on_cpu=True)
    problems = sharding_problems(optimization, ObjectiveConfig())
    assert [problem.split()[0] for problem in problems] == ["optimizer", "mixed_precision", "compile", "ema_on_cpu"]
    assert not sharding_problems(
        OptimizationConfig(param_dtype="bf16", mixed_precision="bf16", gradient_checkpointing=True), ObjectiveConfig()
    )


def test_what_the_launcher_says_of_fsdp_is_obeyed_or_refused_by_name():
    assert launcher.environment_problems(FSDP, training=True) == [] and launcher.is_sharded(FSDP)
    (problem,) = launcher.environment_problems(FSDP)  # of a command that draws
    assert problem.startswith("ACCELERATE_USE_FSDP is true, but only trainings are sharded")
    assert len(launcher.environment_problems(FSDP | {"FSDP_VERSION": "1"}, training=True)) == 1
    for name in launcher.UNSUPPORTED_OF_FSDP:
        (problem,) = launcher.environment_problems(FSDP | {name: "true"}, training=True)
        assert problem.startswith(f"{name} is true, but ")
        assert launcher.environment_problems({name: "true"}, training=True) == []


def saved(run_dir, step):
    """The tensors of a checkpoint whose files are those of the processes, as `tensors` and `load` give those of gathered files."""
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    assert checkpoints.verify(folder).shards
    return {part: read_shards(folder, part) for part in ("model", "ema_0.9", "ema_0.99", "optimizer")}


def equal(one, other):
    return all(one[part].keys() == other[part].keys() and all(map(torch.equal, one[part].values(), other[part].values())) for part in one)


def gathered(run_dir, step):
    return {name.removesuffix(".safetensors"): dict(sorted(load(content).items())) for name, content in tensors(run_dir, step).items()}


def test_a_checkpoint_of_files_of_the_processes_has_the_same_tensors_and_is_resumed_to_the_same_bits(tmp_path):
    flags = [*FLAGS, "--max_steps", 4]
    trained_here(tiny(tmp_path / "plain", *flags))
    trained_here(tiny(tmp_path / "shards", *flags, "--sharded_checkpoints"))
    expected = gathered(tmp_path / "plain", 4)
    found = {part: dict(sorted(values.items())) for part, values in saved(tmp_path / "shards", 4).items()}
    assert equal(expected, found)
    assert sorted(path.name for path in (tmp_path / "shards" / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    exported = [(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("plain", "shards")]
    assert exported[0] == exported[1]
    # And from one kind to the other.
    trained_here(tiny(cut(tmp_path / "shards", 2, tmp_path / "again"), *flags, "--keep_checkpoints", 3))
    assert gathered(tmp_path / "again", 4).keys() == expected.keys() and equal(expected, gathered(tmp_path / "again", 4))
    pipeline = load_pipeline(str(tmp_path / "again"))
    for weights, part in (("raw", "model"), ("0.9", "ema_0.9")):
        job._load_weights(pipeline, tmp_path / "shards", weights)
        state = pipeline.unet.state_dict()
        assert all(torch.equal(state[name], value) for name, value in expected[part].items())
    with pytest.raises(InputError, match="of step 4, is in the parts of --sharded_checkpoints; continue the training with --no_"):
        publish._stage_newest(tmp_path / "shards")


def test_a_new_ema_rate_starts_from_the_nearest_average_in_files_of_the_processes(tmp_path, monkeypatch):
    trained_here(tiny(tmp_path / "run", *FLAGS, "--max_steps", 2, "--sharded_checkpoints"))
    found = saved(tmp_path / "run", 2)
    monkeypatch.setattr(Trainer, "train", lambda *_: 0)
    flags = ["--max_steps", 4, "--ema_decay", 0.5, 0.99, "--allow_change", "ema_decay"]
    trainer = trained_here(tiny(tmp_path / "run", *FLAGS, *flags))
    for rate, part in ((0.5, "ema_0.9"), (0.99, "ema_0.99")):
        average = trainer.state.optimizer_step.ema.averages[rate]
        assert average and all(torch.equal(average[name], found[part][name]) for name in average)


def test_files_that_a_process_cannot_write_are_said_and_written_at_the_next_checkpoint(tmp_path, monkeypatch, capfd):
    write, failed = hooks.write_shards, []

    def fail_once(tensors, folder):
        write(tensors, folder)
        if not failed:
            failed.append(folder)
            raise CannotWriteError("the disk is full")

    monkeypatch.setattr(hooks, "write_shards", fail_once)
    trained_here(tiny(tmp_path / "run", *FLAGS, "--max_steps", 4, "--sharded_checkpoints"))
    assert "step 2 was not saved: the disk is full; training goes on" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.nightly
def test_files_of_two_processes_are_resumed_by_any_number(tmp_path):
    sharded(2, tmp_path / "gathered", 4)
    sharded(2, tmp_path / "shards", 4, "--sharded_checkpoints")
    names = [path.name for path in (tmp_path / "shards" / "checkpoints" / "step-00000004").iterdir()]
    assert sum(name.startswith("shard-") for name in names) == 2 and not any(name.startswith("model") for name in names)
    found = {part: dict(sorted(values.items())) for part, values in saved(tmp_path / "shards", 4).items()}
    assert equal(gathered(tmp_path / "gathered", 4), found)
    again = cut(tmp_path / "shards", 2, tmp_path / "again")
    sharded(2, again, 4, "--sharded_checkpoints")
    assert equal(saved(again, 4), saved(tmp_path / "shards", 4)) and metrics(again) == metrics(tmp_path / "shards")
    sharded(3, cut(tmp_path / "shards", 2, tmp_path / "three"), 4, "--sharded_checkpoints")
    close(tmp_path / "three", tmp_path / "shards")
    sharded(2, cut(tmp_path / "shards", 2, tmp_path / "whole"), 4, fsdp=False)  # DistributedDataParallel
    close(tmp_path / "whole", tmp_path / "shards")
    shard = next((tmp_path / "shards" / "checkpoints" / "step-00000004").glob("shard-00002*"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    newest, damaged = checkpoints.latest_valid(tmp_path / "shards" / "checkpoints")
    assert newest.step == 2 and "does not match its sha256" in damaged[0]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "processes, flags",
    [
        (2, []),
        (3, []),
        (2, ["--micro_batch_size", 2, "--gradient_checkpointing"]),
        (3, ["--optimizer", "adafactor", "--weight_decay", 0.01]),
        (2, ["--sample_every", 2, "--validation_split", 0.01, "--validation_every", 2, "--class_conditional"]),
    ],
    ids=["two", "three", "micro-batches", "adafactor", "drawn and measured"],
)
def test_other_sharded_trainings_are_those_of_one_process(processes, flags, tmp_path):
    trained_here(tiny(tmp_path / "one", *FLAGS, *flags, "--max_steps", 4))
    sharded(processes, tmp_path / "shards", 4, *flags)
    close(tmp_path / "shards", tmp_path / "one")
    validation = [[line["validation_loss"] for line in metrics(tmp_path / name) if "validation_loss" in line] for name in ("one", "shards")]
    assert validation[0] == pytest.approx(validation[1], rel=1e-4)
    pictures = [sorted(path.name for path in (tmp_path / name / "samples").glob("*.png")) for name in ("one", "shards")]
    assert pictures[0] == pictures[1]
    sharded(processes, cut(tmp_path / "shards", 2, tmp_path / "again"), 4, *flags)
    same(tmp_path / "again", tmp_path / "shards", 4)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_shards_in_bf16_resume_with_the_same_bits(dtype, tmp_path):
    flags = ["--mixed_precision", "bf16", "--param_dtype", dtype]
    trained_here(tiny(tmp_path / "one", *FLAGS, *flags, "--max_steps", 4))
    sharded(2, tmp_path / "shards", 4, *flags)
    close(tmp_path / "shards", tmp_path / "one", rel=0.02)
    sharded(2, cut(tmp_path / "shards", 2, tmp_path / "again"), 4, *flags)
    same(tmp_path / "again", tmp_path / "shards", 4)
    assert {value.dtype for value in load(tensors(tmp_path / "shards", 4)["optimizer.safetensors"]).values()} == {torch.float32}


@pytest.mark.nightly
def test_a_sharded_text_to_image_training_is_that_of_one_process(text_models, tmp_path):
    for number in range(12):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"number {number}")
    flags = ["--dataset", tmp_path, "--batch_size", 4, "--max_steps", 4, "--checkpoint_every", 2, "--max_grad_norm", 1]
    arguments = {name: text_args(make_base(tmp_path / "base" / name), tmp_path / name, *flags) for name in ("one", "shards")}
    code, _, err = run(*arguments["one"])
    assert code == 0, err
    code, err = as_ranks(2, *arguments["shards"], environment=FSDP)
    assert code == 0, err
    close(tmp_path / "shards", tmp_path / "one", rel=1e-4)


@pytest.mark.parametrize("name", ["fsdp2_2gpu", "fsdp2_8gpu", "fsdp2_two_nodes"])
def test_the_packaged_configurations_ask_for_what_is_supported(name):
    """As accelerate's own launcher passes them on."""
    file = ROOT / "debias_diffusers" / "config" / "presets" / "accelerate" / f"{name}.yaml"
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(file), "train.py"]))
    environment = prepare_multi_gpu_env(args)
    assert launcher.is_sharded(environment) and launcher.environment_problems(environment, training=True) == []
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"


@pytest.mark.nightly
def test_the_full_sdxl_is_sharded_over_eight_processes_without_memory():
    """On the meta device, with a process group that sends nothing: each process has an eighth, and the largest unit is small."""
    import sdxl
    from diffusers import UNet2DConditionModel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(sdxl.PARTS["unet"])
    whole = sum(parameter.numel() for parameter in network.parameters())
    assert whole == 2_567_463_684
    in_units = [sum(parameter.numel() for parameter in unit.parameters()) for unit in sharding.units(network)]
    assert len(in_units) == 17 + 70 and max(in_units) < 0.02 * whole and sum(in_units) > 0.9 * whole
    gathered = sharding.gathered_bytes(network.bfloat16())
    assert gathered < 0.15 * 2 * whole
    network.float()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        sharding.shard(network, "cpu", 8, torch.bfloat16)
        local_values = sum(local(parameter).numel() for parameter in network.parameters())
        assert whole / 8 <= local_values < 1.001 * whole / 8
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.nightly
@pytest.mark.parametrize("flags", [(), ("--sharded_checkpoints",), ("--lora_text_encoders",)], ids=["gathered", "shards", "text encoders"])
def test_adapters_are_trained_in_shards(flags, tmp_path):
    """And saved alone, as in one process."""
    pytest.importorskip("peft")
    base = make_base(tmp_path / "base")
    usual = ("--lora_rank", 2, "--max_steps", 4, "--checkpoint_every", 2, "--learning_rate", 1e-2)
    code, _, err = run(*text_args(base, tmp_path / "one", *usual, *(flag for flag in flags if flag != "--sharded_checkpoints")))
    assert code == 0, err
    for folder, steps in (("two", 4), ("again", 4)):
        if folder == "again":
            cut(tmp_path / "two", 2, tmp_path / "again")
        code, err = as_ranks(2, *text_args(base, tmp_path / folder, *usual, *flags), environment=FSDP)
        assert code == 0, err
        close(tmp_path / folder, tmp_path / "one")
        assert newest_step(tmp_path / folder) == steps
    weights = [load((tmp_path / folder / "pytorch_lora_weights.safetensors").read_bytes()) for folder in ("one", "two", "again")]
    assert all(found.keys() == weights[0].keys() for found in weights)
    assert all(torch.equal(weights[1][name], weights[2][name]) for name in weights[0])
    names = [name for path in (tmp_path / "two" / "checkpoints").rglob("*.safetensors") for name in load(path.read_bytes())]
    assert names and all(".lora_" in name for name in names)
