"""`train.py --dry_run` fails where the start fails, shows what would be trained, and leaves nothing behind."""

import contextlib
import itertools

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from here import tiny
from PIL import Image

from debias_diffusers.data.dataset import load_batch
from debias_diffusers.errors import InputError, RunInUseError
from debias_diffusers.runs.run_directory import open_run
from debias_diffusers.training import device
from debias_diffusers.training import dry_run as dry_run_module
from debias_diffusers.training.dry_run import dry_run, estimated_memory, on_meta
from debias_diffusers.training.setup.build import build
from debias_diffusers.training.setup.plan import prepare
from debias_diffusers.training.start import train
from debias_diffusers.utils import memory


@pytest.fixture
def uncounted(monkeypatch):
    """The memory is not counted, which takes seconds and is not what the test is about."""
    monkeypatch.setattr(dry_run_module, "estimated_memory", lambda *_: dry_run_module.MemoryEstimate({}, 0))


def contents(folder):
    """Every file with its bytes and its time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_shows_what_matters_and_leaves_nothing(tmp_path, capsys):
    train(tiny(f"{tmp_path}/run/", "--dry_run"))
    said = capsys.readouterr().out
    names = [line.split(":")[0] for line in said.splitlines()]
    assert names == [
        "images", "steps per epoch", "parameters", "objective", "weights as t is drawn", "memory", "time", "output_dir",
    ]  # fmt: skip
    assert "steps per epoch: 224.6" in said and "steps/s" in said and "FLOP per step" in said and "a new run, from step 0 to 24" in said
    assert list(tmp_path.iterdir()) == []


def test_the_weights_of_each_phase_are_shown(uncounted, tmp_path, capsys):
    phases = ["--timestep_sampler", "uniform", "--timestep_sampler_after", "speed", "--timestep_sampler_switch", 12]
    train(tiny(tmp_path / "run", "--dry_run", *phases))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights as t is drawn")]
    assert [line.split(":")[0] for line in lines] == ["weights as t is drawn", "weights as t is drawn from step 12 on"]
    assert lines[0].split(":")[1] != lines[1].split(":")[1]


def test_with_verbose_it_also_shows_the_configuration_and_the_first_batch(uncounted, tmp_path, capsys):
    train(tiny(tmp_path / "run", "--dry_run", "--verbose", "--eval_every", 5, "--eval_metrics", "colour"))
    assert '"weighting": "debiased"' in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run-first-batch.png"]
    with pytest.raises(InputError, match="verbose is on, but dry_run is off"):
        train(tiny(tmp_path / "run", "--verbose"))


def test_a_dry_run_of_a_resume_changes_no_file(uncounted, trained, capsys):
    before = contents(trained)
    train(tiny(trained, "--dry_run", "--max_steps", 30, "--learning_rate", "1e-4", "--allow_change", "learning_rate"))
    assert "resumed from step 24 to 30" in capsys.readouterr().out
    assert contents(trained) == before


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataset", "missing.parquet"], "missing.parquet does not exist"),
        (["--dataset", "FOLDER", "--class_conditional"], "class_conditional"),
        (["--report_to", "wandb"], "report_to is wandb, but it is not installed"),
        (["--seed", 5, "--output_dir", "TRAINED"], "seed: the run has 0, this command says 5"),
        (["--init", "TRAINED", "--model_channels", 16], "is another network"),
        (["--output_dir", "FOLDER"], "is not a run directory and holds other files"),
    ],
)
def test_a_dry_run_fails_where_the_start_would(uncounted, flags, said, trained, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "picture.png")
    known = {"FOLDER": folder, "TRAINED": trained}
    before = contents(trained)
    with pytest.raises(InputError, match=said):
        dry_run(tiny(tmp_path / "run", *(known.get(flag, flag) for flag in flags)))
    assert list(tmp_path.iterdir()) == [folder] and contents(trained) == before


def test_a_run_in_use_is_refused(uncounted, trained, tmp_path):
    with contextlib.closing(open_run(tiny(trained))), pytest.raises(RunInUseError, match="is in use by process"):
        dry_run(tiny(trained))
    dry_run(tiny(trained))


def test_a_network_that_does_not_fit_is_not_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda: 1000)
    monkeypatch.setattr(dry_run_module, "build", lambda *_: pytest.fail("built"))
    dry_run(tiny(tmp_path / "run"))
    assert "1 kB are free on this cpu: the training does not fit" in capsys.readouterr().out


def test_floating_point_operations_of_a_network_are_those_of_its_layers():
    """A network of one convolution: 2 * kernel * channels * channels * pixels forward, the same for the weights' gradient.

    Its input needs none.
    """

    class Task:
        def build(self):
            return torch.nn.Conv2d(3, 5, 3, padding=1, bias=False)

        def dummy_batch(self, size):
            return {"image": torch.zeros(size, 3, 8, 8)}

        def x_0(self, batch, device):
            return batch["image"].to(device)

        def conditioned(self, model, batch, device):
            return lambda x_t, t: model(x_t)

    network, flops = on_meta(Task())
    assert flops == 2 * (2 * 9 * 3 * 5 * 64) and network.weight.is_meta


# ---- memory -----------------------------------------------------------------------------------------------------------


def allocated_at_most(work):
    """Bytes that the CPU's tensors take at most while something is done, beyond those before, as torch's profiler has them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


def measured_memory(plan):
    """Weights, averages, the optimizer's state and what is frozen, and what a step takes beside them at most: the second one."""
    trainer, _ = build(plan, None, Accelerator())
    parts = [load_batch(plan.task.data, positions) for positions in trainer.positions.micro_batches(0)]
    batches = itertools.cycle(parts)
    trainer.step_alone(batches)
    step = trainer.state.optimizer_step
    kept = [*trainer.state.model.parameters(), *(w for rate in step.ema.averages.values() for w in rate.values())]
    kept += [value for values in step.optimizer.state.values() for value in values.values()]
    return sum(value.nbytes for value in kept) + plan.task.frozen_bytes + allocated_at_most(lambda: trainer.step_alone(batches))


SMALL = ["--resolution", 16, "--model_channels", 16, "--attention_head_dim", 16, "--attention_resolutions", 8, "--batch_size", 16]
LARGE = ["--resolution", 32, "--model_channels", 32, "--attention_resolutions", 16, "--attention_head_dim", 32, "--batch_size", 16]
MANY_WEIGHTS = ["--resolution", 8, "--model_channels", 64, "--batch_size", 2]


@pytest.mark.parametrize(
    "flags",
    [
        [*SMALL, "--gradient_checkpointing"],
        *(
            pytest.param(flags, marks=pytest.mark.nightly)
            for flags in (
                SMALL,
                LARGE,
                [*LARGE, "--gradient_checkpointing"],
                [*LARGE, "--micro_batch_size", 4, "--ema_decay", 0],
                [*MANY_WEIGHTS, "--optimizer", "adafactor"],
                [*MANY_WEIGHTS, "--mixed_precision", "bf16"],
                [*MANY_WEIGHTS, "--mixed_precision", "bf16", "--param_dtype", "bf16"],
            )
        ),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_the_estimated_memory_is_that_of_a_step(flags, tmp_path):
    AcceleratorState._reset_state(True)
    config = tiny(tmp_path / "run", *flags)
    plan = prepare(config, None, device.start_accelerator(config))
    estimate = estimated_memory(plan.task, on_meta(plan.task)[0], config.optimization, "cpu")
    assert estimate.peak == pytest.approx(measured_memory(plan), rel=0.15)
    AcceleratorState._reset_state(True)


def test_averages_in_main_memory_are_not_counted_on_a_gpu_and_change_nothing_on_a_cpu(tmp_path, capsys):
    AcceleratorState._reset_state(True)
    config = tiny(tmp_path / "run", "--ema_on_cpu")
    plan = prepare(config, None, device.start_accelerator(config))
    assert "averages" not in estimated_memory(plan.task, on_meta(plan.task)[0], config.optimization, "cuda").kept
    trainer, _ = build(plan, None, Accelerator())
    assert "ema_on_cpu changes nothing here" in capsys.readouterr().err
    assert {w.device.type for rate in trainer.state.optimizer_step.ema.averages.values() for w in rate.values()} == {"cpu"}
    AcceleratorState._reset_state(True)
