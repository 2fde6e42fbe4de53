"""What differs on a CUDA GPU: precision, compilation, memory formats, waiting, resumes, sampling. Skipped where there is none."""

import os

import pytest
import torch
from conftest import command, metrics, newest_step, same, sample_config, tensors, train_args, wait_for
from here import tiny, trained_here
from text_models import save_xl

from debias_diffusers.cli import train_config
from debias_diffusers.runs import checkpoints
from debias_diffusers.sampling.generate import make_job
from debias_diffusers.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

PLAIN = ("--dropout", 0, "--max_steps", 12, "--checkpoint_every", 0)  # dropout has other numbers on each kind of device


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def full_float32(monkeypatch):
    """Convolutions without TF32, which torch has on by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def losses(config):
    trainer = trained_here(config)
    assert trainer.state.statistics.sums.device.type == ("cpu" if "ACCELERATE_USE_CPU" in os.environ else "cuda")
    return [line["loss"] for line in metrics(config.run.output_dir)]


@pytest.fixture
def of_a_cpu(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        return losses(tiny(tmp_path / "cpu", *PLAIN))


def test_losses_are_those_of_a_cpu(of_a_cpu, tmp_path, full_float32):
    assert losses(tiny(tmp_path / "run", *PLAIN)) == pytest.approx(of_a_cpu, rel=1e-4)


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed_precision", "bf16"],
        ["--mixed_precision", "fp16"],
        ["--mixed_precision", "bf16", "--param_dtype", "bf16"],
        ["--mixed_precision", "bf16", "--gradient_checkpointing"],
        ["--mixed_precision", "bf16", "--compile"],
        ["--mixed_precision", "fp16", "--micro_batch_size", "4"],
        ["--mixed_precision", "bf16", "--ema_on_cpu"],
        ["--optimizer", "adafactor"],
    ],
    ids=" ".join,
)
def test_in_less_precision_losses_are_nearly_those_of_a_cpu(flags, of_a_cpu, tmp_path):
    within = 0.1 if "adafactor" in flags else 0.03  # the fixture trains with AdamW
    assert losses(tiny(tmp_path / "run", *PLAIN, *flags)) == pytest.approx(of_a_cpu, rel=within)


def test_cuda_graphs_go_with_grids_and_saves_and_with_steps_that_are_read_later(of_a_cpu, tmp_path):
    flags = ["--mixed_precision", "bf16", "--compile", "--compile_mode", "reduce-overhead", "--dropout", 0, "--max_steps", 12]
    flags += ["--log_every", 4, "--sample_every", 3, "--checkpoint_every", 6]
    assert losses(tiny(tmp_path / "run", *flags)) == pytest.approx(of_a_cpu[3::4], rel=0.03)


def test_the_loss_scale_is_resumed(tmp_path):
    flags = ("--mixed_precision", "fp16", "--deterministic")
    trained_here(tiny(tmp_path / "whole", *flags))
    trained_here(tiny(tmp_path / "parts", *flags, "--max_steps", 12, "--lr_schedule", "constant"))
    kept = [checkpoints.verify(tmp_path / "parts" / "checkpoints" / f"step-{step:08d}").state["scaler"] for step in (6, 12)]
    assert all(state["scale"] >= 1 and state["_growth_tracker"] > 0 for state in kept)
    resumed = trained_here(tiny(tmp_path / "parts", *flags, "--max_steps", 18, "--lr_schedule", "constant"))
    assert resumed.accelerator.scaler.state_dict()["_growth_tracker"] == kept[1]["_growth_tracker"] + 6


@pytest.mark.parametrize("precision, layout", [("no", torch.contiguous_format), ("bf16", torch.channels_last)])
def test_convolutions_lie_where_they_are_fast(precision, layout, tmp_path):
    trainer = trained_here(tiny(tmp_path / "run", "--mixed_precision", precision, "--max_steps", 2))
    weights = [module.weight for module in trainer.state.model.modules() if isinstance(module, torch.nn.Conv2d)]
    other = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    assert weights and all(w.is_cuda and w.is_contiguous(memory_format=layout) for w in weights)
    assert not all(w.is_contiguous(memory_format=other) for w in weights)


@pytest.fixture
def waits_are_errors(monkeypatch):
    """From the fourth step on: before, kernels are looked for."""
    launch = Trainer._launch

    def watched(trainer, *args):
        torch.cuda.set_sync_debug_mode("error" if trainer.step >= 3 else "default")
        try:
            return launch(trainer, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_launch", watched)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_step_never_waits_for_the_device(precision, tmp_path, waits_are_errors):
    trainer = trained_here(tiny(tmp_path / "run", "--mixed_precision", precision, "--max_steps", 8, "--max_grad_norm", 1))
    assert trainer.step == 8


@pytest.mark.parametrize("flags", [[], ["--mixed_precision", "bf16"], ["--mixed_precision", "fp16"]], ids=" ".join)
def test_killed_twice_it_ends_with_the_same_bits_where_algorithms_are_deterministic(flags, tmp_path):
    args = [*flags, "--deterministic", "--max_steps", 120, "--checkpoint_every", 20, "--max_grad_norm", 1]
    whole, parts = (train_args(tmp_path / name, *args) for name in ("whole", "parts"))
    uninterrupted = command(*whole)
    for least in (20, 60):
        process = command(*parts)
        wait_for(lambda least=least, process=process: newest_step(tmp_path / "parts") >= least or process.poll() is not None)
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -9, err
    last = command(*parts)
    for process in (uninterrupted, last):
        _, err = process.communicate()
        assert process.returncode == 0, err
    same(tmp_path / "whole", tmp_path / "parts", 120)


def test_recomputed_activations_give_the_same_bits(tmp_path):
    flags = ("--deterministic", "--max_steps", 12)
    for name, more in (("kept", ()), ("recomputed", ("--gradient_checkpointing",))):
        trained_here(tiny(tmp_path / name, *flags, *more))
    assert tensors(tmp_path / "kept", 12) == tensors(tmp_path / "recomputed", 12)


def drawn(run, place, **more):
    config = sample_config(run, "", **{"num_images": 8, "batch_size": 8, "steps": 10, **more})
    return make_job(config, place).draw(range(8)).cpu().float()


def test_images_are_those_of_a_cpu(tmp_path, full_float32):
    trained_here(tiny(tmp_path / "run", "--max_steps", 12))
    expected = drawn(tmp_path / "run", "cpu")
    assert (drawn(tmp_path / "run", "cuda") - expected).abs().max() <= 1  # rounding to grey levels
    for dtype, compiled in (("bfloat16", False), ("float16", False), ("bfloat16", True)):
        assert (drawn(tmp_path / "run", "cuda", dtype=dtype, compile=compiled) - expected).abs().mean() < 4


@pytest.mark.parametrize("more", [[], ["--lora_rank", "4"]], ids=["full", "lora"])
def test_text_to_image_trains_as_on_a_cpu_and_never_waits(more, tmp_path, monkeypatch, request):
    pytest.importorskip("peft")
    base = save_xl(tmp_path / "base")  # a LoRA needs weights to adapt
    found = {}
    for place in ("cpu", "cuda"):
        flags = ["--config", "digits_text", "--max_steps", 6, "--warmup_steps", 0, "--sample_every", 0, "--log_every", 1]
        flags += ["--batch_size", 16]
        flags += ["--output_dir", tmp_path / place, "--base_model", base, *more]
        flags += ["--mixed_precision", "bf16"] if place == "cuda" else []
        config = train_config([str(flag) for flag in flags], None)
        with monkeypatch.context() as patch:
            if place == "cpu":
                patch.setenv("ACCELERATE_USE_CPU", "true")
            else:
                request.getfixturevalue("waits_are_errors")
            found[place] = losses(config)
    assert found["cuda"] == pytest.approx(found["cpu"], rel=0.03)
