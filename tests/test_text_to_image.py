"""Training text-to-image models: against plain loops of diffusers' own pieces, resumes, what is exported, and errors."""

import io
import json
import shutil
import sys
import weakref

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from conftest import HANG, Forked, command, metrics, newest_step, run, tensors, train_args, wait_for
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from text_models import BASE, in_fp16_alone, make_base, text_args

from debias_diffusers import cli
from debias_diffusers.config.loading import resolved
from debias_diffusers.diffusion.noise_schedule import schedule_of_scheduler
from debias_diffusers.errors import InputError
from debias_diffusers.training.setup.plan import prepare
from debias_diffusers.utils import seeding

PIPELINES = {"StableDiffusionXLPipeline": StableDiffusionXLPipeline, "StableDiffusionPipeline": StableDiffusionPipeline}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {
        "xl": make_base(folder / "xl"),
        "xl, v, zero snr": make_base(folder / "xl-v", prediction_type="v_prediction", rescale_betas_zero_snr=True),
        "sd": make_base(folder / "sd", xl=False),
    }


def plan_of(*args):
    """A training of `text_args`, before the network is built."""
    return plan_of_flags(*text_args(*args)[1:])


def plan_of_flags(*flags):
    config, chosen = cli.train_command([str(flag) for flag in flags], None)
    return prepare(resolved(config, None), None, Accelerator(), chosen)


def batch_of(data, positions):
    from debias_diffusers.data.dataset import load_batch

    return load_batch(data, positions)


def stock(base):
    """The stock pipeline of a base model."""
    kind = PIPELINES[json.loads((base / "model_index.json").read_text())["_class_name"]]
    pipeline = kind.from_pretrained(base, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---- loss ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xl", "xl, v, zero snr", "sd"])
def test_loss_and_gradient_are_those_of_a_plain_loop(bases, name, tmp_path):
    """Written with diffusers' own pieces: pictures through the VAE, noise by DDPMScheduler, conditions by the stock pipeline."""
    base, positions = bases[name], range(4)
    data = captioned(tmp_path / "data", sizes=((8, 8),) * 12)
    plan = plan_of(base, tmp_path / "run", "--dataset", data, "--random_flip", "--caption_dropout", "0.3")
    task, data = plan.task, plan.task.data
    task.prepare()
    network = task.build()
    batch = batch_of(data, positions)
    t = torch.tensor([100, 400, 700, 950])
    terms = plan.objective(task.conditioned(network, batch, "cpu"), task.x_0(batch, "cpu"), batch["noise"], t)
    terms.loss.mean().backward()

    pipeline, scheduler = stock(base), DDPMScheduler.from_pretrained(base, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(base / "vae")
    losses = []
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    for k, position in enumerate(positions):
        content, _, _ = data.source.read(data.index(position))
        image = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        if data.flips(position):
            image = image[:, ::-1].copy()
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        eps = torch.randn(posterior.mean.shape[1:], generator=seeding.generator(0, "posterior", position))
        x_0 = (posterior.mean + posterior.std * eps) * vae.config.scaling_factor
        noise = torch.randn(x_0.shape[1:], generator=seeding.generator(0, "noise", position))[None]
        prompt = None if batch["dropped"][k] else batch["caption"][k]
        x_t = scheduler.add_noise(x_0, noise, t[k : k + 1])
        prediction = unet(x_t, t[k], **conditions(pipeline, prompt)).sample
        acp = scheduler.alphas_cumprod[t[k]].double()
        snr = acp / (1 - acp)
        if scheduler.config.prediction_type == "epsilon":
            target, weight = noise, snr**-0.5
        else:
            target, weight = scheduler.get_velocity(x_0, noise, t[k : k + 1]), snr**0.5 / (snr + 1)
        losses.append(weight.float() * (prediction - target).square().mean())
    assert batch["dropped"].any() and not batch["dropped"].all()
    assert terms.loss.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    torch.stack(losses).mean().backward()
    expected = dict(unet.named_parameters())
    for parameter, value in network.named_parameters():
        assert torch.allclose(value.grad, expected[parameter].grad, rtol=1e-3, atol=1e-6), parameter


def conditions(pipeline, prompt):
    """Arguments of the UNet as the stock pipeline makes them for a prompt; None is no prompt, as where no negative prompt is given."""
    with torch.no_grad():
        found = pipeline.encode_prompt(
            prompt or "x", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=prompt is None, negative_prompt=None
        )
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        return {"encoder_hidden_states": found[1] if prompt is None else found[0]}
    text, negative, pooled, negative_pooled = found
    time_ids = pipeline._get_add_time_ids((8, 8), (0, 0), (8, 8), torch.float32, 32)
    added = {"text_embeds": negative_pooled if prompt is None else pooled, "time_ids": time_ids}
    return {"encoder_hidden_states": negative if prompt is None else text, "added_cond_kwargs": added}


@pytest.mark.parametrize("predicted", ["epsilon", "v_prediction"])
def test_weights_on_the_schedule_of_sdxl_are_those_of_the_formula(bases, predicted, tmp_path):
    """The table of closed forms: SNR 585.9, 8.454, .3819 and .00468 at t = 1, 100, 500 and 999 of 1000."""
    plan = plan_of(bases["xl"], tmp_path / "run", "--prediction_type", predicted)
    objective = plan.objective
    snr = {1: 585.9, 100: 8.454, 500: 0.3819, 999: 0.00468}
    for t, value in snr.items():
        assert objective.schedule.snr[t].item() == pytest.approx(value, rel=1e-3)
        expected = value**-0.5 if predicted == "epsilon" else value**0.5 / (value + 1)
        assert objective.weights[t].item() == pytest.approx(expected, rel=1e-3)


def test_noising_is_float32_whatever_the_precision(bases, tmp_path):
    """In bfloat16 SDXL's schedule would add no noise at its first timesteps; sizes above 256 would be rounded."""
    plan = plan_of(bases["xl"], tmp_path / "run", "--mixed_precision", "bf16")
    batch = batch_of(plan.task.data, range(2))
    x_0 = plan.task.x_0(batch, "cpu")
    x_t = plan.objective.schedule.add_noise(x_0, batch["noise"], torch.tensor([0, 1]))
    assert x_0.dtype == x_t.dtype == batch["time_ids"].dtype == torch.float32
    assert (x_t != x_0).all()


# ---- conditions ------------------------------------------------------------------------------------------------------


def pictures(folder, sizes=((40, 24), (24, 56))):
    folder.mkdir(parents=True)
    for k, (width, height) in enumerate(sizes):
        pixels = np.random.default_rng(k).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


def captioned(folder, sizes):
    """Pictures with two captions each."""
    pictures(folder, sizes)
    for k in range(len(sizes)):
        (folder / f"{k}.txt").write_text(f"a handwritten {['one', 'two', 'three', 'four'][k % 4]}\nthe number {k}")
    return folder


def test_size_conditioning_is_that_of_the_crop(bases, tmp_path):
    """Original size, corner and target as the stock pipeline orders them; the corner is where the pixels come from, also mirrored."""
    data = pictures(tmp_path / "data")
    for k in range(2):
        (data / f"{k}.txt").write_text("a picture")
    flags = ("--dataset", data, "--resolution", 16, "--crop", "random", "--random_flip", "--caption_dropout", 0)
    task = plan_of(bases["xl"], tmp_path / "run", *flags).task
    task.prepare()
    assert task.data.latents is None  # they would be those of another crop
    pipeline, seen = stock(bases["xl"]), set()
    for position in range(40):
        index, sample = task.data.index(position), task.data[position]
        image = Image.open(data / f"{index}.png")
        top, left = map(int, sample["time_ids"][2:4])
        expected = pipeline._get_add_time_ids((image.height, image.width), (top, left), (16, 16), torch.float32, 32)
        assert torch.equal(sample["time_ids"], expected[0])
        scale = 16 / min(image.size)
        resized = image.resize((round(scale * image.width), round(scale * image.height)), Image.Resampling.BICUBIC)
        if task.data.flips(position):
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        cropped = np.array(resized.crop((left, top, left + 16, top + 16)))
        assert np.array_equal(sample["image"].permute(1, 2, 0).numpy(), cropped)
        seen.add((index, top, left))
    assert len(seen) > 10


@pytest.mark.parametrize("name, flag, zeros", [("xl", [], True), ("xl", ["--null_caption", "empty"], False), ("sd", [], False)])
def test_a_dropped_caption_is_what_the_exported_pipeline_samples_with(bases, name, flag, zeros, tmp_path):
    task = plan_of(bases[name], tmp_path / "run", *flag).task
    found = task.texts.of(["a handwritten seven", ""], [False, True], "cpu")
    task.export(task.build(), tmp_path / "out")
    for file, path in task.frozen_files().items():
        (tmp_path / "out" / file).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "out" / file)
    given = conditions(stock(tmp_path / "out"), None)
    assert torch.equal(found.text[1:], given["encoder_hidden_states"])
    assert bool((found.text[1] == 0).all()) == zeros
    if name == "xl":
        assert torch.equal(found.pooled[1:], given["added_cond_kwargs"]["text_embeds"])


def test_embeddings_are_the_same_kept_or_computed_in_each_step(bases, few, tmp_path):
    task = plan_of(bases["xl"], tmp_path / "run", *few).task
    captions, dropped = ["a handwritten one", "the number 2", "the number 2"], [False, True, False]
    fresh = task.texts.of(captions, dropped, "cpu")
    task.prepare()
    kept = task.texts.of(captions, dropped, "cpu")
    assert torch.allclose(fresh.text, kept.text, atol=1e-6) and torch.allclose(fresh.pooled, kept.pooled, atol=1e-6)


def test_what_is_kept_takes_its_memory_once(bases, few, tmp_path, monkeypatch):
    """`fits` permits half of the free memory."""
    from debias_diffusers.tasks import frozen_parts

    encoded, parts, alive = frozen_parts.encoded, [], []

    def watched(*args):
        for entries, found in encoded(*args):
            parts.append([weakref.ref(tensor) for tensor in found.values()])
            alive.append(sum(any(ref() is not None for ref in part) for part in parts))
            yield entries, found

    monkeypatch.setattr(frozen_parts, "encoded", watched)
    monkeypatch.setattr(frozen_parts, "ENCODED_AT_ONCE", 3)
    monkeypatch.setattr(frozen_parts, "MOST_IMAGES", 3)
    plan_of(bases["xl"], tmp_path / "run", *few).task.prepare()
    assert len(parts) > 8 and max(alive) <= 2  # the last one and the one before, which has just been copied


def test_latents_are_kept_for_both_flips(bases, few, tmp_path):
    """A mirrored image has other latents than mirrored latents."""
    task = plan_of(bases["xl"], tmp_path / "run", *few).task
    fresh = batch_of(task.data, range(6))
    task.prepare()
    kept = batch_of(task.data, range(6))
    assert "image" in fresh and "image" not in kept
    assert torch.allclose(task.x_0(fresh, "cpu"), task.x_0(kept, "cpu"), atol=1e-5)
    assert torch.equal(fresh["time_ids"], task._kept(kept)[2]) and fresh["caption"] == kept["caption"]
    flipped = [task.data.flips(position) for position in range(6)]
    assert any(flipped) and not all(flipped)


def test_a_dry_run_encodes_what_its_step_reads_and_no_more(bases, few, tmp_path, monkeypatch, capsys):
    """All latents of a large data set take hours."""
    from debias_diffusers.tasks import frozen_parts
    from debias_diffusers.training.start import train

    encoded, entries, modes = frozen_parts.encoded, set(), []

    def watched(*args):
        for found, parts in encoded(*args):
            entries.update(found)
            yield found, parts

    monkeypatch.setattr(frozen_parts, "encoded", watched)
    monkeypatch.setattr(frozen_parts.Latents, "leave", lambda _: modes.append("kept"))
    for folder in ((), ("--precompute_dir", tmp_path / "kept")):
        config, chosen = cli.train_command(
            [str(word) for word in text_args(bases["xl"], tmp_path / "run", *few, *folder, "--batch_size", 4, "--dry_run")[1:]], None
        )
        train(config, chosen)
    images = {entry for entry in entries if isinstance(entry, tuple)}
    assert 1 <= len(images) <= 4 and len(entries - images - {None}) <= 4
    assert modes == ["kept", "kept"] and "encoding the data" in capsys.readouterr().out and not list(tmp_path.iterdir())
    task, whole = (plan_of(bases["xl"], tmp_path / "run", *few).task for _ in range(2))
    task.prepare(range(8, 12))
    whole.prepare()
    some, all_of = (batch_of(each.data, range(8, 12)) for each in (task, whole))
    assert torch.equal(task.x_0(some, "cpu"), whole.x_0(all_of, "cpu"))


# ---- captions --------------------------------------------------------------------------------------------------------

CAPTIONS = ["naïve “quotes”, 日本語 🎨", 'a "b"\nof two lines', "plain"]


@pytest.mark.parametrize("form", ["jsonl", "only text", "csv", "txt", "parquet", "list"])
def test_captions_are_read_as_they_stand(form, tmp_path):
    import datasets

    from debias_diffusers.config.schema.data import DataConfig
    from debias_diffusers.data.captions import CaptionedSource
    from debias_diffusers.data.sources.opening import open_source

    data = pictures(tmp_path / "data", sizes=((8, 8),) * 3)
    expected = [(caption,) for caption in CAPTIONS]
    column, dataset = None, data
    if form in ("jsonl", "only text"):
        name = "text" if form == "jsonl" else "words"
        rows = [{"file_name": f"{k}.png", "label": "x", "number": k, name: caption} for k, caption in enumerate(CAPTIONS)]
        (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "csv":
        import csv

        with open(data / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["file_name", "prompt"], *([f"{k}.png", caption] for k, caption in enumerate(CAPTIONS))])
    elif form == "txt":
        (data / "metadata.csv").write_text("file_name,source\n0.png,a camera\n")  # of which no column has the name of captions
        for k, caption in enumerate(CAPTIONS):
            (data / f"{k}.txt").write_text(caption + "\n\n", encoding="utf-8")
        expected[1] = tuple(CAPTIONS[1].split("\n"))  # a line is a caption
    else:
        cells = [{"bytes": (data / f"{k}.png").read_bytes(), "path": None} for k in range(3)]
        texts = CAPTIONS if form == "parquet" else [[CAPTIONS[0], "second"], [CAPTIONS[1]], [CAPTIONS[2], ""]]
        expected = expected if form == "parquet" else [(CAPTIONS[0], "second"), (CAPTIONS[1],), (CAPTIONS[2],)]
        table = datasets.Dataset.from_dict({"image": cells, "words": texts}).cast_column("image", datasets.Image())
        dataset = tmp_path / "table.parquet"
        table.to_parquet(dataset)
        column = "words" if form == "list" else None
    source = CaptionedSource(open_source(DataConfig(dataset=str(dataset))), column)
    assert list(source.captions) == expected
    before = source.fingerprint()
    source.captions = [("other",)] * 3
    assert source.fingerprint() != before


def test_several_captions_are_drawn_by_position(bases, tmp_path):
    data = plan_of(bases["xl"], tmp_path / "run", "--caption_dropout", "0.25").task.data
    samples = [data[position] for position in range(400)]
    dropped = [sample["dropped"] for sample in samples]
    assert 0.18 < sum(dropped) / len(dropped) < 0.32
    kinds = {sample["caption"].rsplit(" ", 1)[0] for sample in samples}
    assert kinds == {"a handwritten", "the digit", "a handwritten digit"}
    assert [data[position]["caption"] for position in range(400)] == [sample["caption"] for sample in samples]


def test_tags_are_shuffled_behind_those_that_are_kept(bases, tmp_path):
    folder = pictures(tmp_path / "data", sizes=((8, 8),))
    (folder / "0.txt").write_text("me, a, b, c, d")
    flags = ("--dataset", folder, "--shuffle_caption", "--keep_tokens", 1, "--caption_dropout", 0)
    task = plan_of(bases["xl"], tmp_path / "run", *flags).task
    task.prepare()
    captions = [task.data[position]["caption"] for position in range(20)]
    assert len(set(captions)) > 5
    assert all(caption.startswith("me, ") and sorted(caption[4:].split(", ")) == ["a", "b", "c", "d"] for caption in captions)
    task.texts.of(captions[:4], [False] * 4, "cpu")


def test_the_emoji_have_captions(tmp_path):
    data = plan_of("digits", tmp_path / "run", "--dataset", "emoji", "--resolution", 16).task.data
    assert {data[position]["caption"] for position in range(1906)} >= {"french fries", "virgo", "norfolk island flag"}


def test_missing_and_long_captions_are_counted(bases, tmp_path, capsys):
    folder = pictures(tmp_path / "data", sizes=((8, 8),) * 3)
    (folder / "0.txt").write_text("one " * 20)
    (folder / "1.txt").write_text("a handwritten two")
    task = plan_of(bases["xl"], tmp_path / "run", "--dataset", folder).task
    said = capsys.readouterr().err
    assert "2 different captions of 2 images" in said and "1 images without one" in said
    assert "1 have more than 14 tokens, of which 6 are cut" in said and "--caption_chunks 2" in said
    assert all(task.data[position]["dropped"] for position in range(30) if task.data.index(position) == 2)


def test_captions_that_cannot_be_read_are_one_sentence(bases, tmp_path):
    folder = pictures(tmp_path / "data", sizes=((8, 8),) * 2)
    for value, said in (
        ('"\\ud800"', "is not Unicode"),
        ("5", "captions must be texts"),
        ("null", "none of 2 images has a caption"),
        (json.dumps("a" * 10**7), "a caption has 10000000 characters"),
    ):
        (folder / "metadata.jsonl").write_text(f'{{"file_name": "0.png", "text": {value}}}\n')
        with pytest.raises(InputError, match=said):
            plan_of(bases["xl"], tmp_path / "run", "--dataset", folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["a", null]}\n')
    assert plan_of(bases["xl"], tmp_path / "run", "--dataset", folder).task.data.captions == [("a",), ()]
    (folder / "metadata.jsonl").write_text('{"file_name": "images/0.png", "text": "a"}\n')
    with pytest.raises(InputError, match=r"metadata\.jsonl has no row for any image of dataset .*; its file_name must be a path"):
        plan_of(bases["xl"], tmp_path / "run", "--dataset", folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,a dog,\n1.png,a dog, on grass\n")
    with pytest.raises(InputError, match=r"metadata\.csv has more values for 1\.png than columns; put texts with commas into quotes"):
        plan_of(bases["xl"], tmp_path / "run", "--dataset", folder)


def test_a_caption_whose_image_is_not_there_is_said(bases, tmp_path, capsys):
    folder = pictures(tmp_path / "data", sizes=((8, 8),) * 2)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n{"file_name": "1.PNG", "text": "b"}\n')
    plan_of(bases["xl"], tmp_path / "run", "--dataset", folder)
    said = capsys.readouterr().err
    assert "passed over: 1 in metadata.jsonl without an image\n" in said and "1 images without one" in said


def test_training_without_an_image_or_a_caption_is_one_sentence(bases, tmp_path):
    folder = pictures(tmp_path / "data" / "0_cats", sizes=((8, 8),) * 2).parent
    (folder / "0_cats" / "0.txt").write_text("a cat")
    flags = ("--dataset", folder)
    with pytest.raises(InputError, match="no image is trained"):
        plan_of(bases["xl"], tmp_path / "run", *flags, "--folder_repeats")
    with pytest.raises(InputError, match="none of the 1 images that are trained has a caption"):
        for seed in range(8):  # one of which holds out the other image
            plan_of(bases["xl"], tmp_path / "run", *flags, "--validation_split", 0.5, "--seed", seed)


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Flags of a data set that is encoded at once: twelve images with captions."""
    folder = captioned(tmp_path_factory.mktemp("few") / "data", sizes=((8, 8), (12, 8), (8, 10)) * 4)
    return ("--dataset", folder, "--random_flip")


@pytest.fixture(scope="module")
def whole(bases, few, tmp_path_factory):
    """A run without an interruption."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    code, _, err = run(*text_args(bases["xl"], folder, *few))
    assert code == 0, err
    return folder


def test_killed_twice_it_ends_with_the_same_bits(bases, few, whole, tmp_path):
    for step in (4, 8):
        process = Forked(*text_args(bases["xl"], tmp_path / "run", *few))
        wait_for(lambda step=step: newest_step(tmp_path / "run") >= step)
        process.kill()
        process.process.join()
    code, _, err = run(*text_args(bases["xl"], tmp_path / "run", *few))
    assert code == 0 and "resuming" in err, err
    assert tensors(tmp_path / "run", 12) == tensors(whole, 12) and metrics(tmp_path / "run") == metrics(whole)


def test_two_processes_train_the_same(bases, few, whole, tmp_path):
    from conftest import as_ranks

    code, err = as_ranks(2, *text_args(bases["xl"], tmp_path / "run", *few, "--max_steps", 4))
    assert code == 0, err
    losses = [[line["loss"] for line in metrics(folder)[:4]] for folder in (whole, tmp_path / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_run_directory_is_a_stock_pipeline(bases, whole):
    """Frozen parts byte for byte, the scheduler's class, and the averaged weights."""
    base = bases["xl"]
    for path in base.rglob("*"):
        name = path.relative_to(base)
        if path.is_file() and name.parts[0] not in ("unet", "model_index.json"):
            if name.parts[0] == "scheduler":
                assert json.loads((whole / name).read_text()) == json.loads(path.read_text())
            else:
                assert (whole / name).read_bytes() == path.read_bytes(), name
    pipeline = stock(whole)
    assert type(pipeline.scheduler).__name__ == "EulerDiscreteScheduler"
    from safetensors.torch import load_file

    averaged = load_file(whole / "checkpoints" / "step-00000012" / "ema_0.9.safetensors")
    assert all(torch.equal(value, averaged[name]) for name, value in pipeline.unet.state_dict().items())
    image = pipeline("a handwritten seven", height=8, width=8, num_inference_steps=2, output_type="np").images
    assert np.isfinite(image).all()


def test_the_ema_can_be_off(bases, few, tmp_path):
    code, _, err = run(*text_args(bases["xl"], tmp_path / "run", *few, "--ema_decay", 0, "--max_steps", 4))
    assert code == 0, err
    found = tensors(tmp_path / "run", 4)
    assert set(found) == {"model.safetensors", "optimizer.safetensors"}
    from safetensors.torch import load, load_file

    trained, exported = load(found["model.safetensors"]), load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in trained.items())
    assert "not averaged" in (tmp_path / "run" / "README.md").read_text()


def write_small_shards():
    """In the training: diffusers' own limit of a file, of 10 GB, is 50 kB."""
    save = diffusers.ModelMixin.save_pretrained

    def saved(self, folder, max_shard_size="50KB", **options):
        save(self, folder, max_shard_size=max_shard_size, **options)

    diffusers.ModelMixin.save_pretrained = saved


def test_a_unet_of_any_size_is_exported_as_one_file_in_place_of_shards(bases, few, tmp_path):
    folder, unet = tmp_path / "run", tmp_path / "run" / "unet"
    args = text_args(bases["xl"], folder, *few, "--ema_decay", 0)
    assert Forked(*args, "--max_steps", 4, before=write_small_shards).result()[0] == 0
    assert {path.name for path in unet.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    UNet2DConditionModel.from_pretrained(unet).save_pretrained(unet, max_shard_size="50KB")  # as an older version has exported it
    assert len([*unet.glob("*.safetensors")]) > 2
    assert Forked(*args, "--max_steps", 8).result()[0] == 0
    trained, exported = safetensors.torch.load(tensors(folder, 8)["model.safetensors"]), stock(folder).unet.state_dict()
    assert all(torch.equal(value, exported[name]) for name, value in trained.items())


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["xl", "sd"])
def test_a_unet_in_bf16_is_trained_drawn_with_and_exported(name, bases, few, tmp_path):
    flags = ["--mixed_precision", "bf16", "--param_dtype", "bf16", "--ema_decay", 0, "--max_steps", 2, "--sample_every", 2]
    code, _, err = run(*text_args(bases[name], tmp_path / "run", *few, *flags))
    assert code == 0, err
    assert (tmp_path / "run" / "samples" / "step-00000002.png").exists()
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in exported.values()} == {torch.bfloat16}
    image = stock(tmp_path / "run")("a handwritten seven", height=8, width=8, num_inference_steps=2, output_type="np").images
    assert np.isfinite(image).all()


def test_parameterization_is_that_of_the_base_model(bases, tmp_path, capsys):
    plan = plan_of(bases["xl, v, zero snr"], tmp_path / "run")
    objective = plan.config.objective
    assert (objective.prediction_type, objective.noise_schedule, objective.rescale_betas_zero_snr) == (
        "v_prediction",
        "scaled_linear",
        True,
    )
    assert plan.objective.schedule.snr[-1] == 0
    assert "as base_model" in capsys.readouterr().err
    plan = plan_of(bases["xl"], tmp_path / "run", "--prediction_type", "v_prediction")
    assert plan.config.objective.prediction_type == "v_prediction"
    assert "base_model was trained with epsilon" in capsys.readouterr().err
    values = plan.task.scheduler_config()
    assert values["_class_name"] == "EulerDiscreteScheduler" and values["prediction_type"] == "v_prediction"
    plan = plan_of(bases["xl, v, zero snr"], tmp_path / "run", "--no_rescale_betas_zero_snr")
    exported = schedule_of_scheduler(plan.task._scheduler())
    torch.testing.assert_close(exported.snr, plan.objective.schedule.snr)


def test_zero_terminal_snr_is_that_of_the_exported_pipeline(tmp_path):
    """PNDM, which Stable Diffusion 1.x has, takes no notice of it, and steps with other spacings do not begin at the last timestep."""
    for name, xl, kind, expected in (
        ("sd", False, "PNDMScheduler", "DDIMScheduler"),
        ("xl", True, "EulerDiscreteScheduler", "EulerDiscreteScheduler"),
    ):
        base = make_base(tmp_path / name, xl, _class_name=kind, timestep_spacing="leading", clip_sample=True)
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
        flags = ("--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
        task = plan_of(base, tmp_path / "run", *flags).task
        exported = tmp_path / f"{name} exported"
        exported.mkdir()
        task.export(task.build(), exported)
        assert json.loads((exported / "model_index.json").read_text())["scheduler"] == ["diffusers", expected]
        scheduler = getattr(diffusers, expected).from_pretrained(exported / "scheduler")
        assert type(task._scheduler()) is type(scheduler) and not scheduler.config.clip_sample * (name == "sd")
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[-1] < 1e-7


def test_a_vae_of_another_kind_is_warned_of(bases, tmp_path, capsys):
    """As that of Stable Diffusion XL, which --config sdxl names, for a base model of Stable Diffusion 1.x: both have four channels."""
    vae = shutil.copytree(bases["sd"] / "vae", tmp_path / "vae")
    plan_of(bases["sd"], tmp_path / "run", "--vae", vae)
    assert "has latents of scale" not in capsys.readouterr().err
    values = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(values | {"scaling_factor": 0.13025}))
    plan_of(bases["sd"], tmp_path / "run", "--vae", vae)
    assert f"latents of scale 0.13025, but base_model was trained with {values['scaling_factor']}" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"vae .*safetensors is a file; name a folder with config\.json"):
        plan_of(bases["sd"], tmp_path / "run", "--vae", vae / "diffusion_pytorch_model.safetensors")


def test_a_base_model_may_move_but_not_change(bases, few, whole, tmp_path):
    folder, base = shutil.copytree(whole, tmp_path / "run"), shutil.copytree(bases["xl"], tmp_path / "base")
    flags = (*few, "--max_steps", 13)
    code, _, err = run(*text_args(base, folder, *flags))
    assert code == 0, err
    assert json.loads((folder / "config.json").read_text())["base_model"] == str(base)
    file = base / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = run(*text_args(base, folder, *few, "--max_steps", 14))
    assert code == 2 and "was trained with other files" in err, err


def test_frozen_files_of_another_base_model_are_replaced(bases, few, tmp_path):
    """A start that was killed before its first checkpoint has left those of its base model, of the same size."""
    base = bases["xl"]
    (tmp_path / "run" / "vae").mkdir(parents=True)
    (tmp_path / "run" / ".debias_diffusers.json").write_text(json.dumps({"debias_diffusers": "run"}))
    size = (base / "vae" / "config.json").stat().st_size
    (tmp_path / "run" / "vae" / "config.json").write_bytes(b" " * size)
    code, _, err = run(*text_args(base, tmp_path / "run", *few, "--max_steps", 1))
    assert code == 0, err
    assert (tmp_path / "run" / "vae" / "config.json").read_bytes() == (base / "vae" / "config.json").read_bytes()


def test_files_beside_those_that_are_loaded_are_no_part_of_a_model(bases, tmp_path):
    """As of a clone, of a run in its folder, or other variants, which any program may fetch into the cache of the Hub meanwhile."""
    from debias_diffusers.config.schema.data import TextConfig
    from debias_diffusers.tasks.base_model import open_base

    vae = shutil.copytree(bases["xl"] / "vae", tmp_path / "vae")
    for name in (".git/config", ".cache/huggingface/x", "run/config.json"):
        (vae / name).parent.mkdir(parents=True)
        (vae / name).touch()
    base = shutil.copytree(bases["xl"], tmp_path / "base")
    before = open_base(TextConfig(base_model=str(base), vae=str(vae)))
    files = before.frozen_files()
    assert {name for name in files if name.startswith("vae/")} == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    for name in ("text_encoder/model.fp16.safetensors", "text_encoder_2/flax_model.msgpack", "text_encoder/pytorch_model.bin"):
        (base / name).write_bytes(b"other")
    (vae / "README.md").write_text("other")
    after = open_base(TextConfig(base_model=str(base), vae=str(vae)))
    assert after.frozen_files() == files and after.read_files() == before.read_files()


# ---- errors ----------------------------------------------------------------------------------------------------------


def broken(base, folder, part, change):
    """A copy of a base model with one of its files changed; None removes the folder of the part."""
    shutil.copytree(base, folder)
    if change is None:
        shutil.rmtree(folder / part)
        return folder
    file = folder / part if part.endswith(".json") else folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


@pytest.mark.parametrize(
    "part, change, said",
    [
        ("vae", None, "has no vae"),
        ("text_encoder_2", None, "has no text_encoder_2"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
        ("unet", {"_class_name": "UNet2DModel"}, "without text conditions"),
        ("unet", {"in_channels": 9}, "takes 9 channels, but its vae has 4"),
        ("unet", {"projection_class_embeddings_input_dim": 72}, "six sizes"),
        ("unet", {"time_cond_proj_dim": 256}, "distilled"),
        ("vae", {"latent_channels": 16}, "its vae has 16"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.5}, "no noise schedule"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts sample"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "many"}, "is damaged"),
        ("unet", {"addition_time_embed_dim": None}, "is damaged"),
        ("vae", {"block_out_channels": None}, "no block_out_channels"),
    ],
)
def test_a_base_model_that_does_not_fit_is_one_sentence(bases, part, change, said, tmp_path):
    from debias_diffusers.config.schema.data import TextConfig
    from debias_diffusers.tasks.base_model import open_base

    base = broken(bases["xl"], tmp_path / "base", part, change)
    with pytest.raises(InputError) as error:
        open_base(TextConfig(base_model=str(base)))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_scheduler_whose_noise_is_not_that_of_ddpm_is_refused(bases, tmp_path):
    """Of EDM or flow matching; their configurations have no betas, which are not those of the field's default then."""
    base = shutil.copytree(bases["xl"], tmp_path / "base")
    values = {"_class_name": "EDMEulerScheduler", "sigma_max": 80.0, "num_train_timesteps": 1000, "prediction_type": "epsilon"}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"EDMEulerScheduler of base_model .* has no betas"):
        plan_of(base, tmp_path / "run")
    base = broken(bases["xl"], tmp_path / "other", "scheduler/scheduler_config.json", {"_class_name": "NoScheduler"})
    with pytest.raises(InputError, match="NoScheduler"):  # and not at the first preview
        plan_of(base, tmp_path / "run")


@pytest.mark.parametrize("part, name", [("unet", "diffusion_pytorch_model"), ("text_encoder_2", "model")])
def test_a_base_model_without_weights_is_refused(bases, part, name, tmp_path):
    """A UNet without weights would be trained from random ones."""
    base = shutil.copytree(bases["xl"], tmp_path / "base")
    (base / part / f"{name}.safetensors").rename(base / part / f"{name}.bin")
    with pytest.raises(InputError, match=f"its {part} has no safetensors weights"):
        plan_of(base, tmp_path / "run")


def test_a_base_model_in_fp16_alone_is_trained_and_exported_as_one_that_every_program_loads(bases, few, tmp_path):
    from diffusers import DiffusionPipeline

    base = in_fp16_alone(bases["xl"], tmp_path / "base")
    code, _, err = run(*text_args(base, tmp_path / "run", *few, "--max_steps", 1, "--learning_rate", 1e-12))
    assert code == 0, err
    exported, stored = DiffusionPipeline.from_pretrained(tmp_path / "run"), DiffusionPipeline.from_pretrained(base, variant="fp16")
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        found, expected = getattr(exported, part).state_dict(), getattr(stored, part).state_dict()
        assert all(torch.allclose(found[key].float(), expected[key].float(), atol=1e-9) for key in expected)
    assert not any("fp16" in path.name for path in (tmp_path / "run").rglob("*"))


def test_flags_are_checked_with_the_parameterization_of_the_base_model(bases, tmp_path):
    from debias_diffusers.training.start import _check_text

    flags = ("--terminal_weight_floor", 0.5)  # for a terminal SNR of 0
    for base, said in (("xl, v, zero snr", None), ("xl", "terminal SNR of this schedule is not 0"), ("user/model", None)):
        config, chosen = cli.train_command([str(word) for word in text_args(bases.get(base, base), tmp_path / "run", *flags)[1:]], None)
        if said is None:
            _check_text(config, chosen, 1)
        else:
            with pytest.raises(InputError, match=said):
                _check_text(config, chosen, 1)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--resolution", 12], "multiple of 8"),
        (["--class_conditional"], "class_conditional is True, but is for pixel models"),
        (["--weighting", "variational"], "learned variance"),
        (["--prediction_type", "flow"], "know epsilon and v_prediction"),
        (["--keep_tokens", 2], "shuffle_caption is off"),
        (["--crop_per_image"], "crop is center"),
        (["--sample_prompts", "caf\udce9"], "is not Unicode"),
        (["--base_model", "digits", "--caption_dropout", 0], "take --sample_guidance_scale 1"),
        (["--schedule_shift", 64], "ends at timestep 999"),
        (["--caption_column", "nothing"], "caption_column is nothing"),
    ],
)
def test_what_does_not_go_with_text_to_image_is_one_sentence(bases, flags, said, tmp_path):
    with pytest.raises(InputError) as error:
        from debias_diffusers.config.validation.training import train_problems
        from debias_diffusers.errors import raise_all

        config, _ = cli.train_command([str(arg) for arg in text_args(bases["xl"], tmp_path / "run", *flags)[1:]], None)
        raise_all(train_problems(config))
        plan_of(bases["xl"], tmp_path / "run", *flags)
    assert said in str(error.value), str(error.value)


def test_fields_of_text_to_image_are_no_fields_of_pixel_models(tmp_path):
    from debias_diffusers.config.validation.training import train_problems

    config, _ = cli.train_command(["--caption_dropout", "0.2", "--output_dir", str(tmp_path / "run")], None)
    assert any("caption_dropout is 0.2, but a pixel model has no captions" in problem for problem in train_problems(config))
    config, _ = cli.train_command(["--task", "text_to_image", "--output_dir", str(tmp_path / "run")], None)
    assert any("base_model is missing" in problem for problem in train_problems(config))


def test_a_run_directory_is_no_base_model_of_itself(whole):
    """The first export would replace the weights from which it starts."""
    code, _, err = run(*text_args(whole, whole, "--max_steps", 14))
    assert code == 2 and "is the run directory" in err, err


@pytest.mark.parametrize("flags, said", [(["--base_model", "missing"], "does not exist"), (["--resolution", 12], "multiple of 8")])
def test_a_wrong_base_model_is_refused_before_torch_is_imported(bases, flags, said, tmp_path):
    words = [str(word) for word in text_args(bases["xl"], tmp_path / "run", *flags)[1:]]
    script = f"import sys; from debias_diffusers import cli; code = cli.train({words!r}); print(code, 'torch' in sys.modules)"
    out, err = command("-c", script).communicate(timeout=HANG)
    assert out.strip() == "2 False" and said in err and not (tmp_path / "run").exists(), err


def test_latents_that_are_not_finite_are_an_error(bases, tmp_path):
    """Half precision overflows in the VAE of Stable Diffusion XL; other trainers take zeros then, or train on NaN."""
    task = plan_of(bases["xl"], tmp_path / "run").task
    with torch.no_grad():
        task.latents.vae.encoder.conv_in.weight.fill_(float("inf"))
    with pytest.raises(InputError, match="of image 0 of dataset digits that are not finite"):
        task.prepare()


def test_captions_are_dropped_anew_in_each_epoch(bases, tmp_path):
    """And not once when the data are read."""
    data = plan_of(bases["xl"], tmp_path / "run", "--caption_dropout", 0.5).task.data
    first, second = ({data.index(p): data[p]["dropped"] for p in range(start, start + 1797)} for start in (0, 1797))
    assert first.keys() == second.keys() and 0.4 < sum(first[index] == second[index] for index in first) / 1797 < 0.6


def test_a_push_has_every_part_of_the_pipeline(whole):
    from debias_diffusers.hub.publish import _files

    there = {path.relative_to(whole).as_posix() for part in stock_parts(whole) for path in (whole / part).iterdir()}
    assert there and {name for name, path in _files(whole, 12).items() if path.is_file()} >= there


def stock_parts(folder):
    """The sub-folders of a pipeline."""
    return [name for name, value in json.loads((folder / "model_index.json").read_text()).items() if isinstance(value, list)]


def test_the_card_says_what_was_trained_from_what(whole):
    card = (whole / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "DiffusionPipeline.from_pretrained" in card
    assert "of which the UNet was trained" in card and "caption_dropout" in card and "model_channels" not in card
    values = json.loads((whole / "config.json").read_text())
    assert values["task"] == "text_to_image" and "model_channels" not in values and values["noise_schedule"] == "scaled_linear"


@pytest.mark.nightly
def test_the_captioned_digits_reach_their_goal(tmp_path):
    """At least 95% of 300 images at guidance 2 show the digit that their prompt names."""
    code, _, err = run("train.py", "--config", "digits_text", "--output_dir", tmp_path / "run", "--sample_every", 0)
    assert code == 0, err
    flags = ("--guidance_scale", 2, "--metrics", "prompt_accuracy", "--num_images", 300, "--output", tmp_path / "scores.json")
    code, _, err = run("eval.py", "score", tmp_path / "run", *flags)
    assert code == 0, err
    (row,) = json.loads((tmp_path / "scores.json").read_text())["targets"]
    assert row["prompt_accuracy"] >= 0.95


# ---- Stable Diffusion XL at its full size ----------------------------------------------------------------------------


def full_plan(tmp_path, monkeypatch, *flags):
    """A training of `--config sdxl` whose frozen parts are on the meta device."""
    import sdxl

    from debias_diffusers.tasks import frozen_parts

    monkeypatch.setattr(frozen_parts, "_loaded", sdxl.on_meta)
    null = frozen_parts.Embeddings(torch.zeros(1, 77, 2048), torch.zeros(1, 1280))
    monkeypatch.setattr(frozen_parts, "null_embeddings", lambda *_: null)
    base = sdxl.write(tmp_path / "base", BASE / "tokenizer")
    data = pictures(tmp_path / "data", sizes=((1024, 1200),))
    (data / "0.txt").write_text("a picture")
    usual = ["--config", "sdxl", "--base_model", base, "--vae", base, "--dataset", data, "--output_dir", tmp_path / "run"]
    return plan_of_flags(*usual, *flags)


def test_the_sdxl_configuration_on_the_full_model(tmp_path, monkeypatch):
    """On torch's meta device: configuration, what is trained and frozen, the files of an export, and the estimate of memory."""
    from debias_diffusers.tasks.base import trained_parameters
    from debias_diffusers.training.dry_run import on_meta, tensor_bytes

    plan = full_plan(tmp_path, monkeypatch, "--mixed_precision", "no")
    config, task = plan.config, plan.task
    optim = config.optimization
    objective = config.objective
    assert (objective.weighting, objective.prediction_type, objective.noise_schedule) == ("debiased", "epsilon", "scaled_linear")
    assert (optim.optimizer, optim.learning_rate, optim.weight_decay, optim.max_grad_norm) == ("adafactor", 1e-5, 1e-2, 1)
    assert (optim.batch_size, optim.micro_batch_size, optim.gradient_checkpointing, optim.ema_decay) == (4, 1, True, (0,))
    assert (config.data.resolution, config.text.crop, task.shape) == (1024, "random", (4, 128, 128))
    network, flops = on_meta(task)
    trained = trained_parameters(network)
    assert sum(parameter.numel() for parameter in trained.values()) == 2_567_463_684
    assert {id(parameter) for parameter in network.parameters()} == {id(parameter) for parameter in trained.values()}
    assert flops > 1e13
    files = {name.split("/")[0] for name in task.frozen_files()}
    assert files == {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}
    encoders, vae = 123_060_480 + 694_659_840, 83_653_863
    assert task.frozen_bytes == 4 * (encoders + vae)
    # float32 weights and gradients; Adafactor's factors are less than a twentieth of the weights, but for convolutions
    assert 8.0 < (sum(tensor_bytes(task, network, optim).values()) - task.frozen_bytes) / 2_567_463_684 < 9.5


@pytest.mark.parametrize("name", ["xl", pytest.param("sd", marks=pytest.mark.nightly)])
def test_the_memory_of_a_step_is_counted(name, bases, few, tmp_path):
    from test_dry_run import measured_memory

    from debias_diffusers.training.dry_run import estimated_memory, on_meta

    plan = plan_of(bases[name], tmp_path / "run", *few)
    estimate = estimated_memory(plan.task, on_meta(plan.task)[0], plan.config.optimization, "cpu")
    assert estimate.peak == pytest.approx(measured_memory(plan), rel=0.15)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "flags, shards, least, most",  # GB, beside the frozen parts
    [
        ([], 1, 27, 30),  # weights 10.3, their copies in bf16 5.1, gradients 10.3, Adafactor 1.0, activations about 1
        (["--param_dtype", "bf16"], 1, 12, 13.5),
        ([], 8, 4, 6),
    ],
)
def test_the_memory_of_the_full_sdxl_is_counted(flags, shards, least, most, tmp_path, monkeypatch):
    from debias_diffusers.training.dry_run import estimated_memory

    plan = full_plan(tmp_path, monkeypatch, "--mixed_precision", "bf16", *flags)
    with torch.device("meta"):
        network = plan.task.build()
    estimate = estimated_memory(plan.task, network, plan.config.optimization, "cuda", shards=shards)
    assert least < (estimate.peak - plan.task.frozen_bytes) / 1e9 < most


def test_hidden_libraries_are_not_found_until_they_are_asked_for(monkeypatch):
    from importlib.util import find_spec

    from debias_diffusers.utils import text_libraries

    monkeypatch.delitem(sys.modules, "transformers")  # as in a process that has not imported it
    text_libraries.hide()
    try:
        assert find_spec("transformers") is None and find_spec("torch") is not None
    finally:
        text_libraries.require()
    assert find_spec("transformers") is not None


@pytest.mark.nightly
def test_a_pixel_model_does_not_wait_for_transformers(tmp_path):
    """diffusers imports it, and peft, wherever they are installed; a command that trains a pixel model does not let it."""
    script = (
        "import sys; from debias_diffusers import cli; code = cli.train(); "
        "print(code, sorted({name.split('.')[0] for name in sys.modules} & {'transformers', 'peft'}), 'diffusers' in sys.modules)"
    )
    done = command("-c", script, *train_args(tmp_path / "run", "--max_steps", 1, "--warmup_steps", 0)[1:])
    out, err = done.communicate(timeout=HANG)
    assert out.strip() == "0 [] True", err


def test_training_from_python_returns_the_stock_pipeline(bases, few, tmp_path):
    from debias_diffusers import train

    base = bases["xl, v, zero snr"]
    flags = {
        "dataset": str(few[1]),
        "resolution": 8,
        "num_workers": 0,
        "batch_size": 4,
        "max_steps": 2,
        "num_threads": 1,
        "sample_every": 0,
    }
    pipeline = train(base_model=str(base), output_dir=str(tmp_path / "run"), **flags)
    assert isinstance(pipeline, StableDiffusionXLPipeline)
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (values["prediction_type"], values["rescale_betas_zero_snr"]) == ("v_prediction", True)
    train(base_model=str(base), output_dir=str(tmp_path / "run"), **flags | {"max_steps": 3})
    assert newest_step(tmp_path / "run") == 3


def test_the_latents_of_a_repeated_image_are_kept_once(bases, tmp_path):
    pictures(tmp_path / "data")
    (tmp_path / "data" / "3_often").mkdir()
    for k, folder in enumerate(("3_often", ".")):
        (tmp_path / "data" / f"{k}.png").rename(tmp_path / "data" / folder / f"{k}.png")
        (tmp_path / "data" / folder / f"{k}.txt").write_text(f"number {k}")
    flags = (
        "--dataset",
        tmp_path / "data",
        "--resolution",
        16,
        "--crop",
        "random",
        "--crop_per_image",
        "--folder_repeats",
        "--batch_size",
        2,
    )
    task = plan_of(bases["xl"], tmp_path / "run", *flags).task
    fresh = [task.data[position] for position in range(4)]
    task.prepare()
    assert task.data.latents[0].shape[1] == 2
    kept = [task.data[position] for position in range(4)]
    assert sorted(sample["caption"] for sample in fresh) == ["number 0"] * 3 + ["number 1"]
    for sample, again in zip(fresh, kept):
        assert torch.equal(task.data.latents[2][again["flipped"], again["index"]], sample["time_ids"])
    assert len({tuple(sample["time_ids"].tolist()) for sample in fresh}) == 2
