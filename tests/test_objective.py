"""Schedule, weighting and loss against the reference implementation, diffusers, and closed forms."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
)
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file

from debias_diffusers import loss_weight, register_weighting
from debias_diffusers.config.registry import WEIGHTINGS
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.validation.objective import objective_problems
from debias_diffusers.diffusion import weighting
from debias_diffusers.diffusion.loss import Objective, make_objective, weight_table
from debias_diffusers.diffusion.noise_schedule import (
    Schedule,
    betas_of_snr,
    make_schedule,
    rectified_flow,
    schedule_of_scheduler,
    snr_of_betas,
    variance_preserving,
)
from debias_diffusers.diffusion.weighting import REPEATED_FUNCTIONS, WEIGHTING_FUNCTIONS, effective_sample_size, weight
from debias_diffusers.errors import InputError
from debias_diffusers.pipelines.solvers import exported_scheduler, make_scheduler

# The names of the reference implementation.
NAMES = {"constant": "constant", "p2": "p2", "min_snr": "min_snr", "inverse_snr": "snr", "debiased": "debias"}
SPACES = ("epsilon", "sample", "v_prediction", "flow")
SCHEDULES = ("linear", "cosine", "scaled_linear", "sigmoid")

# Every weighting in every space, written out: S is the SNR, t = 1 / (1 + sqrt S) the time of rectified flow.
G, K, P, SD = 5.0, 2.0, 0.5, 0.7
B = 0.7
PARAMETERS = {"snr_gamma": G, "p2_k": K, "p2_gamma": P, "sigma_data": SD, "sigmoid_bias": B}


def in_all_spaces(on_noise):
    """What a weight on the noise is in every space."""
    return (
        on_noise,
        lambda S: S * on_noise(S),
        lambda S: S / (S + 1) * on_noise(S),
        lambda S, t: (1 - t) ** 2 * on_noise(S),
    )


def held_edm(S):
    """(1 + sigma^2 / sd^2) N(ln sigma; -1.2, 1.2^2), which EDM's table 1 says, from its maximum on towards more noise the same."""

    def edm(log_sigma):
        return (1 + np.exp(2 * log_sigma) / SD**2) * np.exp(-((log_sigma + 1.2) ** 2) / (2 * 1.2**2))

    fine = np.linspace(-3, 3, 600_001)
    peak = fine[edm(fine).argmax()]  # where the slope is 0, so that a value beside it is right to 1e-10
    return torch.from_numpy(edm(np.minimum(-np.log(S.numpy()) / 2, peak)) / edm(peak))


CLOSED_FORMS = {
    "constant": (lambda S: S**0, lambda S: S, lambda S: S / (S + 1), lambda S, t: (1 - t) ** 2),
    "debiased": (lambda S: S**-0.5, lambda S: S**0.5, lambda S: S**0.5 / (S + 1), lambda S, t: t * (1 - t)),
    "inverse_snr": (lambda S: 1 / S, lambda S: S**0, lambda S: 1 / (S + 1), lambda S, t: t**2),
    "p2": (
        lambda S: (K + S) ** -P,
        lambda S: S * (K + S) ** -P,
        lambda S: S * (K + S) ** -P / (S + 1),
        lambda S, t: (1 - t) ** 2 * (K + S) ** -P,
    ),
    "min_snr": (
        lambda S: S.clamp(max=G) / S,
        lambda S: S.clamp(max=G),
        lambda S: S.clamp(max=G) / (S + 1),
        lambda S, t: t**2 * S.clamp(max=G),
    ),
    "soft_min_snr": (
        lambda S: G / (S + G),
        lambda S: G * S / (S + G),
        lambda S: G * S / ((S + G) * (S + 1)),
        lambda S, t: t**2 * G * S / (S + G),
    ),
    "truncated_snr": (
        lambda S: S.clamp(min=1) / S,
        lambda S: S.clamp(min=1),
        lambda S: S.clamp(min=1) / (S + 1),
        lambda S, t: t**2 * S.clamp(min=1),
    ),
    "edm": (
        lambda S: 1 + 1 / (S * SD**2),
        lambda S: S + SD**-2,
        lambda S: (S + SD**-2) / (S + 1),
        lambda S, t: t**2 * (S + SD**-2),
    ),
    "edm_monotonic": in_all_spaces(held_edm),
    "flow": (
        lambda S: (S**0.5 + 1) ** 2 / S,
        lambda S: (S**0.5 + 1) ** 2,
        lambda S: (S**0.5 + 1) ** 2 / (S + 1),
        lambda S, t: t**0,
    ),
    "v": (
        lambda S: (S + 1) / S,
        lambda S: S + 1,
        lambda S: S**0,
        lambda S, t: t**2 + (1 - t) ** 2,
    ),
    "sigmoid": in_all_spaces(lambda S: math.exp(B) / (math.exp(B) + S)),
    "cosmap": (
        lambda S: 2 / math.pi * (1 + S**0.5) ** 4 / (S * (1 + S)),
        lambda S: 2 / math.pi * (1 + S**0.5) ** 4 / (1 + S),
        lambda S: 2 / math.pi * (1 + S**0.5) ** 4 / (1 + S) ** 2,
        lambda S, t: 2 / (math.pi * (1 - 2 * t + 2 * t**2)),
    ),
    "sigma_sqrt": (
        lambda S: (1 + S**0.5) ** 4 / S,
        lambda S: (1 + S**0.5) ** 4,
        lambda S: (1 + S**0.5) ** 4 / (1 + S),
        lambda S, t: t**-2,
    ),
}


def own(name):
    """The parameters that a weighting has."""
    return {parameter: PARAMETERS[parameter] for parameter in WEIGHTINGS[name].parameters}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "losses.safetensors")


def test_every_weighting_has_a_row_here():
    assert set(CLOSED_FORMS) == set(WEIGHTING_FUNCTIONS)
    assert set(WEIGHTINGS) == {*WEIGHTING_FUNCTIONS, *REPEATED_FUNCTIONS, "variational"}
    for name, spec in WEIGHTINGS.items():
        assert spec.repeats == tuple(REPEATED_FUNCTIONS.get(name, ()))


# ---- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_weights_are_their_closed_forms_in_every_space(name):
    S = torch.logspace(-12, 12, 400, dtype=torch.float64)
    t = 1 / (1 + S.sqrt())
    for space, form in zip(SPACES, CLOSED_FORMS[name]):
        expected = form(S, t) if space == "flow" else form(S)
        close = 1e-9 if space == "flow" or name == "edm_monotonic" else 1e-12 if name == "sigmoid" else 1e-13
        torch.testing.assert_close(weight(S, name, space, **own(name)), expected, rtol=close, atol=0)


@pytest.mark.row(33, "the debiased weights are those of the paper at every timestep, for every prediction type")
@pytest.mark.parametrize("name", NAMES)
def test_weights_equal_the_reference_at_every_timestep(golden, name):
    table = make_objective(ObjectiveConfig(weighting=name)).weights
    expected = golden[f"linear/weights/{NAMES[name]}"]
    assert table.dtype == torch.float64 and table.shape == (1000,)
    assert ((table - expected) / expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", WEIGHTING_FUNCTIONS)
def test_weights_have_their_limits_where_the_snr_is_zero_or_infinite(name):
    zero, infinite = torch.zeros(1, dtype=torch.float64), torch.full((1,), torch.inf, dtype=torch.float64)
    at_zero = {"inverse_snr": 1.0, "truncated_snr": 1.0, "edm": 1 / SD**2, "flow": 1.0, "v": 1.0, "cosmap": 2 / math.pi, "sigma_sqrt": 1.0}
    for space in SPACES[1:]:
        assert weight(zero, name, space, **own(name)).item() == pytest.approx(at_zero.get(name, 0.0), rel=1e-12, abs=1e-70)
        assert weight(infinite, name, space, **own(name)).isfinite()
    assert weight(infinite, name, "epsilon", **own(name)).isfinite() or name == "sigma_sqrt"  # which grows with the SNR
    assert weight(zero, name, "epsilon", **own(name)).isinf() == bool(WEIGHTINGS[name].unbounded)


def test_the_debiased_weight_is_a_s_on_v_and_t_1_minus_t_on_the_flow():
    schedule = make_schedule(ObjectiveConfig(noise_schedule="scaled_linear"))
    a, s = schedule.a, schedule.s
    for space, expected in {"epsilon": s / a, "sample": a / s, "v_prediction": a * s}.items():
        torch.testing.assert_close(weight(schedule.snr, "debiased", space), expected, rtol=1e-12, atol=0)
    flow = rectified_flow(100)
    torch.testing.assert_close(weight(flow.snr, "debiased", "flow"), flow.s * (1 - flow.s), rtol=1e-12, atol=1e-70)


def test_floor_and_ceiling_bound_the_snr_that_the_weighting_sees():
    S = torch.tensor([1e-6, 0.1, 1e4], dtype=torch.float64)
    bounds = {"snr_floor": 1e-2, "snr_ceiling": 100.0}
    on_noise = torch.tensor([10.0, 0.1**-0.5, 0.1], dtype=torch.float64)
    torch.testing.assert_close(weight(S, "debiased", "epsilon", **bounds), on_noise)
    torch.testing.assert_close(weight(S, "debiased", "sample", **bounds), S * on_noise)
    torch.testing.assert_close(weight(S, "debiased", "v_prediction", **bounds), S / (S + 1) * on_noise)
    bounded = make_objective(ObjectiveConfig(noise_schedule="cosine", snr_floor=1e-3)).weights
    assert bounded.max().item() == pytest.approx(1e-3**-0.5) and effective_sample_size(bounded) == pytest.approx(0.21, abs=0.01)


@pytest.mark.parametrize(
    "schedule, terminal_snr, mean, largest, last_tenth, last_quarter, size",
    [
        ("linear", 4.0e-5, 17.8, 157, 0.57, 0.85, 0.24),
        ("scaled_linear", 4.7e-3, 3.02, 14.6, 0.37, 0.66, 0.45),
        ("cosine", 2.4e-9, 24.8, 20290, 0.95, 0.97, 0.0015),
    ],
)
def test_the_figures_of_the_documentation(schedule, terminal_snr, mean, largest, last_tenth, last_quarter, size):
    objective = make_objective(ObjectiveConfig(noise_schedule=schedule))
    w = objective.weights
    measured = [objective.schedule.snr[-1], w.mean(), w.max(), w[900:].sum() / w.sum(), w[750:].sum() / w.sum()]
    expected = [terminal_snr, mean, largest, last_tenth, last_quarter]
    assert [float(value) for value in measured] == pytest.approx(expected, rel=0.02)
    assert effective_sample_size(w) == pytest.approx(size, rel=0.03)


def test_normalized_weights_have_mean_1_over_the_levels_that_are_drawn():
    for sampler in ("uniform", "stratified", "loss_second_moment", "logit_normal_corrected"):
        weights = make_objective(ObjectiveConfig(normalize_weights=True, timestep_sampler=sampler)).weights
        assert weights.mean().item() == pytest.approx(1)
        assert (weights / make_objective(ObjectiveConfig()).weights).diff().abs().max() < 1e-12  # the shape is the same
    weights = make_objective(ObjectiveConfig(normalize_weights=True, prediction_type="flow", timestep_sampler="logit_normal")).weights
    t = torch.sigmoid(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert weights[(t * 1000).long()].mean().item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("space", ("sample", "v_prediction", "flow"))
def test_the_last_level_is_trained_where_its_weight_has_a_floor(space):
    options = {"rescale_betas_zero_snr": space != "flow", "prediction_type": space}
    plain, floored = (make_objective(ObjectiveConfig(terminal_weight_floor=floor, **options)).weights for floor in (0.0, 0.5))
    assert plain[-1].item() < 1e-70 and floored[-1].item() == 0.5
    assert torch.equal(plain[:-1], floored[:-1])


def test_sigmoid_is_soft_min_snr_with_gamma_e_to_the_bias_and_p2_with_their_defaults():
    S = torch.logspace(-12, 12, 100, dtype=torch.float64)
    for bias in (-3.0, 0.0, math.log(5)):
        soft = weight(S, "soft_min_snr", "v_prediction", snr_gamma=math.exp(bias))
        torch.testing.assert_close(weight(S, "sigmoid", "v_prediction", sigmoid_bias=bias), soft, rtol=1e-12, atol=0)
    torch.testing.assert_close(weight(S, "sigmoid", "v_prediction"), weight(S, "p2", "v_prediction"), rtol=1e-12, atol=0)


def test_schedule_free_weights_make_one_objective_of_all_schedules():
    """The integral over log(SNR) of weight times error, here of an error that is 0 outside of what all schedules reach."""
    configs = [{"noise_schedule": name, "schedule_shift": shift} for name in SCHEDULES for shift in (1.0, 4.0)]
    configs += [{"prediction_type": "flow", "schedule_shift": shift} for shift in (1.0, 0.1)]
    for name in ("constant", "min_snr", "edm_monotonic"):
        found = []
        for options in configs:
            config = ObjectiveConfig(weighting=name, schedule_free_weights=True, **options)
            schedule, space = make_schedule(config), config.prediction_type
            errors = (1 + torch.cos((schedule.snr.log() * math.pi / 4).clamp(-math.pi, math.pi))) / schedule.snr  # of x_0
            per_x_0 = schedule.x_0_per_prediction(space).square()
            found.append((weight_table(config, schedule, space) * errors / per_x_0).nan_to_num().mean().item())
        assert found == pytest.approx([found[-1]] * len(found), rel=2e-3)
        if name == "constant":
            assert found[-1] == pytest.approx(8, rel=1e-4)  # of 1 + cos over [-4, 4]


def test_schedule_free_weights_without_more_are_the_variational_bound():
    """In continuous time it is half the integral of the squared error of x_0 over the SNR (VDM, arXiv 2107.00630, equation 18)."""
    for options in ({}, {"noise_schedule": "cosine"}, {"rescale_betas_zero_snr": True}):
        config = ObjectiveConfig(weighting="constant", schedule_free_weights=True, prediction_type="sample", **options)
        weights, snr = make_objective(config).weights[20:], make_schedule(config).snr
        torch.testing.assert_close(weights[:-1], -1000 * torch.gradient(snr)[0][20:-1], rtol=0.02, atol=1e-4)


# ---- as other code has them ------------------------------------------------------------------------------------------


def test_the_weights_of_others_and_how_far_they_are_off():
    S = torch.tensor([1e-4], dtype=torch.float64)

    def too_heavy(name, space):
        return (weight(S, name, space) / weight(S, "debiased", space)).item()

    for name in REPEATED_FUNCTIONS:
        assert too_heavy(name, "epsilon") == 1
    assert too_heavy("debiased_as_is", "v_prediction") == pytest.approx(1e4, rel=1e-3)  # 1 / (a s) for 1 / sqrt(S)
    assert too_heavy("debiased_as_is", "sample") == pytest.approx(1e4)
    assert too_heavy("debiased_diffengine", "v_prediction") == pytest.approx(100, rel=1e-3)  # 1 / a
    torch.testing.assert_close(weight(S, "debiased_kohya", "v_prediction"), weight(S, "inverse_snr", "v_prediction"))
    clean = torch.tensor([1e4], dtype=torch.float64)
    assert weight(clean, "debiased_kohya", "epsilon").item() == pytest.approx(1000**-0.5)


def test_the_papers_code_is_repeated_in_the_space_where_it_is_right(golden):
    objective = make_objective(ObjectiveConfig(weighting="debiased_as_is"))
    assert torch.equal(objective.weights, make_objective(ObjectiveConfig()).weights)


# ---- a weighting of one's own ----------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """Registered weightings are forgotten after the test."""
    for mapping in (WEIGHTINGS, WEIGHTING_FUNCTIONS):
        monkeypatch.setitem(mapping, "halfway", None)
        del mapping["halfway"]


def test_a_registered_function_is_a_weighting_in_every_space(registry):
    @register_weighting
    def halfway(snr, snr_gamma=5.0):
        return (snr_gamma / snr) ** 0.25

    for space in SPACES:
        config = ObjectiveConfig(weighting="halfway", prediction_type=space, snr_gamma=16.0)
        assert objective_problems(config) == []
        objective = make_objective(config)
        expected = weight(objective.schedule.snr, "halfway", space, snr_gamma=16.0)
        assert torch.equal(objective.weights, expected)
    assert loss_weight(DDPMScheduler(), torch.tensor([500]), "halfway", snr_gamma=1).item() > 0
    with pytest.raises(InputError, match="'halfway' is there already"):
        register_weighting(halfway)
    with pytest.raises(InputError, match="parameter 'k' is not known here; take one of: p2_gamma"):
        register_weighting(lambda snr, k: snr)
    with pytest.raises(InputError, match=r"parameter snr_gamma of <lambda> has default 7\.0, the flag's is 5\.0"):
        register_weighting(lambda snr, snr_gamma=7.0: snr)
    with pytest.raises(InputError, match="must return a tensor of the shape of the SNR, but returned 2"):
        register_weighting(lambda snr: 2.0)
    for nothing in (torch.rsqrt, lambda: 1, 3):
        with pytest.raises(InputError, match="write a function with a name"):
            register_weighting(nothing)


@pytest.mark.parametrize(
    "function, named",
    [
        (lambda snr: snr - 1, "gives -0.0095 at t = 259"),
        (lambda snr: snr / 0, "gives inf at t = 0"),
        (lambda snr: 0 * snr, "is 0 at every"),
    ],
)
def test_weights_that_cannot_be_trained_with_are_refused(registry, function, named):
    function.__name__ = "halfway"
    register_weighting(function)
    with pytest.raises(InputError, match=f"weighting halfway on epsilon {named}"):
        make_objective(ObjectiveConfig(weighting="halfway"))


@pytest.mark.parametrize(
    "options, said", [({"weighting": "debaised"}, "did you mean debiased"), ({"weighting": "variational"}, "--learn_sigma")]
)
def test_weightings_without_a_meaning_are_refused_in_python_too(options, said):
    with pytest.raises(InputError, match=said):
        make_objective(ObjectiveConfig(**options))


@pytest.mark.parametrize(
    "options, said",
    [
        ({"prediction_type": "v"}, "prediction_type is 'v', but must be one of .*; did you mean v_prediction"),
        ({"noise_schedule": "squaredcos_cap_v2"}, "noise_schedule is 'squaredcos_cap_v2', but must be .*cosine"),
        ({"num_train_timesteps": 500.0}, "num_train_timesteps is 500.0, but must be a whole number; did you mean 500"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, but must be at least 2"),
        ({"snr_gamma": -5, "weighting": "min_snr"}, "snr_gamma is -5.0, but must be above 0"),
        ({"prediction_type": "v_prediction", "noise_schedule": "rectified_flow"}, "take --prediction_type sample"),
        ({"prediction_type": "flow", "noise_schedule": "cosine"}, "prediction_type flow has its own"),
        ({"prediction_type": "flow", "weighting": "debiased_kohya"}, "knows epsilon, v_prediction only"),
    ],
)
def test_values_that_no_command_line_has_looked_at_are_refused_in_python_too(options, said):
    """A prediction type by another name had the weights of one, and the target of another."""
    with pytest.raises(InputError, match=said):
        make_objective(ObjectiveConfig(**options))


@pytest.mark.parametrize(
    "network, images, said",
    [
        (lambda x, t: x[:, :1], torch.zeros(2, 3, 4, 4), r"gives \(2, 1, 4, 4\) for images \(2, 3, 4, 4\), but must give \(2, 3, 4, 4\)"),
        (lambda x, t: x.repeat(1, 2, 1, 1), torch.zeros(2, 3, 4, 4), r"gives \(2, 6, 4, 4\)"),  # a learned variance that nothing learns
        (lambda x, t: x[:1], torch.zeros(2, 3, 4, 4), r"gives \(1, 3, 4, 4\)"),
        (lambda x, t: x, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"images are torch.uint8, but must be floats"),
    ],
)
def test_what_torch_would_stretch_cut_or_round_to_0_is_refused(network, images, said):
    objective = make_objective(ObjectiveConfig())
    with pytest.raises(InputError, match=said):
        objective(network, images, torch.randn(2, 3, 4, 4), torch.tensor([1, 2]))


def test_an_objective_takes_numbers_of_numpy_and_nothing_but_an_objective():
    assert len(make_schedule(ObjectiveConfig(num_train_timesteps=np.int64(500)))) == 500
    for make in (make_schedule, make_objective):
        with pytest.raises(InputError, match="made of an ObjectiveConfig, and not of DDPMScheduler"):
            make(DDPMScheduler())


def test_parameters_that_overflow_are_refused():
    with pytest.raises(InputError, match=r"weighting p2 on epsilon gives 1\.73e\+39 at t = 293"):
        make_objective(ObjectiveConfig(weighting="p2", p2_k=0.1, p2_gamma=400.0))


def test_too_few_timesteps_for_betas_below_1_are_refused_whether_or_not_the_schedule_is_named():
    """At T = 20 the last beta of the linear schedule is 1, and at T = 10 there is no schedule at all."""
    for T in (10, 20):
        config = ObjectiveConfig(weighting="constant", num_train_timesteps=T)
        for refuses in (make_schedule, make_objective):
            with pytest.raises(InputError, match=f"num_train_timesteps is {T}, but the betas of noise_schedule linear"):
                refuses(config)
        assert "take at least 21" in objective_problems(config)[0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_shift_that_solvers_cannot_hold_is_refused_with_one_they_can(schedule):
    """diffusers keeps alphas_cumprod in float32: 1 - alphas_cumprod must not be 0."""
    for shift in (1e5, 1e300, 1e-7):
        with pytest.raises(InputError, match="take a shift from") as error:
            make_schedule(ObjectiveConfig(noise_schedule=schedule, schedule_shift=shift))
        least, most = (float(word.strip(",")) for word in str(error.value).split("take a shift from ")[1].split(" to "))
        for bound in (least, most):  # what is advised works
            config = ObjectiveConfig(noise_schedule=schedule, schedule_shift=bound)
            assert (1 - exported_scheduler(config).alphas_cumprod[0]) > 0 and make_schedule(config).snr.isfinite().all()
    for shift in (1e-14, 1e40):
        with pytest.raises(InputError, match="take a shift from"):
            make_schedule(ObjectiveConfig(prediction_type="flow", schedule_shift=shift))


# ---- one objective in every space ------------------------------------------------------------------------------------


def straight(snr):
    """Rectified flow at given SNR."""
    root = snr.sqrt()
    return Schedule(root / (1 + root), 1 / (1 + root), snr, torch.arange(len(snr)), {})


def prediction_of(space, guess, x_t, a, s):
    """A guess of x_0 as it looks in a space."""
    noise = (x_t - a * guess) / s
    return {"epsilon": noise, "sample": guess, "v_prediction": a * noise - s * guess, "flow": noise - guess}[space]


@pytest.mark.row(33, "the debiased weights are those of the paper at every timestep, for every prediction type")
@pytest.mark.parametrize("name", WEIGHTING_FUNCTIONS)
@pytest.mark.parametrize("options", [*({"noise_schedule": name} for name in SCHEDULES), {"prediction_type": "flow"}], ids=str)
@pytest.mark.parametrize("shift", (1.0, 64.0))
@pytest.mark.parametrize("zero", (False, True))
def test_one_weighting_gives_the_same_gradients_in_every_space(name, options, shift, zero):
    """A linear probe network guesses x_0 from features; its gradient does not depend on the space its guess is scored in."""
    torch.manual_seed(0)
    zero = zero and "noise_schedule" in options
    snr = make_schedule(ObjectiveConfig(schedule_shift=shift, rescale_betas_zero_snr=zero, **options)).snr
    spaces = SPACES[1:] if snr[-1] == 0 else SPACES
    x_0, noise = torch.randn(2, 40, 1, 4, 4, dtype=torch.float64)
    features = torch.randn(40, 6, dtype=torch.float64)
    t = torch.linspace(0, len(snr) - 1, 40).long()
    gradients = []
    for space in spaces:
        schedule = straight(snr) if space == "flow" else variance_preserving(snr)
        probe = torch.ones(6, 16, dtype=torch.float64, requires_grad=True)
        guess = (features @ probe).view(x_0.shape)
        a, s = (table[t].view(-1, 1, 1, 1) for table in (schedule.a, schedule.s))
        weights = weight(snr, name, space, snr_floor=1e-3 if name != "constant" else 0.0, snr_ceiling=1e4, **own(name))
        prediction = prediction_of(space, guess, schedule.add_noise(x_0, noise, t), a, s)
        Objective(schedule, space, weights).terms(prediction, x_0, noise, t).loss.sum().backward()
        gradients.append(probe.grad)
    for other in gradients[1:]:
        assert ((other - gradients[0]).abs() / gradients[0].abs().max()).max() < 1e-10


@pytest.mark.parametrize("space", SPACES)
def test_x_0_per_prediction_is_the_derivative(space):
    snr = torch.tensor([1e-3, 0.5, 40.0], dtype=torch.float64)
    schedule = straight(snr) if space == "flow" else variance_preserving(snr)
    x_t, one, other = torch.randn(3, 3, dtype=torch.float64)
    moved = prediction_of(space, one, x_t, schedule.a, schedule.s) - prediction_of(space, other, x_t, schedule.a, schedule.s)
    torch.testing.assert_close(schedule.x_0_per_prediction(space) * moved, one - other)


# ---- terms against the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_weighted_terms_equal_the_reference(golden, name):
    objective = make_objective(ObjectiveConfig(weighting=name))
    terms = objective.terms(golden["model_output"][:, :3], golden["x0"], golden["noise"], golden["t"])
    torch.testing.assert_close(terms.loss, golden[f"linear/epsilon/{NAMES[name]}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.mse, golden["linear/epsilon/constant"], rtol=1e-5, atol=0)


def test_noised_images_equal_the_reference(golden):
    x_t = make_schedule(ObjectiveConfig()).add_noise(golden["x0"], golden["noise"], golden["t"])
    torch.testing.assert_close(x_t, golden["linear/x_t"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "space, name, key",
    [
        ("sample", "inverse_snr", "linear/sample/constant"),  # 1/SNR on the noise is 1 on x_0
        ("sample", "min_snr", "linear/sample/min_snr"),
    ],
)
def test_terms_in_other_spaces_equal_the_reference_where_it_is_right(golden, space, name, key):
    objective = make_objective(ObjectiveConfig(weighting=name, prediction_type=space))
    terms = objective.terms(golden["model_output"][:, :3], golden["x0"], golden["noise"], golden["t"])
    torch.testing.assert_close(terms.loss, golden[key], rtol=1e-5, atol=0)


def test_the_velocity_target_equals_the_reference_and_diffusers(golden):
    schedule = make_schedule(ObjectiveConfig())
    x_0, noise, t = golden["x0"], golden["noise"], golden["t"]
    target = schedule.target("v_prediction", x_0, noise, t)
    mse = (golden["model_output"][:, :3] - target).square().mean((1, 2, 3))
    torch.testing.assert_close(mse, golden["linear/v_prediction/constant"], rtol=1e-5, atol=0)
    torch.testing.assert_close(target, DDPMScheduler().get_velocity(x_0, noise, t), rtol=0, atol=1e-5)


# ---- schedules and diffusers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shift", (1.0, 16.0, 64.0, 0.25))
@pytest.mark.parametrize("T", (100, 1000, 4000))
@pytest.mark.parametrize("zero", (False, True))
def test_diffusers_draws_over_the_schedule_that_was_trained(name, shift, T, zero):
    config = ObjectiveConfig(
        noise_schedule=name, schedule_shift=shift, num_train_timesteps=T, rescale_betas_zero_snr=zero, prediction_type="v_prediction"
    )
    schedule = make_schedule(config)
    exported = exported_scheduler(config)
    # diffusers multiplies in float32, and rescales in float32 once more.
    close = 1e-5 if T == 4000 else 2e-6 if zero and shift > 1 else 1e-6
    assert (exported.alphas_cumprod.double() - schedule.alphas_cumprod).abs().max() < close
    back = schedule_of_scheduler(exported)
    torch.testing.assert_close(back.snr, schedule.snr, rtol=1e-8, atol=0)
    for solver in ("ddim", "dpmsolver++", "unipc"):  # which do not know all names
        other = make_scheduler(solver, exported, "linspace", 10).alphas_cumprod.double()
        assert (other - schedule.alphas_cumprod).abs().max() < close


@pytest.mark.parametrize("name", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))
@pytest.mark.parametrize("zero", (False, True))
def test_a_scheduler_of_diffusers_is_read_as_it_is(name, zero):
    scheduler = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero)
    schedule = schedule_of_scheduler(scheduler)
    assert (schedule.alphas_cumprod - scheduler.alphas_cumprod.double()).abs().max() < 1e-6
    t = torch.arange(999)
    torch.testing.assert_close(schedule.snr[t], compute_snr(scheduler, t).double(), rtol=0.02, atol=0)  # theirs is float32
    assert schedule.ends_in_noise == zero


@pytest.mark.parametrize("shift", (1.0, 3.0, 0.125))
def test_the_levels_of_rectified_flow_are_those_of_diffusers(shift):
    config = ObjectiveConfig(prediction_type="flow", schedule_shift=shift**-2)
    schedule, exported = make_schedule(config), exported_scheduler(config)
    assert type(exported) is FlowMatchEulerDiscreteScheduler and exported.config.shift == pytest.approx(shift)
    torch.testing.assert_close(schedule.s.flip(0).float(), exported.sigmas[:1000], rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.timesteps.flip(0), exported.timesteps, rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.a + schedule.s, torch.ones(1000, dtype=torch.float64))
    x_0, noise = torch.randn(2, 3, 1, 2, 2)
    t = torch.tensor([3, 500, 999])
    theirs = exported.scale_noise(x_0, exported.timesteps[999 - t], noise)
    torch.testing.assert_close(schedule.add_noise(x_0, noise, t), theirs, rtol=0, atol=1e-5)
    assert torch.equal(schedule.target("flow", x_0, noise, t), noise - x_0)
    torch.testing.assert_close(schedule_of_scheduler(exported).snr, schedule.snr, rtol=1e-12, atol=0)
    assert schedule.ends_in_noise


def test_a_shift_multiplies_the_snr():
    plain, shifted = (make_schedule(ObjectiveConfig(schedule_shift=shift)).snr for shift in (1.0, 64.0))
    torch.testing.assert_close(shifted, 64 * plain, rtol=1e-14, atol=0)
    torch.testing.assert_close(snr_of_betas(betas_of_snr(shifted)), shifted, rtol=1e-9, atol=0)
    plain, shifted = (make_schedule(ObjectiveConfig(schedule_shift=shift, prediction_type="flow")).snr for shift in (1.0, 64.0))
    torch.testing.assert_close(shifted, 64 * plain, rtol=1e-12, atol=0)


def test_the_cosine_schedule_is_its_formula():
    alphas_cumprod = make_schedule(ObjectiveConfig(noise_schedule="cosine")).alphas_cumprod

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = torch.tensor([f(t + 1) / f(0) for t in range(990)], dtype=torch.float64)  # the last betas are bounded
    torch.testing.assert_close(alphas_cumprod[:990], expected, rtol=1e-12, atol=0)
    assert 2e-9 < make_schedule(ObjectiveConfig(noise_schedule="cosine")).snr[-1] < 3e-9


def test_rescaling_ends_in_noise_and_keeps_the_first_level():
    plain, rescaled = (make_schedule(ObjectiveConfig(rescale_betas_zero_snr=zero)) for zero in (False, True))
    assert rescaled.a[-1] == 0 and rescaled.s[-1] == 1 and rescaled.betas[-1] == 1
    assert rescaled.a[0].item() == pytest.approx(plain.a[0].item(), rel=1e-14)
    assert (rescaled.snr.diff() < 0).all()


# ---- loss_weight -----------------------------------------------------------------------------------------------------


def test_loss_weight_serves_a_loop_of_somebody_else(golden):
    t = torch.tensor([0, 500, 999])
    weights = loss_weight(DDPMScheduler(), t)
    assert weights.shape == (3,) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), golden["linear/weights/debias"][t], rtol=1e-6, atol=0)
    minimum = loss_weight(DDIMScheduler(), t, weighting="min_snr", snr_gamma=5)
    torch.testing.assert_close(minimum.double(), golden["linear/weights/min_snr"][t], rtol=1e-6, atol=0)
    velocity = loss_weight(DDPMScheduler(prediction_type="v_prediction"), t)
    assert velocity.max() <= 0.5


def test_loss_weight_takes_timesteps_as_tensor_list_or_number():
    for scheduler, timesteps in ((DDPMScheduler(), [0, 500, 999]), (FlowMatchEulerDiscreteScheduler(), [1, 250.5, 1000.0])):
        weights = loss_weight(scheduler, torch.tensor(timesteps))
        assert torch.equal(loss_weight(scheduler, timesteps), weights) and torch.equal(loss_weight(scheduler, tuple(timesteps)), weights)
        for t, one in zip(timesteps, weights):
            assert torch.equal(loss_weight(scheduler, t), one) and loss_weight(scheduler, t).shape == ()
    for wrong in (-1, 1000, 1.5, [10, 1000], [1.0]):
        with pytest.raises(InputError, match="whole numbers from 0 to 999"):
            loss_weight(DDPMScheduler(), wrong)
    for wrong in (-1, 1000.5, [10, 1001]):
        with pytest.raises(InputError, match="from 0 to 1000"):
            loss_weight(FlowMatchEulerDiscreteScheduler(), wrong)
    for wrong in (None, "10", ["a"], [[1, 2], [3]], 10**30):
        with pytest.raises(InputError, match="timesteps must be a tensor, a list of numbers or a number"):
            loss_weight(DDPMScheduler(), wrong)


def test_loss_weight_of_a_flow_is_a_function_of_its_timesteps():
    t = torch.tensor([0.0, 250.0, 700.5, 1000.0])
    for scheduler in (FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)):
        torch.testing.assert_close(loss_weight(scheduler, t), t / 1000 * (1 - t / 1000))
    assert loss_weight(type("Mine", (FlowMatchEulerDiscreteScheduler,), {})(), t)[1] == 0.1875
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)  # its timestep 0 is pure noise
    torch.testing.assert_close(loss_weight(inverted, 1000 - t, "constant"), (1 - t / 1000) ** 2)
    with pytest.raises(InputError, match="from 0 to 1000"):
        loss_weight(FlowMatchEulerDiscreteScheduler(), torch.tensor([1000.5]))
    for scheduler, space in ((FlowMatchEulerDiscreteScheduler(), "epsilon"), (DDPMScheduler(), "flow")):
        with pytest.raises(InputError, match=f"prediction_type is {space}, which does not go with {type(scheduler).__name__}"):
            loss_weight(scheduler, torch.tensor([10]), prediction_type=space)


def test_loss_weight_computes_the_table_of_a_scheduler_once(monkeypatch):
    scheduler, t, made = DDPMScheduler(), torch.tensor([3, 700]), []
    original = weighting.schedule_of_scheduler
    monkeypatch.setattr(weighting, "schedule_of_scheduler", lambda own: made.append(own) or original(own))
    first = [loss_weight(scheduler, t, **options) for options in ({}, {"weighting": "min_snr"}, {"weighting": "min_snr", "snr_gamma": 1})]
    for _ in range(5):
        assert torch.equal(loss_weight(scheduler, t), first[0])
        assert torch.equal(loss_weight(scheduler, t, weighting="min_snr", snr_gamma=1), first[2])
    assert len(made) == 3 and not torch.equal(first[1], first[2])
    for gamma in range(1, 100):
        loss_weight(scheduler, t, weighting="min_snr", snr_gamma=gamma)
    assert len(weighting._tables[scheduler][2]) <= weighting.MAX_TABLES
    gone = weakref.ref(scheduler)
    made.clear()
    del scheduler
    gc.collect()
    assert gone() is None


def test_loss_weight_of_a_scheduler_that_changed_is_that_of_the_new_one():
    scheduler, t = DDPMScheduler(), torch.tensor([3, 700])
    before = loss_weight(scheduler, t)
    scheduler.register_to_config(beta_schedule="scaled_linear")
    other = DDPMScheduler(beta_schedule="scaled_linear")
    scheduler.betas, scheduler.alphas_cumprod = other.betas.clone(), other.alphas_cumprod.clone()
    assert torch.equal(loss_weight(scheduler, t), loss_weight(other, t)) and not torch.equal(loss_weight(scheduler, t), before)
    with torch.no_grad():
        scheduler.alphas_cumprod.mul_(0.5)  # in place
    halved = scheduler.alphas_cumprod[t].double()
    torch.testing.assert_close(loss_weight(scheduler, t).double(), ((1 - halved) / halved).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scheduler", [DDPMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["levels", "flow"])
def test_loss_weight_does_not_wait_for_a_device(scheduler):
    """A tensor on "meta" has no values: whatever reads one raises."""
    weights = loss_weight(scheduler, torch.empty(4, dtype=torch.long, device="meta"))
    assert weights.shape == (4,) and weights.dtype == torch.float32 and weights.device.type == "meta"


@pytest.mark.row(34, "weights that grow without bound as the SNR falls to 0 are an error")
def test_loss_weight_refuses_what_has_no_finite_weight():
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(InputError, match=r"not finite at timesteps \[999\]"):
        loss_weight(scheduler, torch.tensor([10, 999]))
    with pytest.raises(InputError, match=r"not finite at timesteps \[999\]"):
        loss_weight(scheduler, 999)
    assert loss_weight(scheduler, torch.tensor([10, 999]), prediction_type="v_prediction")[1] == 0
    for name, target in (("sigma_sqrt", "flow"), ("flow", "sample"), ("constant", "sample")):  # t^-2, and an SNR without bound
        with pytest.raises(InputError, match=r"not finite at timesteps \[0\.0\], where the SNR is 0 or infinite"):
            loss_weight(FlowMatchEulerDiscreteScheduler(), torch.tensor([0.0, 1.0]), name, target)
    with pytest.raises(InputError, match="weighting 'debias' is not known"):
        loss_weight(scheduler, torch.tensor([10]), weighting="debias")
    with pytest.raises(InputError, match="weighting 'variational' is not known"):
        loss_weight(scheduler, torch.tensor([10]), weighting="variational")
    with pytest.raises(
        InputError, match="prediction_type of debiased_kohya 'sample' is not known here; take one of: epsilon, v_prediction"
    ):
        loss_weight(scheduler, torch.tensor([10]), weighting="debiased_kohya", prediction_type="sample")
    t = torch.tensor([10])
    for options, named in (
        ({"weighting": "min_snr", "gamma": 3}, "parameter 'gamma' is not known"),
        ({"weighting": "debiased", "p2_k": 1}, "parameter 'p2_k' is not known here; take one of: snr_floor, snr_ceiling"),
        ({"weighting": "min_snr", "snr_gamma": -1}, "snr_gamma is -1"),
        ({"snr_floor": -1}, "snr_floor is -1"),
    ):
        with pytest.raises(InputError, match=named):
            loss_weight(scheduler, t, **options)
    for wrong in (torch.tensor([-1]), torch.tensor([1000]), torch.tensor([1.5])):
        with pytest.raises(InputError, match="whole numbers from 0 to 999"):
            loss_weight(scheduler, wrong)
    with pytest.raises(InputError, match="has no alphas_cumprod"):
        loss_weight(IPNDMScheduler(), t)
    with pytest.raises(InputError, match="take a ceiling above the floor"):
        loss_weight(scheduler, t, snr_floor=10.0, snr_ceiling=1.0)
    with pytest.raises(InputError, match="fixed shift"):
        schedule_of_scheduler(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def test_loss_weight_follows_a_scheduler_that_changes_its_table_itself():
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=False)
    t = torch.tensor([100, 500, 900])
    acp = scheduler.alphas_cumprod[t].double()
    torch.testing.assert_close(loss_weight(scheduler, t, prediction_type="epsilon").double(), ((1 - acp) / acp).sqrt(), rtol=1e-4, atol=0)
