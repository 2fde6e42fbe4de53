"""The optimizers: what each step is, that the gate holds for each, and that a resume has the same bits."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, metrics, same, tensors
from here import tiny, trained_here
from safetensors.torch import load

from debias_diffusers import cli
from debias_diffusers.config.schema import OptimizationConfig
from debias_diffusers.errors import InputError
from debias_diffusers.training.ema import EMA
from debias_diffusers.training.optimizer_step import OptimizerStep, make_optimizer, require_optimizer, state_bytes
from debias_diffusers.training.trainer import Trainer

needs_bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="an extra")
OPTIMIZERS = ["adamw", "adafactor", pytest.param("adamw8bit", marks=needs_bitsandbytes)]
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_not_finite_reaches_neither_weights_nor_moments(name):
    """A step that is not made is as if it had not been asked for: clipping, moments and weights of the next are the same."""
    draws = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=draws) for shape in SHAPES]
    gradients = [[torch.randn(shape, generator=draws) for shape in SHAPES] for _ in range(3)]

    def trained(spoilt):
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        config = OptimizationConfig(optimizer=name, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=3)
        step = OptimizerStep(parameters, EMA({}, ()), config, skips=1)
        for k, values in enumerate(gradients):
            for bad in (torch.inf, None) if k in spoilt else (None,):
                for parameter, value in zip(parameters, values):
                    parameter.grad = value.clone() if bad is None else torch.full_like(value, bad)
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
    flags += ["--model_channels", 16]  # so that some tensors are large enough for 8 bits
    for folder, steps in ((tmp_path / "whole", 8), (tmp_path / "resumed", 4), (tmp_path / "resumed", 8)):
        trained_here(tiny(folder, *flags, "--max_steps", steps))
    same(tmp_path / "whole", tmp_path / "resumed", 8)
    assert metrics(tmp_path / "whole")[-1]["loss"] < metrics(tmp_path / "whole")[0]["loss"]
    with pytest.raises(InputError, match=f"optimizer: the run has {name}, this command says adamw"):
        trained_here(tiny(tmp_path / "whole", *flags[2:], "--max_steps", 9))


def test_a_run_that_is_saved_before_adafactor_made_a_step_goes_on_the_same(tmp_path, monkeypatch):
    """As where fp16 looks for its scale: there is no state yet, of which saving and loading must make none."""
    gradients = Trainer._gradients

    def overflowing(trainer, batches):
        found = gradients(trainer, batches)
        if trainer.step < 3:
            trainer.state.optimizer_step.parameters[0].grad.fill_(torch.inf)
        return found

    monkeypatch.setattr(Trainer, "_gradients", overflowing)
    flags = ["--optimizer", "adafactor", "--lr_schedule", "constant", "--warmup_steps", 0, "--checkpoint_every", 2]
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
    assert 'bitsandbytes is not installed; run pip install -e ".[bitsandbytes]"' in capsys.readouterr().err


def test_8_bit_kernels_that_do_not_run_are_said_at_the_start(monkeypatch):
    def no_kernel(*_, **__):
        raise NotImplementedError("no kernel image is available")

    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=no_kernel)))
    with pytest.raises(InputError, match="do not run on this cpu: no kernel image is available; take --optimizer adamw or adafactor"):
        require_optimizer(OptimizationConfig(optimizer="adamw8bit"), torch.device("cpu"))
