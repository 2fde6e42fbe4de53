"""Rows 74 to 76 of docs/reliability.md: runs in stock diffusers, code and commands as they are shown, and what generic tools ask of us."""

import itertools
import re
import shlex
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from diffusers import (
    DDIMPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ModelMixin,
    PNDMPipeline,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.configuration_utils import ConfigMixin, register_to_config
from test_sampling import loud_pipeline, small_pipeline, solved

from debias_diffusers import PixelPipeline, cli
from debias_diffusers.config.loading import update
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.diffusion.noise_schedule import make_schedule, prediction_of_x_0
from debias_diffusers.errors import InputError
from debias_diffusers.hub.model_card import model_card
from debias_diffusers.pipelines.solvers import FLOW, SCHEDULERS, exported_scheduler, make_scheduler
from debias_diffusers.sampling.pixel_job import draw

STOCK = "stock pipelines of diffusers sample the right distribution with the exported scheduler, or the docs say that they do not"
SHOWN = "the code and the commands of the README, of every page and of model cards run as shown"
ASKED = "the pipeline supports callbacks of diffusers, and a wrong call of a solver gives a clear error"

STD = 0.2


class ExactUNet(ModelMixin, ConfigMixin):
    """The best network for pixels of N(0, STD^2)."""

    config_name = "config.json"

    @register_to_config
    def __init__(self, sample_size=64, in_channels=1, out_channels=1, num_class_embeds=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x_t, t, *labels, return_dict=True):
        objective = self.objective
        s = float(t) / objective.num_train_timesteps
        a, s = (
            (1 - s, s) if objective.prediction_type == "flow" else (make_schedule(objective).a[int(t)], make_schedule(objective).s[int(t)])
        )
        x_0 = a * STD**2 / (a**2 * STD**2 + s**2) * x_t.double()
        output = prediction_of_x_0(objective.prediction_type, x_0, x_t.double(), torch.as_tensor(a), torch.as_tensor(s)).float()
        return SimpleNamespace(sample=output) if return_dict else (output,)


def spread(pipeline, **options):
    """Of what a pipeline draws, as a share of the right one."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(generator=torch.Generator().manual_seed(0), output_type="np", **options).images
    return (2 * images - 1).std() / STD


def exact(**objective):
    unet = ExactUNet()
    unet.objective = ObjectiveConfig(**objective)
    return unet, exported_scheduler(unet.objective)


SCHEDULES = {"shifted": {"schedule_shift": 64.0}, "cosine": {"noise_schedule": "cosine"}, "v": {"prediction_type": "v_prediction"}}
ZERO = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.row(74, STOCK)
@pytest.mark.parametrize("objective", [*SCHEDULES.values(), ZERO, {"prediction_type": "sample"}], ids=[*SCHEDULES, "zero", "sample"])
def test_every_step_of_stock_ddim_goes_to_the_next_timestep_it_visits(objective, trials):
    """So its spread is the product over its list of what a step of DDIM (arXiv 2010.02502, equation 12) does to such a Gaussian."""
    unet, scheduler = exact(**objective)
    schedule = make_schedule(unet.objective)
    for steps in (4, 15, 30):
        pipeline = DDIMPipeline(unet, scheduler)
        begun = spread(pipeline, num_inference_steps=steps)
        expected, timesteps = 1 / STD, pipeline.scheduler.timesteps.tolist()
        for t, after in zip(timesteps, [*timesteps[1:], None]):
            a, s = schedule.a[t].item(), schedule.s[t].item()
            a_s, s_s = (1.0, 0.0) if after is None else (schedule.a[after].item(), schedule.s[after].item())
            expected *= (a_s * a * STD**2 + s_s * s) / (a**2 * STD**2 + s**2)
        noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).std().item()
        assert begun == pytest.approx(expected * noise, rel=0.01)
        trials()


@pytest.mark.row(74, STOCK)
@pytest.mark.parametrize("objective", [*SCHEDULES.values(), ZERO], ids=[*SCHEDULES, "zero"])
def test_stock_pipelines_draw_the_right_spread(objective, trials):
    unet, scheduler = exact(**objective)

    def swapped(kind, pipeline=DDPMPipeline):
        return pipeline(unet, kind.from_config(scheduler.config))

    for pipeline, steps in (
        (DDPMPipeline(unet, scheduler), 200),
        (DDIMPipeline(unet, scheduler), 100),
        (PNDMPipeline(unet, scheduler), 50),
        (swapped(DPMSolverMultistepScheduler), 50),
        (swapped(DPMSolverMultistepScheduler, PixelPipeline), 50),
        (swapped(UniPCMultistepScheduler, PixelPipeline), 50),
        (swapped(EulerDiscreteScheduler, PixelPipeline), 100),
        (swapped(HeunDiscreteScheduler, PixelPipeline), 50),
    ):
        assert spread(pipeline, num_inference_steps=steps) == pytest.approx(1, abs=0.08), type(pipeline.scheduler)
        trials()


@pytest.mark.row(74, STOCK)
@pytest.mark.parametrize("shift", (1.0, 64.0))
def test_a_flow_is_drawn_by_stock_ddpm_alone(shift):
    unet, scheduler = exact(prediction_type="flow", schedule_shift=shift)
    assert spread(DDPMPipeline(unet, scheduler), num_inference_steps=100) == pytest.approx(1, abs=0.05)
    for kind in (DDIMPipeline, PNDMPipeline):  # which ask the network for something else than it predicts
        assert kind(unet, scheduler).scheduler.config.prediction_type == "epsilon"


@pytest.mark.row(74, STOCK)
def test_what_the_docs_say_does_not_work_does_not():
    ours = small_pipeline()
    for kind in (UniPCMultistepScheduler, DEISMultistepScheduler, PNDMScheduler, HeunDiscreteScheduler):
        with pytest.raises(TypeError, match="generator"):
            DDPMPipeline(ours.unet, kind.from_config(ours.scheduler.config))(num_inference_steps=5)
    learned = small_pipeline(channels=3, learn_sigma=True)
    with pytest.raises(RuntimeError, match="size of tensor"):
        DDIMPipeline(learned.unet, learned.scheduler)(num_inference_steps=2)
    for channels in (3, 1):
        learned = small_pipeline(channels=channels, learn_sigma=True)
        pipeline = DDPMPipeline(learned.unet, DPMSolverMultistepScheduler.from_config(learned.scheduler.config))
        with nullcontext() if channels == 3 else pytest.raises(RuntimeError):
            pipeline(num_inference_steps=3)
    unet, scheduler = exact()
    for kind in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler):
        assert spread(DDPMPipeline(unet, kind.from_config(scheduler.config)), num_inference_steps=20) > 2


@pytest.mark.row(74, STOCK)
@pytest.mark.parametrize("steps", (10, 15))
def test_stock_ddim_with_the_noise_of_the_clipped_image_draws_what_ours_draws(steps):
    ours = loud_pipeline()
    generators = [torch.Generator().manual_seed(k) for k in range(3)]
    images = {
        used: DDIMPipeline(ours.unet, ours.scheduler)(
            3, [g.manual_seed(k) for k, g in enumerate(generators)], num_inference_steps=steps, use_clipped_model_output=used
        ).images
        for used in (True, None)
    }
    solved = PixelPipeline(ours.unet, make_scheduler("ddim", ours.scheduler, "leading", steps))
    drawn = draw(solved, range(3), 0, num_inference_steps=steps)[:, 0].numpy()
    assert np.abs(np.stack(images[True]).astype(int) - drawn).max() <= 1
    assert np.abs(np.stack(images[None]).astype(int) - drawn).max() > 10


# ---- code and commands -----------------------------------------------------------------------------------------------


@pytest.fixture
def few_steps(monkeypatch):
    """However many steps stock DDPM is asked for."""
    original = DDPMScheduler.set_timesteps
    monkeypatch.setattr(DDPMScheduler, "set_timesteps", lambda self, steps, *more, **named: original(self, min(steps, 5), *more, **named))


def code(text):
    return [
        re.sub(r"^  ", "", block, flags=re.M) if block.startswith("  ") else block
        for block in re.findall(r"```python\n(.*?)```", text, re.S)
    ]


@pytest.mark.row(75, SHOWN)
@pytest.mark.parametrize("page", ["docs/weighting.md", "docs/first_run.md", "docs/sampling.md"])
def test_the_code_of_a_page_runs(page, trained, trained_by_class, tmp_path, monkeypatch, few_steps, trials):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits").symlink_to(trained)
    (tmp_path / "runs" / "set").symlink_to(trained_by_class)
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in code((ROOT / page).read_text()) if not block.startswith("# my_train.py")]
    assert len(blocks) == {"docs/weighting.md": 1, "docs/first_run.md": 2, "docs/sampling.md": 1}[page]
    for block in blocks:
        names = {"scheduler": DDPMScheduler(), "timesteps": torch.tensor([1, 500]), "mse_per_sample": torch.ones(2)}
        exec(block, names)
        assert len(names.get("images", [0])) > 0
        trials()


KINDS = {
    "epsilon": {},
    "learned": {"learn_sigma": True},
    "flow": {"prediction_type": "flow"},
    "zero": ZERO,
    "variational": {"learn_sigma": True, "weighting": "variational"},
}


# Each kind once, and the usual one both ways.
USUAL = {("epsilon", 0), ("epsilon", 3), ("learned", 0), ("flow", 0), ("zero", 3), ("variational", 3)}


@pytest.mark.row(75, SHOWN)
@pytest.mark.parametrize(
    "kind, classes",
    [pytest.param(*each, marks=() if each in USUAL else pytest.mark.nightly) for each in itertools.product(KINDS, (0, 3))],
)
def test_a_card_s_code_and_command_run(kind, classes, tmp_path, few_steps):
    T = 500 if kind == "zero" else 40
    pipeline = small_pipeline(classes, num_train_timesteps=T, **KINDS[kind])
    (pipeline if classes else DDPMPipeline(pipeline.unet, pipeline.scheduler)).save_pretrained(tmp_path / "run")
    config = update(cli.train_config(["--config", str(TINY)], None), {"num_train_timesteps": T, **KINDS[kind]})
    card = model_card(config, 1, classes).replace('"PATH"', f'"{tmp_path / "run"}"')
    (block,) = code(card)
    names = {}
    exec(block, names)
    assert names["image"].size == (8, 8)
    assert (
        len(
            DiffusionPipeline.from_pretrained(tmp_path / "run", use_safetensors=True)(
                **{"class_labels": [1]} if classes else {}, num_inference_steps=4
            ).images
        )
        == 1
    )
    (command,) = re.findall(r"`(debias-sample .*?)`", card)
    words = shlex.split(command)[1:]
    words[-1] = str(tmp_path / "samples")
    assert cli.sample([*words, "--num_images", "2", "--num_threads", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.png")) == ["000000.png", "000001.png"]
    named = {"flow": "Not with `DDIMPipeline`", "learned": "Not with `DDIMPipeline`", "epsilon": "use_clipped_model_output=True"}
    assert classes or named.get(kind, "DDIMPipeline") in card


# ---- what generic tools ask ------------------------------------------------------------------------------------------


class Watching(PipelineCallback):
    """As diffusers' own, which count on the names of a pipeline for text."""

    @property
    def tensor_inputs(self):
        return ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        self.seen = [*getattr(self, "seen", []), (step_index, pipeline.num_timesteps, pipeline.guidance_scale, pipeline.interrupt)]
        if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
            pipeline._guidance_scale = 1.0
        return callback_kwargs


@pytest.mark.row(76, ASKED)
def test_diffusers_callbacks_are_called_and_change_the_guidance():
    pipeline, asked = solved(small_pipeline(classes=3), "ddim", steps=6), []
    pipeline.unet.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    first, second = Watching(0.5), Watching(1.0)
    options = {"class_labels": [0, 2], "num_inference_steps": 6, "guidance_scale": 3.0}
    pipeline(2, callback_on_step_end=MultiPipelineCallbacks([first, second]), **options)
    assert first.seen == [(k, 6, 3.0 if k < 4 else 1.0, False) for k in range(6)]
    assert asked == [4, 4, 4, 4, 2, 2] and [step for step, *_ in second.seen] == list(range(6))
    pipeline(2, callback_on_step_end=IPAdapterScaleCutoffCallback(None, 99), **options)
    with pytest.raises(InputError, match="can be given x_t, x_0, class_labels, latents, but not prompt_embeds"):
        pipeline(2, callback_on_step_end=SDCFGCutoffCallback(), **options)


@pytest.mark.row(76, ASKED)
def test_a_callback_changes_x_t_under_either_name():
    pipeline = solved(small_pipeline())

    def scaled(name):
        def callback(pipe, step, t, tensors):
            tensors[name] = tensors[name] * 0
            return tensors

        return callback

    for name in ("x_t", "latents"):
        assert (pipeline(num_inference_steps=5, callback_on_step_end=scaled(name), output_type="latent").images == 0).all()


@pytest.mark.row(76, ASKED)
@pytest.mark.parametrize("name", ["unipc", "EulerDiscreteScheduler"])
def test_latents_go_in_and_come_out(name):
    pipeline = small_pipeline()
    if name in SCHEDULERS:
        pipeline = solved(pipeline, name)
    else:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    begun = pipeline(num_inference_steps=5, latents=noise, output_type="latent").images
    assert torch.equal(begun, pipeline(num_inference_steps=5, generator=torch.Generator().manual_seed(4), output_type="latent").images)
    assert torch.equal((begun / 2 + 0.5).clamp(0, 1), pipeline(num_inference_steps=5, latents=noise, output_type="pt").images)
    for wrong in (noise[0], noise.repeat(2, 1, 1, 1)):
        with pytest.raises(InputError, match=r"latents has shape .*, but must have \(1, 1, 8, 8\)"):
            pipeline(latents=wrong)


def test_a_pipeline_that_has_not_been_called_answers_too():
    pipeline = small_pipeline()
    assert (pipeline.guidance_scale, pipeline.num_timesteps, pipeline.interrupt) == (1.0, 0, False)


OURS = [name for name in SCHEDULERS if SCHEDULERS[name][0].__module__.startswith("debias_diffusers")]
x = torch.zeros(2, 3, 4, 4)
WRONG_STEPS = [(x, 777, x), (x, "a", x), (x, None, x), (x, torch.tensor([800, 600]), x), (x, 800.5, x)]
WRONG_STEPS += [(given, 800, x) for given in (torch.cat([x, x], 1), x[:, :2], x[:1], None, x.numpy())]
WRONG_LISTS = [[], [1, 500], [500, 500], [1500, 5], [5, -1], [500.5, 3.0], ["a"], "500", [[5, 3]]]


@pytest.mark.row(76, ASKED)
@pytest.mark.parametrize("name", OURS)
def test_a_solver_refuses_a_wrong_call_in_a_sentence(name, trials):
    assert len(OURS) >= 5 and not set(OURS) & set(FLOW)
    kind, changes = SCHEDULERS[name]

    def new(steps=5):
        scheduler = kind.from_config(DDPMScheduler(timestep_spacing="leading").config, **changes)
        if steps:
            scheduler.set_timesteps(timesteps=[800, 600, 400, 200, 100])
        return scheduler

    calls = [lambda given=given: new().step(*given) for given in WRONG_STEPS]
    calls += [lambda steps=steps: new().set_timesteps(steps) for steps in (0, -1, None, 1001, "5", 2.5)]
    calls += [lambda chosen=chosen: new().set_timesteps(timesteps=chosen) for chosen in WRONG_LISTS]
    if name in ("heun", "unipc"):  # the others need to remember nothing
        calls += [lambda: new(0).step(x, 999, x), lambda: beyond_the_end(new())]
    for call in calls:
        with pytest.raises(InputError, match=r"but must|none of the timesteps|but they must|call set_timesteps"):
            call()
        trials()


def beyond_the_end(scheduler):
    for t in [*scheduler.timesteps, scheduler.timesteps[-1]]:
        scheduler.step(x, t, x)


@pytest.mark.row(76, ASKED)
@pytest.mark.parametrize("steps", [0, -3, None, "ten"])
def test_a_pipeline_refuses_steps_that_are_none(steps):
    with pytest.raises(InputError, match="num_inference_steps is"):
        small_pipeline()(num_inference_steps=steps)
