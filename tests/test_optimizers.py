"""The optimizers: what each step is, that the gate holds for each, and that a resume has the same bits."""

import importlib.util
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, metrics, same, tensors
from diffusers import DDPMPipeline
from here import tiny, trained_here
from safetensors.torch import load

from debias_diffusers import cli
from debias_diffusers.config.schema.training import OptimizationConfig
from debias_diffusers.config.validation.training import train_problems
from debias_diffusers.errors import InputError
from debias_diffusers.training import optimizer_step
from debias_diffusers.training.ema import EMA
from debias_diffusers.training.optimizer_step import OptimizerStep, make_optimizer, require_optimizer, round_stochastically, state_bytes
from debias_diffusers.training.trainer import Trainer

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="an extra")
OPTIMIZERS = ["adamw", "adafactor", pytest.param("adamw8bit", marks=needs_bitsandbytes)]
EIGHT_BITS = pytest.param("adamw8bit", torch.float32, marks=needs_bitsandbytes)
SHAPES = [(32, 16, 3, 3), (70, 80), (70,), (16, 16, 1, 1)]


def by_hand(weights, gradients, rate, decay):
    """Adafactor (arXiv 1804.04235, algorithms 4 and 5) in float64, without first moments, relative step and scaling by the parameter."""
    rows, columns, squares = 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        beta = 1 - t**-0.8
        rows = beta * rows + (1 - beta) * (g * g + 1e-30).mean(-1, keepdims=True)
        columns = beta * columns + (1 - beta) * (g * g + 1e-30).mean(-2, keepdims=True) if g.ndim > 1 else None
        squares = beta * squares + (1 - beta) * (g * g + 1e-30)
        v = squares if g.ndim == 1 else rows * columns / rows.mean(-2, keepdims=True)
        update = g / np.sqrt(v)
        update /= max(1.0, np.sqrt((update**2).mean()))
        weights = weights - rate * decay * weights - rate * update
    return weights


@pytest.mark.parametrize("scale", [1.0, 1e-5])  # the second is that of a network of billions of weights, clipped to a norm of 1
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_adafactor_is_that_of_the_paper_with_the_learning_rate_in_place_of_a_relative_step(shape, scale):
    draws = np.random.default_rng(0)
    weights, gradients = (
        0.05 * draws.standard_normal(shape),
        scale * draws.standard_normal((6, *shape)) * np.arange(1, 7).reshape(6, *[1] * len(shape)),
    )
    parameter = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float32))
    optimizer = make_optimizer([parameter], OptimizationConfig(optimizer="adafactor", learning_rate=1e-3, weight_decay=0.1))
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float32)
        optimizer.step()
    expected = by_hand(weights, gradients, 1e-3, 0.1)
    moved = np.abs(expected - weights).max()
    assert moved > 1e-3
    np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=1e-4 * moved)


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in OPTIMIZERS[:2]), ("adamw", torch.bfloat16), EIGHT_BITS])
def test_what_is_not_finite_reaches_neither_weights_nor_moments(name, dtype):
    """A step that is not made is as if it had not been asked for: clipping, moments and weights of the next are the same."""
    draws = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draws) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=draws) for shape in SHAPES] for _ in range(3)]

    def trained(spoilt):
        parameters = [torch.nn.Parameter(start.to(dtype, copy=True)) for start in starts]
        config = OptimizationConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=3)
        step = OptimizerStep(parameters, EMA({}, ()), config, skips=1)
        for k, values in enumerate(gradients):
            for bad in (torch.inf, None) if k in spoilt else (None,):
                for parameter, value in zip(parameters, values):
                    parameter.grad = value.to(dtype, copy=True) if bad is None else torch.full_like(value, bad, dtype=dtype)
                norm, clipped = step(torch.tensor(1.0), 1e-2, k)
                assert bool(clipped) == (bad is None) and bool(norm.isfinite()) == (bad is None)
        return step

    plain, gated = trained(set()), trained({0, 2})
    for left, right in zip(plain.parameters, gated.parameters):
        assert torch.equal(left, right)
        mine, other = plain.optimizer.state[left], gated.optimizer.state[right]
        assert mine.keys() == other.keys() and all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in mine)
    before = [parameter.detach().clone() for parameter in gated.parameters]
    for loss in (torch.nan, 1.0):  # the first ends the run, and the gate stays closed
        for parameter in gated.parameters:
            parameter.grad = torch.ones_like(parameter)
        gated(torch.tensor(loss), 1e-2, 3)
        assert gated.aborted and all(map(torch.equal, before, gated.parameters))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_has_as_many_bytes_as_the_estimates_say(name):
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = make_optimizer(parameters, OptimizationConfig(optimizer=name))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [(key, value) for values in optimizer.state.values() for key, value in values.items()]
    assert state_bytes(name, parameters) == sum(value.nbytes for key, value in kept if key != "step" and not key.startswith("qmap"))


@pytest.mark.parametrize("name", OPTIMIZERS[1:])
def test_a_resume_with_another_optimizer_has_the_same_bits(name, tmp_path):
    flags = ["--optimizer", name, "--weight_decay", 0.01, "--max_grad_norm", 1, "--lr_schedule", "constant", "--checkpoint_every", 3]
    flags += [*SMALL, "--model_channels", 16]  # so that some tensors are large enough for 8 bits
    for folder, steps in ((tmp_path / "whole", 8), (tmp_path / "resumed", 4), (tmp_path / "resumed", 8)):
        trained_here(tiny(folder, *flags, "--max_steps", steps))
    same(tmp_path / "whole", tmp_path / "resumed", 8)
    assert metrics(tmp_path / "whole")[-1]["loss"] < metrics(tmp_path / "whole")[0]["loss"]
    with pytest.raises(InputError, match=f"optimizer: the run has {name}, this command says adamw"):
        trained_here(tiny(tmp_path / "whole", *flags[2:], "--max_steps", 9))


def test_a_run_that_is_saved_before_adafactor_made_a_step_goes_on_the_same(tmp_path, monkeypatch):
    """As where fp16 looks for its scale: there is no state yet, of which saving and loading must make none."""
    gradients = Trainer._gradients

    def overflowing(trainer, *args):
        found = gradients(trainer, *args)
        if trainer.step < 3:
            trainer.state.optimizer_step.parameters[0].grad.fill_(torch.inf)
        return found

    monkeypatch.setattr(Trainer, "_gradients", overflowing)
    flags = [*SMALL, "--optimizer", "adafactor", "--lr_schedule", "constant", "--warmup_steps", 0, "--checkpoint_every", 2]
    for folder, steps in (("whole", [6]), ("resumed", [2, 6])):
        for last in steps:
            trained_here(tiny(tmp_path / folder, *flags, "--max_steps", last), scaler=torch.amp.GradScaler("cpu"))
            if last == 2:
                assert load(tensors(tmp_path / folder, 2)["optimizer.safetensors"]) == {}
    same(tmp_path / "whole", tmp_path / "resumed", 6)
    steps = [value for name, value in load(tensors(tmp_path / "whole", 6)["optimizer.safetensors"]).items() if name.endswith("/step")]
    assert steps and set(map(float, steps)) == {3.0}


def test_8_bit_moments_without_bitsandbytes_are_refused_before_torch_is_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code = cli.train(["--config", str(TINY), "--output_dir", str(tmp_path / "run"), "--optimizer", "adamw8bit"])
    assert code == 2 and not (tmp_path / "run").exists()
    assert "bitsandbytes is not installed; run pip install bitsandbytes" in capsys.readouterr().err


def test_8_bit_kernels_that_do_not_run_are_said_at_the_start(monkeypatch):
    def no_kernel(*_, **__):
        raise NotImplementedError("no kernel image is available")

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=no_kernel)))
    with pytest.raises(InputError, match="do not run on this cpu: no kernel image is available; take --optimizer adamw or adafactor"):
        require_optimizer(OptimizationConfig(optimizer="adamw8bit"), torch.device("cpu"))


# ---- weights in bf16 --------------------------------------------------------------------------------------------------


def neighbours(values):
    """The bf16 numbers below and above float32 numbers, in float64: 8 bits of significand."""
    scale = 2.0 ** (np.floor(np.log2(np.abs(values.astype(np.float64)))) - 7)
    return np.floor(values / scale) * scale, np.ceil(values / scale) * scale


def test_stochastic_rounding_goes_to_a_neighbour_and_is_right_on_average():
    values = np.float32([1.001, -1.003, 0.1, -3.3e-5, 2.0**-20 * 1.0078, 1.9999, 1.5, 250.3])
    below, above = neighbours(values)
    count = 20_000
    drawn = round_stochastically(torch.from_numpy(np.tile(values, (count, 1))), torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.bfloat16
    drawn = drawn.double().numpy()
    assert ((drawn == below) | (drawn == above)).all() and (drawn[:, 6] == 1.5).all()
    probability = np.where(above > below, (values - below) / np.where(above > below, above - below, 1), 0)
    deviation = np.sqrt(probability * (1 - probability) / count) * (above - below)
    assert (np.abs(drawn.mean(0) - values) <= 4 * deviation).all()


def test_small_updates_are_lost_to_the_nearest_and_kept_on_average_by_stochastic_rounding():
    steps, rate = 100, 1e-5
    start = torch.linspace(0.02, 0.2, 4096).bfloat16()
    parameter, nearest = torch.nn.Parameter(start.clone()), start.clone()
    step = OptimizerStep([parameter], EMA({}, ()), OptimizationConfig(param_dtype="bf16"))
    for k in range(steps):  # of a constant gradient, of which AdamW makes steps of the learning rate
        parameter.grad = torch.ones_like(parameter)
        step(torch.tensor(1.0), rate, k)
        nearest = (nearest.float() - rate).bfloat16()
    kept, left = (float((start.double() - moved.double()).mean()) / (steps * rate) for moved in (parameter.detach(), nearest))
    assert abs(kept - 1) < 0.05 and left < 0.2
    assert parameter.dtype == torch.bfloat16 and step.optimizer.state[parameter]["exp_avg"].dtype == torch.float32


def test_the_draws_are_a_function_of_seed_and_step_however_many_values_are_rounded_at_once(monkeypatch):
    def trained(seed=0, first=0):
        parameters = [torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in SHAPES]
        parameters[0].data = parameters[0].data.to(memory_format=torch.channels_last if first else torch.contiguous_format)
        step = OptimizerStep(parameters, EMA({}, ()), OptimizationConfig(param_dtype="bf16", seed=seed))
        for k in (first, first + 1):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            step(torch.tensor(1.0), 1e-4, k)
        return [parameter.detach() for parameter in parameters]

    one = trained()
    assert not all(map(torch.equal, one, trained(seed=1))) and not all(map(torch.equal, one, trained(first=2)))
    monkeypatch.setattr(optimizer_step, "VALUES_AT_ONCE", 1)
    assert all(map(torch.equal, one, trained()))


def test_the_average_of_weights_in_bf16_moves_in_float32():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    ema = EMA({"w": weight}, (0.9999,))
    with torch.no_grad():
        weight += 0.0078125
    for _ in range(100):
        ema.update()
    expected = 1 + 0.0078125 * (1 - 0.9999**100)  # to the nearest bf16 it would stay 1
    torch.testing.assert_close(ema.of(0.9999)["w"], torch.full((3,), expected))


def test_a_resume_with_weights_in_bf16_has_the_same_bits(tmp_path):
    flags = [*SMALL, "--mixed_precision", "bf16", "--param_dtype", "bf16", "--checkpoint_every", 3, "--warmup_steps", 0]
    for folder, steps in ((tmp_path / "whole", 6), (tmp_path / "resumed", 3), (tmp_path / "resumed", 6)):
        trained_here(tiny(folder, *flags, "--lr_schedule", "constant", "--max_steps", steps))
    same(tmp_path / "whole", tmp_path / "resumed", 6)
    files = {name: load(content) for name, content in tensors(tmp_path / "whole", 6).items()}
    dtypes = {name: {tensor.dtype for tensor in values.values()} for name, values in files.items()}
    assert dtypes.pop("model.safetensors") == {torch.bfloat16} and set.union(*dtypes.values()) == {torch.float32}


def test_without_averages_the_weights_in_bf16_are_drawn_with_and_exported(tmp_path):
    flags = ["--mixed_precision", "bf16", "--param_dtype", "bf16", "--ema_decay", 0, "--max_steps", 2, "--sample_every", 1]
    trained_here(tiny(tmp_path / "run", *flags, "--validation_split", 0.01, "--validation_every", 1))
    assert (tmp_path / "run" / "samples" / "step-00000002.png").exists()
    assert all(math.isfinite(line["validation_loss"]) for line in metrics(tmp_path / "run") if "validation_loss" in line)
    exported = load((tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    saved = load(tensors(tmp_path / "run", 2)["model.safetensors"])
    assert all(torch.equal(exported[name], saved[name]) and saved[name].dtype == torch.bfloat16 for name in saved)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "run")
    assert pipeline.unet.dtype == torch.float32
    assert pipeline(num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_weights_in_bf16_without_computing_in_it_are_refused(tmp_path):
    (problem,) = train_problems(tiny(tmp_path / "run", "--param_dtype", "bf16", "--mixed_precision", "no"))
    assert "param_dtype is bf16, but mixed_precision is no" in problem and "--mixed_precision bf16" in problem
