"""What matters on a GPU alone, as far as a CPU can show it: what a step launches waits for nothing, and what it need not compute."""

import importlib.util
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import ROOT, sample_config
from diffusers import UNet2DModel
from here import tiny
from text_models import save_xl
from torch.utils._python_dispatch import TorchDispatchMode

from debias_diffusers.cli import train_config
from debias_diffusers.config.registry import SOLVERS
from debias_diffusers.data.dataset import load_batch
from debias_diffusers.errors import InputError
from debias_diffusers.pipelines.pixel_pipeline import PixelPipeline
from debias_diffusers.pipelines.solvers import exported_scheduler, make_scheduler
from debias_diffusers.sampling.generate import sample
from debias_diffusers.sampling.job import image_generators
from debias_diffusers.sampling.pixel_job import PixelJob
from debias_diffusers.tasks.base import sent_locked
from debias_diffusers.tasks.unet import build_unet, unet_config
from debias_diffusers.training import device, dry_run
from debias_diffusers.training.loss_statistics import LossStatistics
from debias_diffusers.training.setup.build import make_trainer
from debias_diffusers.utils import seeding, torch_errors
from debias_diffusers.utils.distributed import make_accelerator
from debias_diffusers.utils.tensor_memory import sent


class Waits(TorchDispatchMode):
    """Notes the copies from the CPU to the device "meta" that would wait for all that was launched before. A read of a value raises."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name, first = func.overloadpacket.__name__, args[0] if args else None
        moved = name == "_to_copy" and result.is_meta and first.device.type == "cpu" and not kwargs.get("non_blocking")
        copied = name == "copy_" and first.is_meta and args[1].device.type == "cpu" and not (len(args) > 2 and args[2])
        if moved or copied:
            self.found.append((name, tuple(result.shape)))
        return result


def on_a_device_without_memory(config, monkeypatch):
    """A trainer whose network, frozen parts and statistics are on the device "meta", which a step sees as any other accelerator."""
    AcceleratorState._reset_state(True)
    trainer, _ = make_trainer(config, None, device.start_accelerator(config))
    AcceleratorState._reset_state(True)
    meta = torch.device("meta")
    trainer.state.model.to(meta)
    trainer.state.statistics = LossStatistics(len(trainer.objective.schedule), meta)
    trainer.accelerator = SimpleNamespace(device=meta, num_processes=1, is_main_process=True, backward=lambda loss: loss.backward())
    if hasattr(trainer.task, "latents"):
        trainer.task.latents.device = meta
        trainer.task.latents.vae.to(meta)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())  # which does not know this device
    return trainer


PIXELS = [
    [],
    ["--learn_sigma", "--prediction_type", "epsilon"],
    ["--weighting", "variational", "--learn_sigma"],
    ["--learned_uncertainty"],
    ["--class_conditional", "--label_dropout", 0.1, "--input_perturbation", 0.1],
    ["--prediction_type", "v_prediction"],
]


@pytest.mark.parametrize("flags", PIXELS, ids=lambda flags: " ".join(map(str, flags)))
def test_forward_and_backward_never_wait_for_the_device(flags, tmp_path, monkeypatch):
    launched_without_waiting(tiny(tmp_path / "run", *flags), monkeypatch)


TEXT = [[], ["--crop", "random"], ["--lora_rank", 2], ["--lora_rank", 2, "--lora_text_encoders"]]


@pytest.mark.parametrize("flags", TEXT, ids=lambda flags: " ".join(map(str, flags)))
def test_those_of_text_to_image_neither(flags, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    base = save_xl(tmp_path / "base")
    every = ["--config", "digits_text", "--output_dir", tmp_path / "run", "--base_model", base, "--batch_size", 4, "--num_workers", 0]
    launched_without_waiting(train_config([str(flag) for flag in [*every, *flags]], None), monkeypatch)


def launched_without_waiting(config, monkeypatch):
    trainer = on_a_device_without_memory(config, monkeypatch)
    batches = (load_batch(trainer.task.data, list(part)) for part in trainer.positions.micro_batches(0))
    with Waits() as waits:
        loss, _, _ = trainer._gradients(batches, 0, False)
    assert loss.is_meta and waits.found == []


def a_pipeline(flow=False):
    config = train_config(["--prediction_type", "flow"] if flow else [], None)
    pipeline = PixelPipeline(build_unet(unet_config(config.model, 8, 1, 0)), exported_scheduler(config.objective))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", SOLVERS)
def test_no_call_of_the_network_waits_for_the_device_while_images_are_drawn(name, monkeypatch):
    """Only noise that a step draws is waited for, and what UniPC asks for; nothing is read but whether the images are finite."""
    pipeline, finite = a_pipeline(SOLVERS[name].flow), torch.Tensor.isfinite
    pipeline.unet.to("meta")
    pipeline.scheduler = make_scheduler(name, pipeline.scheduler, "linspace", 5)
    monkeypatch.setattr(PixelPipeline, "_execution_device", torch.device("meta"))
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda images: torch.tensor(True) if images.is_meta else finite(images))
    with Waits() as waits:
        drawn = pipeline(batch_size=3, generator=image_generators(0, range(3)), num_inference_steps=5, clipping="static", output_type="pt")
    assert drawn.images.is_meta
    if name != "unipc":
        assert waits.found == [("_to_copy", (3, 1, 8, 8))] * len(waits.found) and len(waits.found) <= 6


def test_a_compiled_network_sees_one_size_of_batch(trained, tmp_path, monkeypatch):
    seen, decoded = set(), []
    call, watch = UNet2DModel.forward, PixelJob.watch

    def watched(*args, **options):
        drawn, stages = watch(*args, **options)
        decoded.extend({len(x_t) for x_t, _ in stages})
        return drawn, stages

    monkeypatch.setattr(PixelJob, "watch", watched)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    monkeypatch.setattr(UNet2DModel, "forward", lambda unet, x_t, *rest, **more: seen.add(len(x_t)) or call(unet, x_t, *rest, **more))
    options = {"num_images": 9, "batch_size": 4, "steps": 2, "trajectory": True}
    files = []
    for name, compiled in (("plain", False), ("compiled", True)):
        seen.clear()
        folder = tmp_path / name
        sample(sample_config(trained, folder, **options, compile=compiled))
        files.append({path.name: path.read_bytes() for path in folder.rglob("*.png") if path.name[0].isdigit()})
    assert seen == {4} and len(files[0]) == 9 and files[0] == files[1]
    assert decoded == [4, 2] * 2  # six images of a trajectory, and none of what fills their batches


def test_a_gpu_is_seeded_without_asking_for_other_accelerators(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    monkeypatch.setattr(torch.xpu, "manual_seed_all", lambda _: pytest.fail("each call writes down the stack"))
    seeding.seed_device(torch.device("cuda", 0), 7)
    assert seeds == [7] and torch.initial_seed() == 7


def test_the_gpu_that_the_environment_names_is_the_current_one(monkeypatch):
    """Which is seeded, and whose stream the numbers of a step are waited for."""
    current = []
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:1")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    AcceleratorState._reset_state(True)
    try:
        assert make_accelerator().device == torch.device("cuda", 1) and current == [torch.device("cuda", 1)]
    finally:
        AcceleratorState._reset_state(True)


def test_deterministic_algorithms_do_not_fill_what_is_written_next():
    try:
        device._be_deterministic()
        assert torch.are_deterministic_algorithms_enabled() and not torch.empty(1 << 16).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_tensors_are_sent_to_a_gpu_from_page_locked_memory():
    values = MagicMock(device=torch.device("cpu"))
    sent_locked(values, "cuda")
    values.pin_memory().to.assert_called_once_with("cuda", non_blocking=True)
    there = MagicMock(device=torch.device("cuda", 0))  # which cannot be locked
    assert sent_locked(there, torch.device("cuda", 0)) is there.to.return_value
    assert torch.equal(sent_locked(torch.ones(2), "cpu"), torch.ones(2))


def test_a_mac_has_read_a_tensor_before_it_is_freed():
    """MPS copies from memory that is not its own when the queue comes to it, and keeps nothing from being freed until then."""
    values = MagicMock(device=torch.device("cpu"))
    for send in (sent, sent_locked):
        send(values, torch.device("mps"))
        values.to.assert_called_with(torch.device("mps"), non_blocking=False)
    here = [path.name for path in (ROOT / "debias_diffusers").rglob("*.py") if "non_blocking=" in path.read_text()]
    assert sorted(here) == ["device.py", "tensor_memory.py"]  # all others go that way, but for numbers on their way back


@pytest.mark.parametrize("mode, steps", [("default", 2), ("reduce-overhead", 3)])
def test_a_dry_run_measures_no_step_that_records_cuda_graphs(mode, steps, tmp_path, monkeypatch):
    trainer = on_a_device_without_memory(tiny(tmp_path / "run"), monkeypatch)
    made = []
    trainer.step_alone = made.append
    trainer.config = tiny(tmp_path / "run", "--compile", "--compile_mode", mode)
    dry_run.measure(trainer)
    assert len(made) == steps


@pytest.mark.parametrize(
    "said, advice",
    [
        ("backend='inductor' raised: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "add --micro_batch_size 4"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "add --micro_batch_size 4"),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "add --micro_batch_size 4"),
        ("CUDA error: out of memory", "add --micro_batch_size 4"),
        ("Failed to find C compiler. Please specify via CC environment variable", "install one, or leave --compile out"),
        ("Cannot find a working triton installation. Either the package is not installed or it is too old.", "leave --compile out"),
        ("Found Tesla P100 which is too old to be supported by the triton GPU compiler", "leave --compile out"),
    ],
)
def test_what_a_gpu_lacks_is_said(said, advice):
    sentence = torch_errors.explain_error(RuntimeError(said), "--micro_batch_size", 8)
    assert isinstance(sentence, InputError) and advice in str(sentence)


def test_the_benchmark_of_sampling_counts_outside_of_what_is_compiled():
    spec = importlib.util.spec_from_file_location("sampling", ROOT / "benchmarks" / "sampling.py")
    sampling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sampling)
    pipeline = a_pipeline()
    clock = sampling.Clock(pipeline)
    pipeline(num_inference_steps=2, output_type="pt")
    assert clock.seconds > 0 and not pipeline.unet._forward_hooks and not pipeline.unet._forward_pre_hooks
