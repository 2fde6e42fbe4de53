"""sample.py with text-to-image models: prompts, sizes, folders that are data sets, and what is refused."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import as_ranks, sample_config, writers
from PIL import Image, ImageFont
from pushing import served
from safetensors.torch import load_file, save
from text_models import LONG, random_unet

pytest.importorskip("transformers")

from debias_diffusers import cli
from debias_diffusers.config.prompts import prompts_hash
from debias_diffusers.config.registry import SOLVERS
from debias_diffusers.data import images
from debias_diffusers.errors import InputError
from debias_diffusers.pipelines import text_pipeline
from debias_diffusers.runs import checkpoints, model_folder
from debias_diffusers.sampling.generate import make_job, sample

PROMPTS = ("a handwritten seven", "the digit “nine”", 'a "quoted" zero, 数字')


def config_of(model, folder="", **changes):
    return sample_config(model, folder, **{"prompt": PROMPTS, "steps": 2, "num_images": 7, **changes})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels_of(folder, k):
    return np.asarray(Image.open(folder / f"{k:06d}.png")).astype(int)


def test_the_folder_is_a_captioned_data_set_whose_image_k_shows_prompt_k(text_models, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeff".encode() + "\r\n".join([*PROMPTS, "", ""]).encode())
    folder = sample(config_of(text_models["xl"], tmp_path / "drawn", prompt=(), prompts=str(tmp_path / "prompts.txt")))
    assert [(row["text"], row["seed"]) for row in rows_of(folder)] == [(PROMPTS[k % 3], k) for k in range(7)]
    loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    assert loaded["text"] == [PROMPTS[k % 3] for k in range(7)] and loaded.column_names == ["image", "text", "seed"]
    settings = json.loads((folder / ".sampling.json").read_text())
    assert settings["guidance_scale"] == 5.0 and (settings["width"], settings["height"]) == (8, 8) and len(settings["prompts_sha256"]) == 64
    job = make_job(config_of(text_models["xl"]), "cpu")
    assert job.settings == settings  # whether the prompts were typed, or in a file
    alone = job.draw([4])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(alone - pixels_of(folder, 4)).max() <= 1
    assert Image.open(folder / "preview" / "grid.png").width > 120


def test_what_is_missing_is_drawn_again_and_other_prompts_are_refused(text_models, tmp_path):
    config = config_of(text_models["sd"], tmp_path, negative_prompt="zero")
    folder = sample(config)
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    for k in (2, 6):
        (folder / f"{k:06d}.png").unlink()
    sample(config)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before
    for changes, named in (
        ({"prompt": PROMPTS[:2]}, "prompts were others"),
        ({"negative_prompt": "one"}, "negative_prompt was zero, now one"),
        ({"guidance_scale": 2.0}, "guidance_scale was 7.5, now 2.0"),
        ({"height": 16}, "height was 8, now 16"),
    ):
        with pytest.raises(InputError, match=named):
            sample(config_of(text_models["sd"], tmp_path, **{"negative_prompt": "zero", **changes}))
    sample(config_of(text_models["sd"], tmp_path, height=16, overwrite=True))
    assert pixels_of(folder, 0).shape == (16, 8, 3)


def test_two_processes_draw_what_one_draws(text_models, tmp_path):
    flags = ["--prompt", *PROMPTS, "--steps", 2, "--num_images", 7, "--batch_size", 2, "--num_threads", 1]
    code, err = as_ranks(2, "sample.py", text_models["xl"], *flags, "--output_dir", tmp_path / "two")
    assert code == 0, err
    sample(config_of(text_models["xl"], tmp_path / "one", batch_size=2))
    names = sorted(path.name for path in (tmp_path / "one").glob("*.png"))
    assert len(names) == 7 and all((tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes() for name in names)
    assert (tmp_path / "two" / ".sampling.json").read_bytes() == (tmp_path / "one" / ".sampling.json").read_bytes()


def test_every_solver_draws_with_v_prediction_and_zero_terminal_snr(text_models):
    drawn = {}
    for name in (name for name, spec in SOLVERS.items() if not spec.flow):
        job = make_job(config_of(text_models["v"], scheduler=name, steps=3), "cpu")
        assert job.network_evaluations == (5 if name == "heun" else 3)
        drawn[name] = job.draw(range(2)).numpy().tobytes()
    assert len(set(drawn.values())) > 5  # euler is ddim, for one
    job = make_job(config_of(text_models["v"], steps=None, timesteps=(900, 400, 0)), "cpu")
    assert job.options["timesteps"] == [900, 400] and job.network_evaluations == 2 and job.draw(range(1)).shape == (1, 3, 8, 8)


def test_the_unet_of_a_checkpoint_is_drawn_with_and_the_model_s_hash_covers_the_frozen_parts(text_models, tmp_path):
    run = shutil.copytree(text_models["xl"], tmp_path / "run")
    exported = load_file(run / "unet" / "diffusion_pytorch_model.safetensors")
    files = {"model.safetensors": save(random_unet(seed=5).state_dict()), "ema_0.9.safetensors": save(exported)}
    checkpoints.write(run / "checkpoints", 3, writers(files), {"step": 3, "config": {"ema_decay": [0.9]}}, keep=1)
    drawn = {weights: make_job(config_of(run, weights=weights), "cpu") for weights in ("ema", "0.9", "raw")}
    assert torch.equal(drawn["ema"].draw(range(2)), drawn["0.9"].draw(range(2)))
    assert not torch.equal(drawn["ema"].draw(range(2)), drawn["raw"].draw(range(2)))
    hashes = {weights: job.settings["model_sha256"] for weights, job in drawn.items()}
    assert hashes["ema"] == hashes["0.9"] != hashes["raw"] and drawn["raw"].settings["model_step"] == 3
    vae = json.loads((run / "vae" / "config.json").read_text())
    (run / "vae" / "config.json").write_text(json.dumps(vae | {"scaling_factor": 0.5}))
    assert make_job(config_of(run), "cpu").settings["model_sha256"] != hashes["ema"]
    assert sample(config_of(run)).name.startswith("unipc-2-a_handwritten_seven-")
    assert sample(config_of(run, width=16, negative_prompt="a/b")).name.count("-") > 4


def test_packed_images_and_a_trajectory(text_models, tmp_path):
    folder = sample(config_of(text_models["xl"], tmp_path, format="npz", num_images=3, trajectory=True, width=16))
    with np.load(folder / "samples.npz") as packed:
        assert packed["arr_0"].shape == (3, 8, 16, 3) and packed.files == ["arr_0"]
    trajectory = Image.open(folder / "preview" / "trajectory.png")
    assert trajectory.height > 6 * 48  # x_t and x_0 of three images


def test_a_trajectory_ends_with_the_images_themselves(text_models):
    job = make_job(config_of(text_models["sd"], scheduler="ddim", steps=3), "cpu")
    _, ((before, _), (x_t, x_0)) = job.watch(range(2), [0, 2])
    drawn = ((x_t / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    assert torch.equal(drawn, job.draw(range(2))) and not torch.allclose(before, x_t)
    assert x_0.shape == x_t.shape == (2, 3, 8, 8)


def test_guidance_is_that_of_the_stock_pipelines_where_nothing_is_said(text_models, tmp_path):
    assert [make_job(config_of(text_models[name]), "cpu").options["guidance_scale"] for name in ("xl", "sd")] == [5.0, 7.5]
    run = shutil.copytree(text_models["xl"], tmp_path / "run")
    values = {"dataset": "digits", "caption_dropout": 0.0, "caption_chunks": 2}
    (run / "config.json").write_text(json.dumps({**values, "base_model": "digits"}))
    assert make_job(config_of(run), "cpu").options["guidance_scale"] == 1.0
    with pytest.raises(InputError, match="caption_dropout 0"):
        make_job(config_of(run, guidance_scale=2.0), "cpu")
    with pytest.raises(InputError, match="negative_prompt is blurry, but"):  # from which nothing would lead away
        make_job(config_of(run, negative_prompt="blurry"), "cpu")
    (run / "config.json").write_text(json.dumps({**values, "base_model": "user/sdxl"}))  # which knows images without a prompt
    assert [make_job(config_of(run, guidance_scale=scale), "cpu").options["guidance_scale"] for scale in (None, 2.0)] == [5.0, 2.0]


def test_a_run_draws_the_size_that_it_was_trained_with(text_models, tmp_path):
    """Whatever its UNet says, which is the size of the base model."""
    run = shutil.copytree(text_models["xl"], tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"dataset": "digits", "resolution": 16}))
    assert make_job(config_of(text_models["xl"]), "cpu").size == (8, 8) and make_job(config_of(run), "cpu").size == (16, 16)
    assert make_job(config_of(run, width=24), "cpu").size == (16, 24)
    assert make_job(config_of(run), "cpu").name == make_job(config_of(text_models["xl"]), "cpu").name


def test_long_prompts_are_counted_once_unless_the_model_reads_them_in_chunks(text_models, tmp_path):
    (note,) = make_job(config_of(text_models["xl"], prompt=(LONG, "a seven", LONG)), "cpu").notes()
    cut = text_pipeline.count_tokens(make_job(config_of(text_models["xl"]), "cpu").pipeline, [LONG])[0] - 14
    assert f"1 of 2 prompts are longer than the 14 tokens that the text encoders read: {cut} tokens" in note
    run = shutil.copytree(text_models["xl"], tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"dataset": "digits", "caption_chunks": 3}))
    job = make_job(config_of(run, prompt=(LONG,)), "cpu")
    assert job.notes() == [] and job.null.text.shape == (1, 48, 64) and job.settings["caption_chunks"] == 3
    assert not torch.equal(job.draw(range(1)), make_job(config_of(text_models["xl"], prompt=(LONG,)), "cpu").draw(range(1)))
    (note,) = make_job(config_of(text_models["xl"], prompt=("a", "b", "c"), num_images=2), "cpu").notes()
    assert note == "the last 1 of 3 prompts have no image; --num_images 3 draws one of each"


def test_the_unet_computes_in_half_precision(text_models):
    exact, rounded = (make_job(config_of(text_models["xl"], dtype=dtype), "cpu") for dtype in ("float32", "bfloat16"))
    assert rounded.pipeline.unet.dtype == torch.bfloat16 and rounded.pipeline.vae.dtype == torch.float32
    apart = (exact.draw(range(4)).float() - rounded.draw(range(4)).float()).abs()
    assert 0 < apart.mean() < 25


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "prompt is missing"),
        (["--prompt", "a", "--class_labels", "3"], "class_labels is 3, but"),
        (["--prompt", "a", "--clipping", "static", "--allow_pickle_import"], "2 problems"),
        (["--prompt", "a", "--guidance_scale", "3", "--guidance_interval", "2", "5"], "guidance_interval is 2 5, but"),
        (["--prompt", "a", "--width", "100", "--height", "17"], "width is 100, but must be a multiple of 8; take 96"),
        (["--prompt", "a", "--width", "4"], "width is 4, but must be at least 8"),
        (["--prompt", "a", "--prompts", "x.txt"], "only one can say"),
        (["--prompts", "no-such.txt"], "no-such.txt cannot be read"),
        (["--prompt", "a", "--guidance_scale", "0.5"], "guidance above 1 only"),
        (["--prompt", "a", "--guidance_scale", "1", "--negative_prompt", "b"], "negative_prompt is given, but guidance_scale is 1.0"),
        (["--prompt", "a", "--scheduler", "flow_heun"], "the model is no rectified flow"),
        (["--prompt", "a", "--weights", "raw"], "has no checkpoints"),
        (["--prompt", "a", "--dtype", "float16"], "dtype is float16"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(text_models, tmp_path, capsys, flags, named):
    assert cli.sample([str(text_models["xl"]), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_newline_in_a_prompt_makes_no_other_prompts_the_same():
    assert prompts_hash(["a\nb"]) != prompts_hash(["a", "b"])


def test_files_of_prompts_without_prompts_and_of_other_encodings_are_refused(text_models, tmp_path):
    for content, named in ((b"\n \n", "has no prompts"), ("ä".encode("latin-1"), "is not UTF-8")):
        (tmp_path / "prompts.txt").write_bytes(content)
        with pytest.raises(InputError, match=named):
            model_folder.check_sampling(config_of(text_models["sd"], prompt=(), prompts=str(tmp_path / "prompts.txt")), text_models["sd"])


def test_flags_of_text_models_are_refused_for_pixel_models(trained, capsys):
    for flags in (["--prompt", "a"], ["--width", "16"], ["--negative_prompt", "b"], ["--prompts", "x.txt"]):
        assert cli.sample([str(trained), *flags]) == 2
        assert f"is a pixel model, and {flags[0][2:]} is for the other kind" in capsys.readouterr().err


def test_pixel_commands_refuse_text_models(text_models, capsys):
    assert cli.evaluate(["bpd", str(text_models["sd"]), "--reference", "digits"]) == 2
    assert "is a text-to-image model, but bpd is for pixel models; eval.py score and eval.py bias measure it" in capsys.readouterr().err


def test_texts_are_wrapped_and_cut():
    font = ImageFont.load_default(12)
    lines = images._wrapped("a  handwritten\nseven " + "x" * 50 + " end", font, 120)
    assert lines[0] == "a handwritten seven" and all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).count("x") == 50 and lines[-1].endswith("end")
    long = images._wrapped("word " * 100, font, 120)
    assert len(long) == images.TEXT_LINES and long[-1].endswith("...") and font.getlength(long[-1]) <= 120
    assert images._wrapped("", font, 120) == []


def test_a_grid_has_a_prompt_a_row_or_one_under_each_image():
    squares = [Image.new("RGB", (1000, 500), "black")] * 3
    under = images.captioned_grid(["a", "b " * 40, ""], squares)
    assert under.width == 2 * (256 + images.MARGIN) + images.MARGIN  # large images are reduced
    beside = images.captioned_rows(["a", "b"], [[Image.new("L", (8, 8))] * 5] * 2, 3)
    assert beside.width == images.TEXT_WIDTH + 3 * (64 + images.MARGIN) + 2 * images.MARGIN
    assert beside.height > 4 * 64  # two rows of each


UPLOAD = """
import sys
from huggingface_hub import HfApi
api, folder = HfApi(), sys.argv[1]
api.create_repo("alice/text")
api.upload_folder(repo_id="alice/text", folder_path=folder)
api.upload_file(path_or_fileobj=b"not weights", path_in_repo="model.safetensors", repo_id="alice/text")
"""


@pytest.mark.nightly
def test_a_text_model_of_the_hub_is_drawn_with_as_from_its_folder(text_models, tmp_path):
    flags = ["--prompt", *PROMPTS, "--steps", 2, "--num_images", 3, "--num_threads", 1]
    with served(tmp_path / "served", xet=False) as (_, worker):
        worker.script(UPLOAD, text_models["sd"])
        code, said = worker.run("sample", "alice/text", "--class_labels", 3, "--output_dir", tmp_path / "no")
        assert code == 2 and "class_labels is 3, but alice/text@" in said and "2 problems" in said
        code, said = worker.run("sample", "alice/text", *flags, "--output_dir", tmp_path / "drawn")
        assert code == 0, said
        assert not [path for path in (tmp_path / "served").rglob("model.safetensors") if path.parent.name not in ("text_encoder",)]
    folder = sample(config_of(text_models["sd"], tmp_path / "local", num_images=3))
    assert all((tmp_path / "drawn" / f"{k:06d}.png").read_bytes() == (folder / f"{k:06d}.png").read_bytes() for k in range(3))
    settings = json.loads((tmp_path / "drawn" / ".sampling.json").read_text())
    assert settings["model"].startswith("alice/text@") and settings["prompts_sha256"] == prompts_hash(PROMPTS)
