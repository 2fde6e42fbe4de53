"""LoRA: what is trained and saved, what stock diffusers and other programs make of it, and how it is drawn with."""

import dataclasses
import hashlib
import importlib.util
import json
import re
import shutil
from functools import cache

import psutil
import pytest
import torch
from accelerate import Accelerator
from conftest import Forked, as_ranks, metrics, newest_step, run, sample_config, tensors, wait_for
from pushing import served
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from test_text_to_image import pictures, plan_of, plan_of_flags
from text_models import BASE, in_fp16_alone, make_base, text_args
from torch import nn

pytest.importorskip("peft")

from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard

from debias_diffusers import cli
from debias_diffusers.config.loading import update
from debias_diffusers.config.schema.network import LoraConfig
from debias_diffusers.convert import lora as kohya
from debias_diffusers.errors import InputError
from debias_diffusers.hub import publish
from debias_diffusers.hub.model_card import model_card
from debias_diffusers.pipelines.lora import load_text_model, read_lora
from debias_diffusers.runs.lora_folder import LORA_WEIGHTS
from debias_diffusers.sampling.generate import make_job, sample
from debias_diffusers.tasks import lora, text_to_image
from debias_diffusers.tasks.base import trained_parameters
from debias_diffusers.training import dry_run, state_dicts
from debias_diffusers.training.setup.build import build
from debias_diffusers.utils import seeding

RANK, ALPHA, STEPS = 4, 8, 3
LORA = ("--lora_rank", RANK, "--lora_alpha", ALPHA)
MODULES = 8 * 4  # to_q, to_k, to_v and to_out.0 of attn1 and attn2, in four transformers: one on the way down, one in the middle, two up


def trained(base, folder, *flags):
    """The folder of a training in this process."""
    flags = text_args(base, folder, *flags, *(() if "--max_steps" in flags else ("--max_steps", 8)))
    assert cli.train([str(word) for word in flags[1:]]) == 0
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags of a data set that is encoded at once."""
    folder = pictures(tmp_path_factory.mktemp("few") / "data", sizes=((8, 8),) * 4)
    for k in range(4):
        (folder / f"{k}.txt").write_text(f"a handwritten {['one', 'two', 'three', 'four'][k]}")
    return ("--dataset", folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"xl": make_base(folder / "xl"), "sd": make_base(folder / "sd", xl=False)}


@pytest.fixture(scope="module")
def runs(bases, few, tmp_path_factory):
    """A LoRA of each kind of base model: of 8 steps, and one that is only exported, with random adapters as its average."""
    folder = tmp_path_factory.mktemp("runs")
    found = {"xl": trained(bases["xl"], folder / "xl", *few, *LORA), "sd": folder / "sd"}
    task = plan_of(bases["sd"], found["sd"], *few, *LORA).task
    network = task.build()
    for parameter in trained_parameters(network).values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    averages = found["sd"] / "checkpoints" / "step-00000008"
    averages.mkdir(parents=True)
    save_file({name: parameter.detach() for name, parameter in trained_parameters(network).items()}, averages / "ema_0.9.safetensors")
    task.export(network, found["sd"])
    return found


# ---- training --------------------------------------------------------------------------------------------------------


def test_adapters_alone_are_saved(runs, bases):
    found = {name: load(content) for name, content in tensors(runs["xl"], 8).items()}
    assert set(found) == {"model.safetensors", "ema_0.9.safetensors", "optimizer.safetensors"}
    for name, values in found.items():
        assert values and all(".lora_A." in key or ".lora_B." in key for key in values), name
    trained = found["model.safetensors"]
    assert found["ema_0.9.safetensors"].keys() == trained.keys() and len(trained) == 2 * len({key.split(".lora_")[0] for key in trained})
    assert all(value.abs().max() > 0 for value in trained.values())
    whole = sum(path.stat().st_size for path in (bases["xl"] / "unet").iterdir())
    assert sum(len(content) for content in tensors(runs["xl"], 8).values()) < whole / 2


def test_adapters_are_drawn_from_the_seed_and_change_nothing_at_first(bases, few, tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    task = plan_of(bases["xl"], tmp_path / "run", *few, *LORA, "--seed", 3).task
    torch.manual_seed(seeding.derive_seed(3, "weights", 0))
    network = task.build()
    plain = UNet2DConditionModel.from_pretrained(bases["xl"] / "unet")
    given = (torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.randn(2, 16, 64))
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.rand(2, 6)}
    with torch.no_grad():  # on AVX-512 their matrix products differ in the last bits
        torch.testing.assert_close(network(*given, added_cond_kwargs=added).sample, plain(*given, added_cond_kwargs=added).sample)
    torch.manual_seed(seeding.derive_seed(3, "weights", 0))
    inject_adapter_in_model(PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), plain)
    expected = dict(plain.named_parameters())
    ours = trained_parameters(network)
    assert len(ours) == 2 * MODULES and all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_an_adapter_adds_alpha_over_rank_times_its_product(bases, few, tmp_path):
    """Against the formula W + alpha / rank B A on the weights of the stock UNet."""
    network = plan_of(bases["sd"], tmp_path / "run", *few, *LORA).task.build()
    plain = UNet2DConditionModel.from_pretrained(bases["sd"] / "unet")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
                A = network.get_parameter(name.replace("lora_B", "lora_A"))
                plain.get_parameter(name.split(".lora_")[0] + ".weight").add_(ALPHA / RANK * parameter @ A)
        given = (torch.randn(2, 4, 4, 4), torch.tensor([10, 900]), torch.randn(2, 16, 32))
        assert torch.allclose(network(*given).sample, plain(*given).sample, atol=1e-4)


def test_previews_copy_no_linear_layer_that_is_frozen_in_bf16(bases, few, tmp_path):
    """They draw as a network in float32 does, for which a GPU that is large enough for adapters in bf16 may have no room."""
    flags = ("--ema_decay", 0, "--mixed_precision", "bf16", "--param_dtype", "bf16")
    plan = plan_of(bases["xl"], tmp_path / "run", *few, *LORA, *flags)
    trainer = build(plan, None, Accelerator())[0]
    weights, plain = dict(trainer.state.model.named_parameters()), plan.task.build()
    for name, weight in weights.items():
        if ".lora_B." in name:
            weight.data.normal_()
    plain.load_state_dict({name: weight.float() for name, weight in weights.items()})
    images, prompts = trainer.hooks[0].images, ["a handwritten one"]
    with images.present():
        there = dict(images.network.named_parameters())
        linear = [f"{name}.weight" for name, layer in plain.named_modules() if isinstance(layer, nn.Linear) and ".lora_" not in name]
        assert len(linear) > MODULES and all(there[name].data_ptr() == weights[name].data_ptr() for name in linear)
        assert torch.equal(plan.task.draw(images.network, range(2), prompts), plan.task.draw(plain.eval(), range(2), prompts))
    assert all(weight.is_meta for weight in images.network.parameters())


def test_memory_that_a_preview_does_not_find_ends_no_training(bases, few, tmp_path, monkeypatch, capsys):
    def draw(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.8 GiB")

    monkeypatch.setattr(text_to_image.TextToImageTask, "draw", draw)
    trained(bases["xl"], tmp_path / "run", *few, *LORA, "--max_steps", 2, "--sample_every", 1)
    assert capsys.readouterr().err.count("no sample grid at step 2: CUDA out of memory.") == 1


def test_a_resumed_run_ends_with_the_same_bits(runs, bases, few, tmp_path):
    """As killed after its first checkpoint."""
    folder = shutil.copytree(runs["xl"], tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    trained(bases["xl"], folder, *few, *LORA)
    assert tensors(folder, 8) == tensors(runs["xl"], 8) and metrics(folder) == metrics(runs["xl"])


@pytest.mark.nightly
def test_killed_three_times_it_ends_with_the_same_bits(runs, bases, few, tmp_path):
    flags = text_args(bases["xl"], tmp_path / "run", *few, *LORA, "--max_steps", 8)
    for step in (1, 4, 4):
        process = Forked(*flags, "--checkpoint_every", 1)
        wait_for(lambda step=step: newest_step(tmp_path / "run") >= step)
        process.kill()
        process.process.join()
    code, _, err = run(*flags)
    assert code == 0, err
    assert tensors(tmp_path / "run", 8) == tensors(runs["xl"], 8) and metrics(tmp_path / "run") == metrics(runs["xl"])


@pytest.mark.nightly
def test_two_processes_train_the_same_and_resume(runs, bases, few, tmp_path):
    flags = text_args(bases["xl"], tmp_path / "run", *few, *LORA, "--max_steps", 8)
    code, err = as_ranks(2, *flags[:-1], 4)
    assert code == 0, err
    code, err = as_ranks(2, *flags)
    assert code == 0, err
    losses = [[line["loss"] for line in metrics(folder)] for folder in (runs["xl"], tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    whole = as_ranks(2, *text_args(bases["xl"], tmp_path / "whole", *few, *LORA, "--max_steps", 8))
    assert whole[0] == 0 and tensors(tmp_path / "whole", 8) == tensors(tmp_path / "run", 8)


def test_without_peft_it_is_one_sentence(bases, tmp_path, monkeypatch, capsys):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else there(name, *rest))
    assert cli.train([str(word) for word in text_args(bases["xl"], tmp_path / "run", *LORA)[1:]]) == 2
    assert "LoRA needs peft, which is not installed; run pip install" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lora_alpha", 4], "lora_alpha is 4.0, but lora_rank is left out"),
        (["--init", "."], "the whole UNet of base_model .* is trained"),
        (["--lora_rank", 4, "--lora_targets", "to_q", "to_z"], "lora_targets has to_z"),
        (["--lora_rank", 4, "--lora_targets", "norm1"], "peft refuses it"),
        (["--lora_rank", 4, "--base_model", "digits"], "has no weights"),
    ],
)
def test_what_does_not_go_with_lora_is_one_sentence(bases, flags, said, tmp_path):
    from debias_diffusers.config.validation.training import train_problems
    from debias_diffusers.errors import raise_all

    words = [str(word) for word in text_args(bases["xl"], tmp_path / "run", *flags)[1:]]
    with pytest.raises(InputError, match=said) as error:
        raise_all(train_problems(cli.train_command(words, None)[0]))
        plan_of_flags(*words)
    assert "\n" not in str(error.value)


def test_a_dry_run_counts_what_is_trained(bases, few, tmp_path, capsys):
    plan = plan_of(bases["sd"], tmp_path / "run", *few, *LORA)
    with torch.device("meta"):
        network = plan.task.build()
    capsys.readouterr()
    dry_run._print_plan(plan, network)
    said = capsys.readouterr().out
    plain = UNet2DConditionModel.from_pretrained(bases["sd"] / "unet")
    linear = [m for name, m in plain.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    adapters = sum(RANK * (m.in_features + m.out_features) for m in linear)
    whole = sum(parameter.numel() for parameter in plain.parameters())
    assert len(linear) == MODULES and f"parameters: {whole + adapters}, of which {adapters} are trained" in said
    assert f"LoRA: rank {RANK}, alpha {ALPHA:.1f}, on to_q, to_k, to_v, to_out.0" in said
    weights = sum(dry_run.tensor_bytes(plan.task, network, plan.config.optimization).values()) - plan.task.frozen_bytes
    assert weights == 4 * whole + 4 * adapters * 5  # weights, gradients, one average and two moments


# ---- what is exported ------------------------------------------------------------------------------------------------


def stock(base):
    pipeline = DiffusionPipeline.from_pretrained(base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline, **options):
    """Two images (2, 3, 8, 8) uint8 of the stock pipeline, with the seeds and options of previews."""
    images = pipeline(
        ["a handwritten one", "a handwritten two"],
        generator=[torch.Generator().manual_seed(k) for k in range(2)],
        height=8, width=8, num_inference_steps=STEPS, guidance_scale=5.0, output_type="pt", **options,
    ).images  # fmt: skip
    return (images * 255).round().to(torch.uint8)


def adapter_drawn(base, folder, name):
    pipeline = stock(base)
    pipeline.load_lora_weights(folder, weight_name=name, local_files_only=True)
    return drawn(pipeline)


@pytest.mark.parametrize("name", ["xl", pytest.param("sd", marks=pytest.mark.nightly)])
def test_a_stock_pipeline_with_the_adapter_draws_the_previews(name, runs, bases, few, tmp_path, monkeypatch):
    """Without a weight_name, too: a run directory has one file of weights beside its folders."""
    assert [path.name for path in runs[name].rglob("*.safetensors") if "checkpoints" not in path.parts] == [LORA_WEIGHTS]
    task = plan_of(bases[name], tmp_path / "run", *few, *LORA).task
    averaged = load_file(runs[name] / "checkpoints" / "step-00000008" / "ema_0.9.safetensors")
    monkeypatch.setattr(text_to_image, "PREVIEW_STEPS", STEPS)
    preview = task.draw(state_dicts.with_weights(task.build(), averaged), range(2), ["a handwritten one", "a handwritten two"])
    monkeypatch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)  # else diffusers 0.38 asks for a weight_name
    for options in ({"weight_name": LORA_WEIGHTS, "local_files_only": True}, {}):
        pipeline = stock(bases[name])
        before = drawn(pipeline)
        pipeline.load_lora_weights(runs[name], **options)
        assert torch.equal(drawn(pipeline), preview) and not torch.equal(before, preview)


def test_a_run_directory_has_the_adapter_and_names_its_base_model(runs, bases):
    top = {path.name for path in runs["xl"].iterdir() if not path.name.startswith(".")}
    assert top == {LORA_WEIGHTS, "base_model.json", "config.json", "README.md", "metrics.jsonl", "checkpoints"}
    record = json.loads((runs["xl"] / "base_model.json").read_text())
    assert record["base_model"] == str(bases["xl"]) and record["pipeline"] == "StableDiffusionXLPipeline"
    assert {"unet/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors", "vae/config.json"} < record["files"].keys()
    for name, digest in record["files"].items():
        assert hashlib.sha256((bases["xl"] / name).read_bytes()).hexdigest() == digest


def test_a_push_has_the_adapter_of_its_checkpoint(runs, tmp_path):
    """The exported file may be newer, where a run was killed."""
    run = shutil.copytree(runs["xl"], tmp_path / "run")
    exported = (run / LORA_WEIGHTS).read_bytes()
    staged = publish.stage(run, 4)
    assert {path.name for path in staged.iterdir()} == {LORA_WEIGHTS, "base_model.json", "config.json", "README.md", "metrics.jsonl"}
    assert (staged / LORA_WEIGHTS).read_bytes() != exported
    with safe_open(publish.stage(run, 8) / LORA_WEIGHTS, "pt") as pushed, safe_open(run / LORA_WEIGHTS, "pt") as here:
        assert pushed.metadata() == here.metadata() and set(pushed.keys()) == set(here.keys())
        assert all(torch.equal(pushed.get_tensor(name), here.get_tensor(name)) for name in here.keys())  # noqa: SIM118
    pushed = publish._contents(run / publish.PENDING / "step-00000008", "user/digits", None)
    assert 'load_lora_weights("user/digits", weight_name' in pushed["README.md"].decode()


def test_the_card_loads_base_model_and_adapter(runs, bases):
    text = (runs["xl"] / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and "lora" in card.data.tags and card.data.base_model is None
    assert "adapters of rank 4 and alpha 8 on `to_q`" in text and "contains parts" not in text
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    namespace = {}
    code = code.replace('"PATH"', repr(str(runs["xl"]))).replace("guidance_scale", "num_inference_steps=2, guidance_scale")
    exec(code, namespace)
    assert namespace["image"].size == (8, 8) and namespace["pipeline"].get_active_adapters() == ["default_0"]
    config, _ = cli.train_command([str(word) for word in text_args(bases["xl"], "run", *LORA)[1:]], None)
    commit = "0123456789" * 4
    on_hub = ModelCard(model_card(update(config, {"base_model": f"user/base@{commit}"}), 12, 0))
    assert (on_hub.data.base_model, on_hub.data.base_model_relation) == (["user/base"], "adapter")
    assert f'from_pretrained("user/base", revision="{commit}")' in on_hub.content


# ---- drawing ---------------------------------------------------------------------------------------------------------


def job_of(model, **changes):
    usual = {"prompt": ("a handwritten one", "a handwritten two"), "scheduler": "euler", "steps": STEPS, "spacing": "leading"}
    return make_job(sample_config(model, "", **{**usual, "num_images": 2, "guidance_scale": 5.0, **changes}), "cpu")


def test_a_lora_is_drawn_with_its_base_model(runs, bases, tmp_path):
    """As stock diffusers draws it; on another base model it is refused, on a copy it is not."""
    expected = stock(bases["xl"])
    expected.load_lora_weights(runs["xl"], weight_name=LORA_WEIGHTS)
    job = job_of(runs["xl"])
    expected.scheduler = job.pipeline.scheduler
    assert torch.equal(job.draw(range(2)), drawn(expected))
    run, copy = shutil.copytree(runs["xl"], tmp_path / "run"), shutil.copytree(bases["xl"], tmp_path / "copy")
    assert job_of(run, base_model=str(copy)).settings == job.settings
    raw = job_of(run, weights="raw")
    trained = load_file(run / "checkpoints" / "step-00000008" / "model.safetensors")
    assert all(torch.equal(raw.pipeline.unet.get_parameter(name), value) for name, value in trained.items())
    (copy / "vae" / "config.json").write_text((copy / "vae" / "config.json").read_text() + "\n")
    with pytest.raises(InputError, match=r"is not the one that .* was trained on: its vae/config.json is another"):
        job_of(run, base_model=str(copy))
    with pytest.raises(InputError, match="is no LoRA"):
        job_of(bases["xl"], base_model=str(copy))
    record = json.loads((run / "base_model.json").read_text())
    (run / "base_model.json").write_text(json.dumps(record | {"base_model": "bases/xl"}))  # of another working directory
    assert job_of(run).settings == job.settings
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="was trained on base_model bases/xl, which is not there; name its base model with --base_model"):
        job_of(run)
    (run / "base_model.json").unlink()
    with pytest.raises(InputError, match="does not say its base model"):
        job_of(run)
    for name, value in (("base_model", 7), ("vae", []), ("files", ["unet/config.json"]), ("scheduler", "ddim"), ("pipeline", None)):
        (run / "base_model.json").write_text(json.dumps(record | {name: value}))
        with pytest.raises(InputError, match=f"base_model.json is damaged: {name} is {re.escape(json.dumps(value))}"):
            job_of(run)
    (run / "base_model.json").unlink()
    assert torch.equal(job_of(run, base_model=str(bases["xl"])).draw(range(2)), job.draw(range(2)))


def test_a_lora_is_drawn_with_its_own_scheduler_vae_and_null_caption(bases, few, tmp_path):
    vae = make_base(tmp_path / "vae", seed=1)
    flags = ("--prediction_type", "v_prediction", "--vae", vae, "--null_caption", "empty")
    task = plan_of(bases["xl"], tmp_path / "run", *few, *LORA, *flags).task
    task.export(task.build(), tmp_path / "run")
    pipeline = load_text_model(str(tmp_path / "run"))
    assert pipeline.scheduler.config.prediction_type == "v_prediction" and not pipeline.config.force_zeros_for_empty_prompt
    expected = load_file(vae / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in pipeline.vae.state_dict().items())
    assert "Its scheduler is not that of the base model" in task.model_card(task.config, 1, None)


def test_several_loras_are_added_with_their_strengths(runs, bases, tmp_path):
    shutil.copy(runs["xl"] / LORA_WEIGHTS, tmp_path / "mine.safetensors")
    loras = (f"{runs['xl']}:0.5", f"{tmp_path / 'mine.safetensors'}:-0.25")
    job = job_of(bases["xl"], lora=loras)
    expected = stock(bases["xl"])
    expected.load_lora_weights(runs["xl"], weight_name=LORA_WEIGHTS, adapter_name="one")
    expected.load_lora_weights(tmp_path, weight_name="mine.safetensors", adapter_name="two")
    expected.set_adapters(["one", "two"], [0.5, -0.25])
    expected.scheduler = job.pipeline.scheduler
    assert torch.equal(job.draw(range(2)), drawn(expected))
    assert job.settings["lora"] == ["xl:0.5", "mine.safetensors:-0.25"] and "lora-xl-0.5,mine.safetensors-0.25" in job.name
    less = job_of(runs["xl"], lora=(f"{runs['xl']}:-0.5",))  # than one
    assert torch.equal(less.draw(range(2)), job_of(bases["xl"], lora=loras[:1]).draw(range(2)))
    config = sample_config(bases["xl"], tmp_path / "drawn", prompt=("a digit",), steps=2, num_images=1, lora=(f"{runs['xl']}:0.5",))
    row = json.loads((sample(config) / "metadata.jsonl").read_text())
    assert row["lora"] == "xl:0.5" and row["text"] == "a digit"
    with pytest.raises(InputError, match=r"trained on another one|cannot be loaded"):
        job_of(bases["sd"], lora=(str(runs["xl"]),))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lora", "missing"], "lora missing does not exist"),
        (["--lora", "{base}"], "is no LoRA: it has no pytorch_lora_weights.safetensors"),
        (["--lora", "{run}:nan"], "must have a finite one"),
        (["--base_model", "missing"], "is no LoRA"),
    ],
)
def test_what_cannot_be_drawn_with_is_one_sentence(runs, bases, flags, said, tmp_path, capsys):
    words = [flag.format(base=bases["xl"], run=runs["xl"]) for flag in flags]
    assert cli.sample([str(bases["xl"]), "--prompt", "x", "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err


def test_a_lora_of_a_base_model_in_fp16_alone_is_drawn_with(bases, few, tmp_path):
    """Its weights are compared with those it was trained on, whichever file has them."""
    base = in_fp16_alone(bases["xl"], tmp_path / "base")
    code, _, err = run(*text_args(base, tmp_path / "run", *few, *LORA, "--max_steps", 1))
    assert code == 0, err
    assert job_of(tmp_path / "run").pipeline.unet.peft_config
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    with pytest.raises(InputError, match=r"it has no unet/diffusion_pytorch_model\.safetensors"):
        job_of(tmp_path / "run", base_model=str(base))


@pytest.mark.nightly
def test_a_lora_is_scored(runs, tmp_path, capsys):
    flags = [
        "--metrics",
        "prompt_accuracy",
        "--num_images",
        "4",
        "--steps",
        "2",
        "--allow_few_images",
        "--output",
        str(tmp_path / "s.json"),
    ]
    assert cli.evaluate(["score", str(runs["xl"]), "--reference", "digits", *flags]) == 0
    assert json.loads((tmp_path / "s.json").read_text())["targets"][0]["images"] == 4


UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("alice/base")
api.upload_folder(repo_id="alice/base", folder_path=sys.argv[1])
"""
STOCK = """
import sys
from debias_diffusers.utils import text_libraries
text_libraries.show()
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("alice/base")
pipeline.load_lora_weights("alice/mine")
print(pipeline.get_active_adapters())
"""


@pytest.mark.nightly
def test_a_lora_goes_to_the_hub_and_is_drawn_from_there(bases, few, tmp_path):
    """Trained on a base model of the Hub, of which its commit is recorded; another model on this disk with the same files will do, too."""
    with served(tmp_path / "served", xet=False) as (_, worker):
        worker.script(UPLOAD, bases["xl"])
        words = [
            *few,
            *LORA,
            "--ema_decay",
            0.9,
            0.5,
            "--no_ema_warmup",
            "--learning_rate",
            0.01,
            "--max_steps",
            4,
            "--push_to_hub",
            "--hub_model_id",
            "alice/mine",
        ]
        code, said = worker.run("train", *text_args("alice/base", tmp_path / "run", *words)[1:])
        assert code == 0, said
        record = json.loads((tmp_path / "run" / "base_model.json").read_text())
        assert re.fullmatch(r"alice/base@[0-9a-f]{40}", record["base_model"])
        card = ModelCard((tmp_path / "run" / "README.md").read_text())
        assert (card.data.base_model, card.data.base_model_relation) == (["alice/base"], "adapter")
        flags = ["--prompt", "a digit", "--steps", 2, "--num_images", 2, "--num_threads", 1]
        drawn = {}
        for name, model, more in (
            ("hub", "alice/mine", []),
            ("here", tmp_path / "run", []),
            ("base", "alice/mine", ["--base_model", bases["xl"]]),
            ("variant", "alice/mine", ["--weights", 0.5]),
            ("lora", "alice/base", ["--lora", "alice/mine"]),
        ):
            code, said = worker.run("sample", model, *flags, *more, "--output_dir", tmp_path / name)
            assert code == 0, said
            drawn[name] = [(tmp_path / name / f"{k:06d}.png").read_bytes() for k in range(2)]
        assert drawn["hub"] == drawn["here"] == drawn["base"] == drawn["lora"] != drawn["variant"]
        rows = (tmp_path / "lora" / "metadata.jsonl").read_text()
        assert re.search(r'"lora": "alice/mine@[0-9a-f]{40}:1.0"', rows)
        code, said = worker.run("sample", "alice/mine", *flags, "--base_model", bases["sd"], "--output_dir", tmp_path / "no")
        assert code == 2 and "is not the one that" in said
        assert "default_0" in worker.script(STOCK)


# ---- starting from a LoRA --------------------------------------------------------------------------------------------


def test_a_lora_starts_from_another(runs, bases, few, tmp_path):
    task = plan_of(bases["xl"], tmp_path / "run", *few, *LORA, "--init", runs["xl"]).task
    network, config = task.build(), task.config.lora
    task.load(network, str(runs["xl"]))
    averaged = load_file(runs["xl"] / "checkpoints" / "step-00000008" / "ema_0.9.safetensors")
    assert all(torch.equal(parameter, averaged[name]) for name, parameter in trained_parameters(network).items())
    for changes, model, said in (
        ({"lora_rank": 8}, "xl", "has rank 4, but lora_rank is 8; take --lora_rank 4"),
        ({"lora_alpha": 2.0}, "xl", "has alpha 8, but lora_alpha is 2; take --lora_alpha 8"),
        ({}, "sd", "trained on another base model"),
    ):
        with pytest.raises(InputError, match=said):
            lora.load(network, str(runs[model]), dataclasses.replace(config, **changes))
    tensors, about = read_lora(runs["xl"] / LORA_WEIGHTS, "")
    for changes, said in (
        ({"unet.alpha_pattern": {"attn1.to_q": 2}}, "has modules of alpha 2 to 8, but lora_alpha is 8 for all"),
        ({"unet.use_rslora": True}, "has alpha 16, but lora_alpha is 8; take --lora_alpha 16"),
    ):
        save_file(tensors, tmp_path / "other.safetensors", {"lora_adapter_metadata": json.dumps({**about, **changes})})
        with pytest.raises(InputError, match=said):
            lora.load(network, str(tmp_path / "other.safetensors"), config)
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(bases["xl"] / "unet")
        lora.add_adapters({"unet": other}, dataclasses.replace(config, lora_targets=("to_q",)))
    with pytest.raises(InputError, match=r"adapters of other modules than this run.*--lora_targets to_k to_out.0 to_q to_v"):
        lora.load(other, str(runs["xl"]), config)
    each = [name.removeprefix("unet.").removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name]
    save_file(tensors, tmp_path / "converted.safetensors", {"lora_adapter_metadata": json.dumps({**about, "unet.target_modules": each})})
    with pytest.raises(InputError, match=r"take --lora_targets to_k to_out.0 to_q to_v$"):
        lora.load(other, str(tmp_path / "converted.safetensors"), config)
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    more = {f"{text}.lora_A.weight": torch.zeros(4, 8), f"{text}.lora_B.weight": torch.zeros(8, 4)}
    save_file({**tensors, **more}, tmp_path / "text.safetensors", {"lora_adapter_metadata": json.dumps(about)})
    with pytest.raises(InputError, match=rf"such as {text}; add --lora_text_encoders"):
        lora.load(network, str(tmp_path / "text.safetensors"), config)


@pytest.mark.nightly
def test_a_lora_continues_another(runs, bases, few, tmp_path):
    folder = trained(bases["xl"], tmp_path / "run", *few, *LORA, "--init", runs["xl"], "--max_steps", 1, "--learning_rate", 1e-12)
    before, after = (load_file(run / LORA_WEIGHTS) for run in (runs["xl"], folder))
    assert all(torch.allclose(value, before[name], atol=1e-6) for name, value in after.items()) and after.keys() == before.keys()
    assert json.loads((folder / "config.json").read_text())["init"] == str(runs["xl"])
    trained(bases["xl"], folder, *few, *LORA, "--init", runs["xl"], "--max_steps", 2, "--learning_rate", 1e-12)
    assert newest_step(folder) == 2


# ---- text encoders ---------------------------------------------------------------------------------------------------

ENCODERS = (*LORA, "--lora_text_encoders", "--lora_targets", "to_q", "to_v", "fc1", "--caption_dropout", 0.4)


@pytest.fixture(scope="module")
def with_encoders(bases, few, tmp_path_factory):
    """A training of a LoRA with adapters on the text encoders, too, of 4 steps, made once for each base model."""
    folder = tmp_path_factory.mktemp("encoders")
    return cache(lambda name: trained(bases[name], folder / name, *few, *ENCODERS, "--max_steps", 4, "--checkpoint_every", 2))


@pytest.mark.parametrize(
    "name, flags",
    [
        ("xl", ()),
        pytest.param("xl", ("--null_caption", "empty"), marks=pytest.mark.nightly),
        pytest.param("sd", ("--caption_chunks", 2), marks=pytest.mark.nightly),
    ],
)
def test_text_encoders_with_new_adapters_give_the_usual_embeddings(name, flags, bases, few, tmp_path):
    """And every adapter has a gradient, whatever captions are dropped; else processes would wait for each other."""
    task = plan_of(bases[name], tmp_path / "run", *few, *ENCODERS, *flags).task
    network, captions = task.build(), ["a handwritten one", "the digit two"]
    for dropped in ([False, True], [True, True]):
        found, expected = task._embeddings(network, captions, dropped), task.texts.of(captions, dropped, "cpu")
        assert torch.allclose(found.text, expected.text, atol=1e-6)
        assert (found.pooled is None) == (name == "sd") and (name == "sd" or torch.allclose(found.pooled, expected.pooled, atol=1e-6))
    batch = {**task.dummy_batch(2), "dropped": torch.tensor([True, True])}
    task.conditioned(network, batch, "cpu")(torch.randn(2, 4, 4, 4), torch.tensor([10, 900])).square().mean().backward()
    assert all(parameter.grad is not None for parameter in trained_parameters(network).values())


def test_adapters_of_text_encoders_are_exported_and_converted(bases, few, tmp_path, monkeypatch):
    """Random ones; stock diffusers draws the previews with either file."""
    task = plan_of(bases["xl"], tmp_path / "run", *few, *ENCODERS).task
    network, generator = task.build().eval(), torch.Generator().manual_seed(0)
    for parameter in trained_parameters(network).values():
        parameter.data.normal_(std=0.1, generator=generator)
    task.export(network, tmp_path / "run")
    exported = load_file(tmp_path / "run" / LORA_WEIGHTS)
    assert {key.split(".")[0] for key in exported} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(".text_model.encoder." in key for key in exported if key.startswith("text_encoder"))  # as transformers 4 needs it
    monkeypatch.setattr(text_to_image, "PREVIEW_STEPS", STEPS)
    preview = task.draw(network, range(2), ["a handwritten one", "a handwritten two"])
    assert torch.equal(adapter_drawn(bases["xl"], tmp_path / "run", LORA_WEIGHTS), preview)
    only_unet = stock(bases["xl"])
    only_unet.load_lora_weights({key: value for key, value in exported.items() if key.startswith("unet.")})
    assert not torch.equal(drawn(only_unet), preview)
    assert cli.convert(["lora", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    names = {key.split(".")[0] for key in load_file(tmp_path / "out.safetensors")}
    assert {f"lora_te{k}_text_model_encoder_layers_1_{end}" for k in (1, 2) for end in ("self_attn_q_proj", "mlp_fc1")} < names
    assert torch.equal(adapter_drawn(bases["xl"], tmp_path, "out.safetensors"), preview)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["xl", "sd"])
def test_adapters_of_text_encoders_are_trained_and_drawn_with(name, with_encoders, bases, few, tmp_path, monkeypatch):
    run = with_encoders(name)
    exported = load_file(run / LORA_WEIGHTS)
    kinds = {key.split(".")[0] for key, value in exported.items() if ".lora_B." in key and value.abs().max() > 0}
    assert kinds == ({"unet", "text_encoder", "text_encoder_2"} if name == "xl" else {"unet", "text_encoder"})
    task = plan_of(bases[name], tmp_path / "run", *few, *ENCODERS).task
    averaged = load_file(run / "checkpoints" / "step-00000004" / "ema_0.9.safetensors")
    monkeypatch.setattr(text_to_image, "PREVIEW_STEPS", STEPS)
    preview = task.draw(state_dicts.with_weights(task.build(), averaged), range(2), ["a handwritten one", "a handwritten two"])
    assert torch.equal(preview, adapter_drawn(bases[name], run, LORA_WEIGHTS))
    assert job_of(run).settings["model_sha256"] == job_of(run, weights="0.9").settings["model_sha256"]
    with safe_open(publish.stage(run, 4) / LORA_WEIGHTS, "pt") as pushed:
        assert {key: pushed.get_tensor(key).sum() for key in pushed.keys()} == {key: value.sum() for key, value in exported.items()}  # noqa: SIM118
    assert cli.convert(["lora", str(run), str(tmp_path / "out.safetensors")]) == 0
    assert any(key.startswith("lora_te1_" if name == "xl" else "lora_te_") for key in load_file(tmp_path / "out.safetensors"))
    assert torch.equal(adapter_drawn(bases[name], tmp_path, "out.safetensors"), preview)
    on_meta, flops = dry_run.on_meta(task)
    assert [value.shape for value in on_meta.parameters()] == [value.shape for value in task.build().parameters()] and flops > 1e6


@pytest.mark.nightly
def test_a_run_with_text_encoders_resumes_with_the_same_bits(with_encoders, bases, few, tmp_path):
    folder = shutil.copytree(with_encoders("xl"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    trained(bases["xl"], folder, *few, *ENCODERS, "--max_steps", 4, "--checkpoint_every", 2)
    assert tensors(folder, 4) == tensors(with_encoders("xl"), 4)
    continued = trained(bases["xl"], tmp_path / "next", *few, *ENCODERS, "--init", folder, "--max_steps", 1, "--learning_rate", 1e-12)
    before, after = (load_file(run / LORA_WEIGHTS) for run in (folder, continued))
    assert before.keys() == after.keys() and all(torch.allclose(value, before[name], atol=1e-6) for name, value in after.items())


@pytest.mark.nightly
def test_two_processes_train_text_encoders_the_same(with_encoders, bases, few, tmp_path):
    """Captions may all be dropped in one process and none in the other."""
    code, err = as_ranks(2, *text_args(bases["xl"], tmp_path / "run", *few, *ENCODERS, "--micro_batch_size", 1, "--max_steps", 4))
    assert code == 0, err
    losses = [[line["loss"] for line in metrics(folder)] for folder in (with_encoders("xl"), tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# ---- kohya's names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xl", "sd"])
def test_a_stock_pipeline_draws_the_same_with_kohyas_names(name, runs, bases, tmp_path):
    assert cli.convert(["lora", str(runs[name]), str(tmp_path / "out.safetensors"), "--format", "kohya"]) == 0
    found = load_file(tmp_path / "out.safetensors")
    assert len(found) == 3 * MODULES and {value.item() for key, value in found.items() if key.endswith(".alpha")} == {ALPHA}
    down = "input_blocks_3_1" if name == "xl" else "down_blocks_1_attentions_0"
    assert found[f"lora_unet_{down}_transformer_blocks_0_attn1_to_out_0.lora_down.weight"].shape == (RANK, 16)
    expected = adapter_drawn(bases[name], runs[name], LORA_WEIGHTS)
    assert torch.equal(adapter_drawn(bases[name], tmp_path, "out.safetensors"), expected)
    tensors, about = kohya.to_diffusers(found, layers=1)
    exported, before = read_lora(runs[name] / LORA_WEIGHTS, "run")
    assert tensors.keys() == exported.keys() and all(torch.equal(value, exported[key]) for key, value in tensors.items())
    assert (about["unet.r"], about["unet.lora_alpha"]) == (before["unet.r"], before["unet.lora_alpha"]) == (RANK, ALPHA)
    assert before["unet.rank_pattern"] == before["unet.alpha_pattern"] == {}  # diffusers 0.38 loads no header without them


def test_ranks_and_alphas_of_each_module_come_back_from_kohyas_names(bases, tmp_path):
    """Against the formula W + alpha / rank B A, with the weights of convolutions as matrices; without an alpha it is the rank."""
    modules = {
        "unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 2, 1.0),
        "unet_mid_block_attentions_0_proj_in": ("mid_block.attentions.0.proj_in", 4, None),
        "unet_up_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj": (
            "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
            4,
            8.0,
        ),
        "unet_down_blocks_0_resnets_0_conv1": ("down_blocks.0.resnets.0.conv1", 2, 4.0),
        "te_text_model_encoder_layers_0_self_attn_q_proj": ("encoder.layers.0.self_attn.q_proj", 4, 2.0),
        "te_text_model_encoder_layers_1_mlp_fc1": ("encoder.layers.1.mlp.fc1", 2, 8.0),
    }
    generator, made, expected = torch.Generator().manual_seed(0), {}, stock(bases["sd"])
    plain = drawn(expected)
    for name, (module, rank, alpha) in modules.items():
        part = expected.unet if name.startswith("unet") else getattr(expected.text_encoder, "text_model", expected.text_encoder)
        weight = part.get_submodule(module).weight
        down = 0.2 * torch.randn(rank, *weight.shape[1:], generator=generator)
        up = 0.2 * torch.randn(len(weight), rank, *(1 for _ in weight.shape[2:]), generator=generator)
        made |= {f"lora_{name}.lora_down.weight": down, f"lora_{name}.lora_up.weight": up}
        if alpha is not None:
            made[f"lora_{name}.alpha"] = torch.tensor(alpha)
        weight.data += (rank if alpha is None else alpha) / rank * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    save_file(made, tmp_path / "made.safetensors")
    assert cli.convert(["lora", str(tmp_path / "made.safetensors"), str(tmp_path / "out"), "--format", "diffusers"]) == 0
    images = adapter_drawn(bases["sd"], tmp_path / "out", LORA_WEIGHTS).int()
    assert (images - drawn(expected).int()).abs().max() <= 1 and (images - plain.int()).abs().max() > 20
    back = kohya.to_kohya(*read_lora(tmp_path / "out" / LORA_WEIGHTS, "out"), xl=False)
    made |= {f"lora_{name}.alpha": torch.tensor(float(rank)) for name, (_, rank, alpha) in modules.items() if alpha is None}
    assert back.keys() == made.keys() and all(torch.equal(back[key], value) for key, value in made.items())


@pytest.mark.parametrize(
    "name, original",
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.time_emb_proj", "input_blocks.4.0.emb_layers.1"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("add_embedding.linear_2", "label_emb.0.2"),
        ("conv_out", "out.2"),
    ],
)
def test_names_of_the_original_unet(name, original):
    assert kohya.original_name(name) == kohya.original_name(name, [2, 2, 2]) == original
    with pytest.raises(InputError, match="one number for all"):
        kohya.original_name(name, [2, 2, 1])
    assert kohya.diffusers_name(f"lora_unet_{original.replace('.', '_')}") == ("unet", name)


@pytest.mark.parametrize(
    "stem",
    [
        "lora_unet_double_blocks_0_img_attn_proj",  # of Flux
        "lora_unet_joint_blocks_0_x_block_attn_qkv",  # of Stable Diffusion 3
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",  # of 1.x in the names of the original code, and no module of XL
        "lora_te_model_transformer_resblocks_0_mlp_c_fc",  # of OpenCLIP
    ],
)
def test_modules_of_other_networks_are_not_converted(stem):
    tensors = {f"{stem}.lora_down.weight": torch.ones(1, 2), f"{stem}.lora_up.weight": torch.ones(2, 1)}
    with pytest.raises(InputError, match="is no module of Stable Diffusion"):
        kohya.to_diffusers(tensors)


@pytest.mark.parametrize(
    "module", ["unet.base_model.model.mid_block.attentions.0.proj_in", "text_encoder.base_model.model.text_projection"]
)
def test_names_with_the_prefix_of_peft_are_not_converted(module):
    with pytest.raises(InputError, match="of no module of Stable Diffusion"):
        kohya.to_kohya({f"{module}.lora_A.weight": torch.ones(1, 2), f"{module}.lora_B.weight": torch.ones(2, 1)}, {}, xl=False)


@pytest.mark.parametrize(
    "words, said",
    [
        (["{run}", "{out}/x.pt", "--format", "kohya"], "ends in .safetensors"),
        (["{run}/base_model.json", "{out}/x.safetensors", "--format", "kohya"], "must be a .safetensors file"),
        (["{run}", "{out}/new", "--format", "diffusers"], "no name of kohya's networks.lora"),
        (["{run}", "{run}", "--format", "diffusers"], "name a new or empty folder"),
    ],
)
def test_what_cannot_be_converted_is_one_sentence(runs, words, said, tmp_path, capsys):
    assert cli.convert(["lora", *(word.format(run=runs["xl"], out=tmp_path) for word in words)]) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def damaged(tensors, header, kind):
    """The tensors of a LoRA, and what its header says, with one fault."""
    first = next(name for name in tensors if "lora_A" in name)
    up = first.replace("lora_A", "lora_B")
    return {
        "header": (tensors, "[1]"),
        "alpha": (tensors, json.dumps(json.loads(header) | {"unet.lora_alpha": None})),
        "half": ({name: tensor for name, tensor in tensors.items() if name != up}, header),
        "ranks": (tensors | {up: tensors[up][:, :1].contiguous()}, header),
        "not finite": (tensors | {up: tensors[up] / 0}, header),
        "empty": ({}, header),
    }[kind]


@pytest.mark.parametrize(
    "kind, said",
    [
        ("header", "cannot be loaded"),
        ("alpha", "has unet.lora_alpha None, which must be a number above 0"),
        ("half", "lora_B.weight"),
        ("ranks", "have other ranks"),
        ("not finite", "has weights that are not finite"),
        ("empty", "has no adapters"),
    ],
)
def test_a_damaged_lora_is_one_sentence_wherever_it_is_read(runs, bases, few, kind, said, tmp_path, capsys):
    with safe_open(runs["xl"] / LORA_WEIGHTS, "pt") as file:
        tensors, header = damaged(load_file(runs["xl"] / LORA_WEIGHTS), file.metadata()["lora_adapter_metadata"], kind)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": header})
    assert cli.convert(["lora", str(path), str(tmp_path / "out.safetensors"), "--format", "kohya"]) == 2
    assert cli.sample([str(bases["xl"]), "--prompt", "x", "--output_dir", str(tmp_path / "out"), "--lora", str(path)]) == 2
    with pytest.raises(InputError, match=said):
        lora.load(plan_of(bases["xl"], tmp_path / "run", *few, *LORA).task.build(), str(path), LoraConfig(lora_rank=RANK, lora_alpha=ALPHA))
    found = capsys.readouterr().err
    assert [said in line for line in found.splitlines() if line.startswith("error")] == [True, True], found


def test_the_names_of_kohya_are_converted_only_where_they_are_whole(runs, tmp_path, capsys):
    assert cli.convert(["lora", str(runs["xl"]), str(tmp_path / "k.safetensors"), "--format", "kohya"]) == 0
    tensors = load_file(tmp_path / "k.safetensors")
    save_file(
        {name: value.expand(3).clone() if name.endswith("alpha") else value for name, value in tensors.items()}, tmp_path / "a.safetensors"
    )
    for words, said in (
        ("a.safetensors out diffusers", "alpha is one"),
        ("k.safetensors again.safetensors kohya", "names of kohya's scripts already"),
    ):
        source, out, form = words.split()
        assert cli.convert(["lora", str(tmp_path / source), str(tmp_path / out), "--format", form]) == 2
        assert said in capsys.readouterr().err


# ---- Stable Diffusion at its full size -------------------------------------------------------------------------------

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LINEAR = (
    *LoraConfig().lora_targets,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
)  # as sd-scripts

# Names of sd-scripts: the transformers of the UNets with their numbers of blocks, and the layers of the text encoders.
XL_TRANSFORMERS = {
    **dict.fromkeys(("input_blocks_4_1", "input_blocks_5_1", "output_blocks_3_1", "output_blocks_4_1", "output_blocks_5_1"), 2),
    **dict.fromkeys(("input_blocks_7_1", "input_blocks_8_1", "middle_block_1"), 10),
    **dict.fromkeys(("output_blocks_0_1", "output_blocks_1_1", "output_blocks_2_1"), 10),
}
SD_TRANSFORMERS = dict.fromkeys(
    ["mid_block_attentions_0"]
    + [f"down_blocks_{k}_attentions_{j}" for k in range(3) for j in range(2)]
    + [f"up_blocks_{k}_attentions_{j}" for k in range(1, 4) for j in range(3)],
    1,
)


def unet_names(transformers):
    attention = [f"{attn}_{kind}" for attn in ("attn1", "attn2") for kind in ("to_q", "to_k", "to_v", "to_out_0")]
    inner = [*attention, "ff_net_0_proj", "ff_net_2"]
    for name, blocks in transformers.items():
        yield from (f"lora_unet_{name}_{end}" for end in ("proj_in", "proj_out"))
        yield from (f"lora_unet_{name}_transformer_blocks_{k}_{end}" for k in range(blocks) for end in inner)


def text_names(prefix, layers):
    ends = [f"self_attn_{kind}_proj" for kind in ("q", "k", "v", "out")] + ["mlp_fc1", "mlp_fc2"]
    return [f"{prefix}_text_model_encoder_layers_{k}_{end}" for k in range(layers) for end in ends]


def adapters(part, network, targets):
    """Adapters of rank 16 on the linear layers of a network, by the names of a file, without memory."""
    found = {}
    for name, module in network.named_modules():
        if name.endswith(tuple(f".{target}" for target in targets)):
            found[f"{part}.{name}.lora_A.weight"] = torch.empty(16, module.in_features, device="meta")
            found[f"{part}.{name}.lora_B.weight"] = torch.empty(module.out_features, 16, device="meta")
    return found


def test_adapters_of_the_full_models_have_the_names_of_sd_scripts():
    import sdxl
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    configs = {name: CLIPTextConfig(**sdxl.PARTS[name]) for name in ("text_encoder", "text_encoder_2")}
    small = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 768, "use_linear_projection": True}
    with torch.device("meta"):
        xl, sd = UNet2DConditionModel.from_config(sdxl.PARTS["unet"]), UNet2DConditionModel(**small)  # widths are no part of names
        first, second = CLIPTextModel(configs["text_encoder"]), CLIPTextModelWithProjection(configs["text_encoder_2"])
    texts = adapters("text_encoder", first, TEXT), adapters("text_encoder_2", second, TEXT)
    for targets, modules, parameters in ((LINEAR, 722, 42_557_440), (LoraConfig().lora_targets, 560, 23_224_320)):
        found = adapters("unet", xl, targets)
        assert (len(found), sum(value.numel() for value in found.values())) == (2 * modules, parameters)
    about = {f"{part}.lora_alpha": 8.0 for part in ("unet", "text_encoder", "text_encoder_2")}
    theirs = kohya.to_kohya({**adapters("unet", xl, LINEAR), **texts[0], **texts[1]}, about, xl=True)
    names = [*unet_names(XL_TRANSFORMERS), *text_names("lora_te1", 12), *text_names("lora_te2", 32)]
    assert len(names) == 722 + 72 + 192
    assert sorted(theirs) == sorted(f"{name}.{end}" for name in names for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert {value.item() for name, value in theirs.items() if name.endswith("alpha")} == {8.0}
    theirs = kohya.to_kohya({**adapters("unet", sd, LINEAR), **texts[0]}, about, xl=False)
    names = [*unet_names(SD_TRANSFORMERS), *text_names("lora_te", 12)]
    assert len(names) == 192 + 72 and {name.split(".")[0] for name in theirs} == set(names)
    for name in (*unet_names(XL_TRANSFORMERS), *names):
        part, module = kohya.diffusers_name(name)
        network = {"text_encoder": first}.get(part, sd if name in names else xl)
        network.get_submodule(module if part == "unet" or hasattr(first, "text_model") else module.removeprefix("text_model."))


@pytest.mark.nightly
def test_peft_adds_as_many_adapters_to_the_full_model():
    import sdxl

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sdxl.PARTS["unet"])
        lora.add_adapters({"unet": unet}, LoraConfig(lora_rank=16, lora_targets=LINEAR))
    found = [parameter.numel() for parameter in unet.parameters() if parameter.requires_grad]
    assert (len(found), sum(found)) == (2 * 722, 42_557_440)


def write_full_size(folder):
    """The UNet of Stable Diffusion XL at its full size with random bf16 weights (5.1 GB), a small VAE, and text encoders of one layer."""
    import sdxl
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sdxl.write(folder, BASE / "tokenizer")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sdxl.PARTS["unet"])
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in unet.state_dict().items():
        is_norm = weight.ndim == 1 and name.endswith("weight")
        filled = torch.full(weight.shape, float(is_norm), dtype=torch.bfloat16)
        weights[name] = filled.normal_(0, 0.02, generator=generator) if weight.ndim > 1 else filled
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    small = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
    AutoencoderKL.from_config(sdxl.PARTS["vae"] | small).save_pretrained(folder / "vae")
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        own = {"num_hidden_layers": 1, "bos_token_id": 563, "eos_token_id": 564}
        kind(CLIPTextConfig(**sdxl.PARTS[name] | own)).save_pretrained(folder / name)
    return folder


@pytest.mark.nightly
def test_one_step_at_full_size_in_bf16(tmp_path):
    """At 256 pixels; takes 16 GB of memory, 7 GB of disk, and a quarter of an hour where a CPU is slow in bf16."""
    if psutil.virtual_memory().available < 17e9:
        pytest.skip("needs 17 GB of memory")
    base = write_full_size(tmp_path / "base")
    data = pictures(tmp_path / "data", sizes=((256, 300),))
    (data / "0.txt").write_text("a handwritten seven")
    flags = ("--dataset", data, "--resolution", 256, "--batch_size", 1, "--max_steps", 1, "--lora_rank", 16, "--ema_decay", 0)
    args = text_args(base, tmp_path / "run", *flags, "--mixed_precision", "bf16", "--param_dtype", "bf16")
    code, _, err = Forked(*args).result(timeout=3600)
    assert code == 0, err
    adapters = load_file(tmp_path / "run" / LORA_WEIGHTS)
    assert len(adapters) == 2 * 560 and sum(value.numel() for value in adapters.values()) == 23_224_320
    assert all(value.isfinite().all() and value.any() for value in adapters.values())  # B was 0 before the step
    assert 0 < metrics(tmp_path / "run")[0]["loss"] < 100
