"""guided-diffusion's checkpoints: its outputs repeated, every kind of network there and back, and what is refused."""

import contextlib
import itertools
import json
import os
import re
import resource
import shutil
import time

import pytest
import torch
from conftest import GOLDEN, HANG, command, run
from diffusers import CMStochasticIterativeScheduler, DDPMPipeline, RePaintScheduler, UNet2DModel, UniPCMultistepScheduler
from safetensors.torch import load_file

from debias_diffusers import cli
from debias_diffusers.config.schema.network import ModelConfig
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.convert.guided_diffusion import export, guided, read_flags
from debias_diffusers.convert.state_dicts import Shape, from_guided, infer_shape, join_qkv, module_names, split_qkv, to_guided
from debias_diffusers.errors import CannotWriteError, InputError
from debias_diffusers.pipelines.pixel_pipeline import PixelPipeline, load_pipeline
from debias_diffusers.pipelines.solvers import exported_scheduler
from debias_diffusers.tasks.unet import build_unet, unet_config
from debias_diffusers.utils.files import temporary_path

NETWORKS = ("unet_paper_32", "unet_classcond_32")


def golden(name):
    folder = GOLDEN / name
    return folder / "model.pt", folder / "flags.json", load_file(folder / "io.safetensors")


def output(folder, io):
    with torch.no_grad():
        return load_pipeline(str(folder)).unet(io["x"], io["t"], io.get("y")).sample


@pytest.mark.parametrize("name", NETWORKS)
def test_a_converted_network_computes_what_the_reference_computes(name, tmp_path):
    model, flags, io = golden(name)
    guided(str(model), str(flags), str(tmp_path / "out"))
    assert (output(tmp_path / "out", io) - io["output"]).abs().max() < 1e-5
    pipeline = load_pipeline(str(tmp_path / "out"))
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert pipeline.scheduler.config.beta_schedule == "linear" and pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.num_classes == (10 if "classcond" in name else 0) and pipeline.config.null_label is None


def test_the_module_is_the_command():
    process = command("-m", "debias_diffusers.convert", "--help")
    assert "{guided,export,single,lora}" in process.communicate(timeout=HANG)[0] and process.returncode == 0


def test_the_command_converts_and_stock_diffusers_draws_with_the_result(tmp_path, capfd):
    model, flags, _ = golden("unet_paper_32")
    assert cli.convert(["guided", str(model), "--flags", str(flags), str(tmp_path / "out")]) == 0
    assert "1915590 parameters" in capfd.readouterr().err
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").rglob("*.*")} == {usual}
    pipeline = DDPMPipeline.from_pretrained(str(tmp_path / "out"))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=3, output_type="np").images.shape == (1, 32, 32, 3)
    code, _, err = run("sample.py", tmp_path / "out", "--num_images", 2, "--steps", 3, "--output_dir", tmp_path / "drawn")
    assert code == 0 and (tmp_path / "drawn" / "000001.png").is_file(), err


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_exported_is_what_was_converted_bit_for_bit(name, tmp_path):
    model, flags, _ = golden(name)
    guided(str(model), str(flags), str(tmp_path / "out"))
    export(str(tmp_path / "out"), str(tmp_path / "back.pt"))
    before, after = (torch.load(path, weights_only=True) for path in (model, tmp_path / "back.pt"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key].float(), after[key]) and before[key].shape == after[key].shape for key in before)
    said, told = json.loads(flags.read_text()), json.loads((tmp_path / "back.pt.flags.json").read_text())
    assert {key for key, value in told.items() if said[key] != value} == {"channel_mult"}
    assert told["channel_mult"] == "1,2,2,2"  # the usual of 32 pixels, which the reference writes as nothing


SIDES = {32: (1, 2, 2, 2), 64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4)}
VARIANTS = ({}, {"scale_shift": True, "learn_sigma": True}, {"classes": 5, "blocks": 2})
KINDS = list(itertools.product(SIDES.items(), (False, True), VARIANTS))


# Each size, each way and each variant; nightly all of them with each other.
ORDINARY = (4, 8, 9, 13, 18)


@pytest.mark.parametrize(
    "side_and_mult, updown, variant",
    [pytest.param(*kind, marks=() if number in ORDINARY else pytest.mark.nightly) for number, kind in enumerate(KINDS)],
)
def test_every_kind_of_network_goes_there_and_back(side_and_mult, updown, variant, tmp_path):
    torch.manual_seed(0)
    side, mult = side_and_mult
    config = ModelConfig(
        model_channels=32,
        channel_mult=mult,
        layers_per_block=variant.get("blocks", 1),
        attention_resolutions=(16, 8),
        attention_head_dim=16,
        resblock_updown=updown,
        resnet_time_scale_shift="scale_shift" if variant.get("scale_shift") else "default",
    )
    learn_sigma, classes = variant.get("learn_sigma", False), variant.get("classes", 0)
    unet = build_unet(unet_config(config, side, 3, classes, learn_sigma))
    scheduler = exported_scheduler(ObjectiveConfig(learn_sigma=learn_sigma, prediction_type="v_prediction", noise_schedule="cosine"))
    PixelPipeline(unet, scheduler).save_pretrained(tmp_path / "one")
    export(str(tmp_path / "one"), str(tmp_path / "theirs.pt"))
    guided(str(tmp_path / "theirs.pt"), str(tmp_path / "theirs.pt.flags.json"), str(tmp_path / "other"))
    again = load_pipeline(str(tmp_path / "other"))
    assert all(torch.equal(value, again.unet.state_dict()[key]) for key, value in unet.state_dict().items())
    kept = ("prediction_type", "beta_schedule", "variance_type", "num_train_timesteps")
    assert all(again.scheduler.config[key] == scheduler.config[key] for key in kept)
    assert again.unet.config.sample_size == side and again.num_classes == classes


def test_names_follow_the_levels_of_the_reference():
    """Two levels of one block, the second with attention, written out from the reference's constructor."""
    names = dict(module_names(Shape(widths=(32, 64), blocks=1, attends=(False, True), updown=False)))
    expected = {
        "conv_in": "input_blocks.0.0",
        "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
        "down_blocks.1.resnets.0.time_emb_proj": "input_blocks.3.0.emb_layers.1",
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.resnets.1.norm2": "middle_block.2.out_layers.0",
        "up_blocks.0.resnets.0.conv_shortcut": "output_blocks.0.0.skip_connection",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
        "up_blocks.1.resnets.1.conv2": "output_blocks.3.0.out_layers.3",
    }
    assert expected.items() <= names.items()
    assert "down_blocks.0.attentions.0" not in names and "up_blocks.1.upsamplers.0.conv" not in names


def reordered(state):
    """The same network with its attention weights in the other order."""
    result = dict(state)
    for key, value in state.items():
        if ".qkv." in key:
            result[key] = torch.cat(split_qkv(value, len(value) // 3 // 32, new_order=False))
    return result


def test_both_orders_of_attention_give_the_same_network(tmp_path):
    model, flags, io = golden("unet_paper_32")
    torch.save(reordered(torch.load(model, weights_only=True)), tmp_path / "new.pt")
    new = {**json.loads(flags.read_text()), "use_new_attention_order": True}
    (tmp_path / "new.json").write_text(json.dumps(new))
    guided(str(tmp_path / "new.pt"), str(tmp_path / "new.json"), str(tmp_path / "right"))
    assert (output(tmp_path / "right", io) - io["output"]).abs().max() < 1e-5
    guided(str(tmp_path / "new.pt"), str(flags), str(tmp_path / "wrong"))  # which nothing in the file can tell
    assert (output(tmp_path / "wrong", io) - io["output"]).abs().max() > 1e-3


def test_qkv_is_split_as_the_reference_computes_attention():
    """Its legacy attention views (3 C) as heads of [q, k, v]; the new one as [q, k, v] of heads."""
    heads, head_dim = 3, 4
    x = torch.randn(2, 3 * heads * head_dim, 5)
    q, k, v = x.reshape(2 * heads, 3 * head_dim, 5).split(head_dim, dim=1)  # as QKVAttentionLegacy does
    for part, expected in zip(split_qkv(x[0], heads, new_order=False), (q, k, v)):
        assert torch.equal(part, expected[:heads].reshape(heads * head_dim, 5))
    assert torch.equal(join_qkv(split_qkv(x[0], heads, new_order=False), heads), x[0])
    for part, expected in zip(split_qkv(x[0], heads, new_order=True), x[0].chunk(3)):
        assert torch.equal(part, expected)


def test_flags_are_read_as_they_were_typed(tmp_path):
    typed = "--image_size 256 --num_head_channels=64 --learn_sigma True --lr 2e-5 --channel_mult 1,2 --class_cond False"
    expected = {"image_size": 256, "num_head_channels": 64, "learn_sigma": True, "channel_mult": "1,2", "class_cond": False}
    assert read_flags(typed) == expected
    (tmp_path / "flags.json").write_text(json.dumps({**expected, "batch_size": 8}))
    assert read_flags(str(tmp_path / "flags.json")) == expected and read_flags("") == {}


@pytest.mark.parametrize(
    "typed, named",
    [
        ("--image_size", "pairs such as"),
        ("--image_size big", "image_size is 'big', but must be a whole number"),
        ("--learn_sigma perhaps", "learn_sigma is 'perhaps', but must be True or False"),
        ("missing.json", "cannot be read"),
        ('--image_size "32', "No closing quotation"),
        ("--use_new_atention_order True", "did you mean use_new_attention_order"),
        ("--image_size 32.5", "must be a whole number"),
        ("--image_size --5", "image_size is '--5', but must be a whole number"),
        (f"--image_size {'9' * 5000}", r"image_size is '9{59}, but must be a whole number of at most six digits"),
        ("--diffusion_steps 1000000000", "at most six digits"),
        ("-- 5", "pairs such as"),
        ("--noise cosine", "flag 'noise' is an abbreviation, of noise_schedule; write it in full"),
        ("--predict True", "an abbreviation, of predict_xstart or predict_v"),
    ],
)
def test_wrong_flags_are_named(typed, named):
    with pytest.raises(InputError, match=named):
        read_flags(typed)


@pytest.mark.parametrize(
    "content, named",
    [
        ('{"image_size": "--5"}', "image_size is '--5', but must be a whole number"),
        ("[" * 200_000, "cannot be read"),
        ('{"noise": "cosine"}', "an abbreviation, of noise_schedule"),
    ],
)
def test_wrong_files_of_flags_are_named(content, named, tmp_path):
    (tmp_path / "flags.json").write_text(content)
    with pytest.raises(InputError, match=named):
        read_flags(str(tmp_path / "flags.json"))


def test_booleans_are_read_as_the_reference_reads_them():
    for texts, value in ((("yes", "TRUE", "t", "Y", "1"), True), (("no", "False", "F", "n", "0"), False)):
        for text in texts:
            assert read_flags(f"--learn_sigma {text}") == {"learn_sigma": value}


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_channels": 64}, "num_channels is 64, but the weights tell 32; correct it"),
        ({"image_size": 64}, r"channel_mult is \[1, 2, 3, 4\] at image_size 64, but the weights tell \[1, 2, 2, 2\]; correct one"),
        ({"learn_sigma": False}, "learn_sigma is False"),
        ({"class_cond": True}, "class_cond is True"),
        ({"use_scale_shift_norm": False}, "use_scale_shift_norm is False"),
        ({"resblock_updown": False}, "resblock_updown is False"),
        ({"attention_resolutions": "8"}, r"attention_resolutions is \[8\] at image_size 32, but the weights tell \[16\]"),
        ({"num_res_blocks": 2}, "num_res_blocks is 2"),
        ({"num_head_channels": 48}, r"num_head_channels is 48, but attention has \[64\] channels"),
        ({"noise_schedule": "sqrt"}, "noise_schedule is 'sqrt', but the reference has linear and cosine only"),
        ({"rescale_timesteps": True, "diffusion_steps": 4000}, "1000 t / T"),
        ({"num_head_channels": -1, "num_heads_upsample": 2}, "heads differ in width"),
        ({"num_head_channels": -1, "num_heads": 0}, r"num_head_channels \(or num_heads\) is missing"),
        ({"image_size": -32}, "image_size is missing"),
        ({"image_size": 33}, "image_size is 33, but its 4 levels halve images 3 times; 32 would fit"),
        ({"image_size": 4, "channel_mult": "1,2,2,2"}, "image_size is 4, but its 4 levels halve images 3 times; 8 would fit"),
        ({"attention_resolutions": "16,0"}, "no level has 0 pixels"),
        ({"attention_resolutions": "16.5"}, "must be whole numbers with commas"),
        ({"attention_resolutions": "24"}, r"attention_resolutions is \[32\] at image_size 32"),
        ({"channel_mult": "9" * 5000}, "must be whole numbers with commas"),
        ({"diffusion_steps": 0}, "num_train_timesteps is 0"),
        ({"diffusion_steps": 10}, "take at least 21"),
        ({"predict_xstart": True, "predict_v": True}, "both True"),
    ],
)
def test_weights_and_flags_that_differ_are_refused(change, named, tmp_path):
    model, flags, _ = golden("unet_paper_32")
    (tmp_path / "flags.json").write_text(json.dumps({**json.loads(flags.read_text()), **change}))
    with pytest.raises(InputError, match=named):
        guided(str(model), str(tmp_path / "flags.json"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_head_count_is_taken_where_all_attention_has_one_width(tmp_path):
    model, flags, io = golden("unet_paper_32")
    counted = {**json.loads(flags.read_text()), "num_head_channels": -1, "num_heads": 2}  # 64 channels, 32 each
    (tmp_path / "flags.json").write_text(json.dumps(counted))
    guided(str(model), str(tmp_path / "flags.json"), str(tmp_path / "out"))
    assert (output(tmp_path / "out", io) - io["output"]).abs().max() < 1e-5


def weights_of(side, mult, head_dim=16, **changes):
    config = ModelConfig(
        model_channels=32, channel_mult=mult, layers_per_block=1, attention_resolutions=(16, 8), attention_head_dim=head_dim
    )
    unet = build_unet(unet_config(config, side, 3, 0, False))
    shape = Shape(
        widths=tuple(32 * m for m in mult), blocks=1, attends=tuple(side // 2**k in (16, 8) for k in range(len(mult))), updown=False
    )
    return to_guided(unet.state_dict(), shape, head_dim) | changes, shape


def test_what_unet2dmodel_cannot_express_is_refused_with_the_reason(tmp_path):
    wide, _ = weights_of(64, (1, 2, 3, 4))
    torch.save(wide, tmp_path / "heads.pt")
    with pytest.raises(InputError, match=r"4 heads .* attention layers of \[96, 128\] channels, so heads differ"):
        guided(str(tmp_path / "heads.pt"), "--image_size 64 --num_heads 4", str(tmp_path / "out"))
    torch.save(wide | {"time_embed.0.weight": torch.zeros(128, 64)}, tmp_path / "512.pt")
    with pytest.raises(InputError, match="time embedding starts from 64 channels and its first level from 32, as in the networks for 512"):
        guided(str(tmp_path / "512.pt"), "--image_size 64 --num_head_channels 16", str(tmp_path / "out"))
    torch.save(wide | {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, tmp_path / "super.pt")
    with pytest.raises(InputError, match="from 6 to 3 channels"):
        guided(str(tmp_path / "super.pt"), "--image_size 64 --num_head_channels 16", str(tmp_path / "out"))


def test_the_weights_tell_their_shape():
    state, shape = weights_of(64, (1, 2, 3, 4))
    assert infer_shape(state) == shape
    assert set(from_guided(state, shape, 16, False)) == set(names_of(64, (1, 2, 3, 4)))


def names_of(side, mult):
    config = ModelConfig(model_channels=32, channel_mult=mult, layers_per_block=1, attention_resolutions=(16, 8), attention_head_dim=16)
    return build_unet(unet_config(config, side, 3, 0, False)).state_dict()


@pytest.mark.parametrize(
    "content, named",
    [
        ({"step": 3}, "holds no state dict"),
        ([torch.zeros(1)], "holds no state dict"),
        ({"conv.weight": torch.zeros(1)}, r"model\.pt holds no UNet of guided-diffusion: it has no output_blocks"),
        ({"output_blocks.0.0.x": torch.zeros(1)}, "UNet of guided-diffusion"),
    ],
)
def test_other_files_are_refused(content, named, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=named):
        guided(str(tmp_path / "model.pt"), "--image_size 32 --num_heads 2", str(tmp_path / "out"))


def test_a_damaged_file_is_refused_with_one_sentence(tmp_path, recwarn):
    model, flags, _ = golden("unet_paper_32")
    whole = model.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x80\x04no", whole[:-1]):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"model\.pt cannot be read as a file of weights"):
            guided(str(tmp_path / "model.pt"), str(flags), str(tmp_path / "out"))
    assert not recwarn.list
    state = torch.load(model, weights_only=True)
    for missing, named in (("middle_block.1.norm.bias",) * 2, ("out.2.bias",) * 2, ("out.0.weight", "conv_norm_out.weight")):
        torch.save({key: value for key, value in state.items() if key != missing}, tmp_path / "model.pt")
        with pytest.raises(InputError, match=re.escape(named)):
            guided(str(tmp_path / "model.pt"), str(flags), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "key, value",
    [
        (3, torch.zeros(1)),
        ("output_blocks.x.0", torch.zeros(1)),
        ("out.2.bias", torch.tensor(1.0)),
        ("time_embed.0.weight", torch.zeros(3)),
        ("input_blocks.3.1.qkv.weight", torch.zeros(100, 64, 1)),
        ("input_blocks.1.0.out_layers.3.bias", torch.zeros(0)),
        ("conv.weight", torch.zeros(1)),
        ("out.0.weight", torch.full((32,), torch.nan)),
        ("out.0.bias", torch.zeros(32, dtype=torch.int8)),
        ("out.0.bias", torch.zeros(32, dtype=torch.bool)),
        ("out.0.bias", torch.zeros(32, dtype=torch.complex64)),
        ("out.0.bias", torch.zeros(32, dtype=torch.int64)),
        ("out.0.bias", torch.zeros(32, dtype=torch.float64)),
        ("conv_in.weight", torch.zeros(32, 3, 3, 3)),  # the name that UNet2DModel has for another of its weights
    ],
)
def test_weights_in_odd_shapes_are_refused_with_one_sentence(key, value, tmp_path):
    model, flags, _ = golden("unet_paper_32")
    torch.save({**torch.load(model, weights_only=True), key: value}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt") as error:
        guided(str(tmp_path / "model.pt"), str(flags), str(tmp_path / "out"))
    if value.dtype != torch.float32:
        assert f"{key} is {value.dtype}, but weights must be float32" in str(error.value)
    if key == "conv_in.weight":
        assert "conv_in.weight is no weight of the network" in str(error.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".draft*"))


@pytest.mark.parametrize(
    "change",
    [{"channel_mult": "1, 2, 2,2"}, {"channel_mult": [1, 2, 2, 2]}, {"attention_resolutions": "64, 16"}, {"attention_resolutions": "12"}],
)
def test_lists_are_read_however_they_are_spelled(change, tmp_path):
    model, flags, _ = golden("unet_paper_32")
    (tmp_path / "flags.json").write_text(json.dumps({**json.loads(flags.read_text()), **change}))
    guided(str(model), str(tmp_path / "flags.json"), str(tmp_path / "out"))
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_what_weights_do_not_tell_must_be_said_and_what_was_assumed_is(tmp_path, capfd):
    model, _, io = golden("unet_paper_32")
    with pytest.raises(InputError, match="2 problems"):
        guided(str(model), "--learn_sigma True", str(tmp_path / "out"))
    from debias_diffusers.cli import convert

    typed = "--image_size 32 --num-head-channels 32"
    assert convert(["guided", str(model), "--flags", typed, str(tmp_path / "out")]) == 0
    assert "assumed, as the reference does where flags are left out: use_new_attention_order False" in capfd.readouterr().err
    assert (output(tmp_path / "out", io) - io["output"]).abs().max() < 1e-5
    export(str(tmp_path / "out"), str(tmp_path / "back.pt"))
    with pytest.raises(InputError, match="already exists"):
        export(str(tmp_path / "out"), str(tmp_path / "back.pt"))


@contextlib.contextmanager
def small_disk(limit):
    """No file may grow beyond so many bytes, which fails like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    (tmp_path / "empty").mkdir()
    for name in ("out", "empty"):
        with small_disk(20_000), pytest.raises(CannotWriteError, match=f"{name} cannot be written"):
            guided(str(model), str(flags), str(tmp_path / name))
    assert not (tmp_path / "out").exists() and not list((tmp_path / "empty").iterdir())
    guided(str(model), str(flags), str(tmp_path / "out"))
    with small_disk(20_000), pytest.raises(CannotWriteError, match=r"back\.pt cannot be written"):
        export(str(tmp_path / "out"), str(tmp_path / "back.pt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


def test_a_flipped_bit_among_the_weights_is_found_and_a_file_without_checksums_is_taken(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.pt cannot be read .* does not match its checksum"):
        guided(str(tmp_path / "model.pt"), str(flags), str(tmp_path / "out"))
    state = torch.load(model, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    guided(str(tmp_path / "model.pt"), str(flags), str(tmp_path / "out"))


def test_the_names_of_a_wrapper_are_said(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    torch.save({f"module.{key}": value for key, value in torch.load(model, weights_only=True).items()}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model\.pt holds no UNet .* its names begin with module\. as those of a wrapper"):
        guided(str(tmp_path / "model.pt"), str(flags), str(tmp_path / "out"))


def test_a_name_that_cannot_be_written_to_is_one_sentence(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out, named in ((str(tmp_path / "loop"), "cannot be a folder"), ("nul\0", "cannot be a folder"), ("", "is empty")):
        with pytest.raises(InputError, match=named):
            guided(str(model), str(flags), out)
    for out, named in ((str(tmp_path / "loop"), "already exists"), ("nul\0", "zero byte"), ("", "is empty")):
        with pytest.raises(InputError, match=named):
            export("none", out)


@pytest.mark.parametrize("model", ["", "/dev/null"])
def test_a_reason_is_never_empty(model, tmp_path):
    with pytest.raises(InputError, match=r"(the empty name|/dev/null) cannot be read as a file of weights: \S+"):
        guided(model, "--image_size 32 --num_heads 2", str(tmp_path / "out"))


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    (tmp_path / "out").mkdir(mode=0o700)
    (tmp_path / "out" / ".draft-pipeline").write_text("left by a conversion that was killed")
    before = (tmp_path / "out").stat()
    guided(str(model), str(flags), str(tmp_path / "out"))
    after = (tmp_path / "out").stat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model_index.json", "unet", "scheduler"}


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_a_killed_conversion_left_is_removed_and_not_written_through(kind, tmp_path):
    model, flags, _ = golden("unet_paper_32")
    (tmp_path / "elsewhere").mkdir()
    days_ago = time.time() - 3 * 86400
    young, theirs = temporary_path(tmp_path / "out"), tmp_path / ".draft-of-a-letter"
    for draft in (temporary_path(tmp_path / "out"), temporary_path(tmp_path / "back.pt"), theirs, young):
        {"file": draft.touch, "link": lambda d=draft: d.symlink_to(tmp_path / "elsewhere"), "folder": draft.mkdir}[kind]()
        os.utime(draft, (days_ago, days_ago) if draft != young else None, follow_symlinks=False)
    guided(str(model), str(flags), str(tmp_path / "out"))
    export(str(tmp_path / "out"), str(tmp_path / "back.pt"))
    assert load_pipeline(str(tmp_path / "out")) and (tmp_path / "back.pt").is_file()
    assert set(tmp_path.glob(".draft*")) == {young, theirs}  # of a process that may still write, and of somebody else
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="already exists"):
        guided(str(model), str(flags), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_what_the_reference_does_not_have_is_not_exported(tmp_path, trained):
    with pytest.raises(InputError, match=r"1 channel\(s\)") as error:
        export(str(trained), str(tmp_path / "out.pt"))
    assert "32 groups" in str(error.value) and not (tmp_path / "out.pt").exists()
    model, flags, _ = golden("unet_paper_32")
    guided(str(model), str(flags), str(tmp_path / "out"))
    for objective, named in (
        (ObjectiveConfig(schedule_shift=4.0), "neither linear nor cosine"),
        (ObjectiveConfig(prediction_type="flow"), "rectified flow"),
    ):
        pipeline = load_pipeline(str(tmp_path / "out"))
        pipeline.scheduler = exported_scheduler(objective)
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        pipeline.save_pretrained(tmp_path / "other")
        with pytest.raises(InputError, match=named):
            export(str(tmp_path / "other"), str(tmp_path / "other.pt"))


def edited(folder, part, **changes):
    """A pipeline folder with some fields of its network's or its scheduler's configuration changed."""
    path = next((folder / part).glob("*config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "part, changes, named",
    [
        ("unet", {"attention_head_dim": 0}, "cannot be loaded: .*zero"),
        ("unet", {"sample_size": 33}, "image_size is 33, but its 4 levels halve images 3 times"),
        ("unet", {"sample_size": 0}, "image_size is 0"),
        ("unet", {"sample_size": -8}, "image_size is -8"),
        ("scheduler", {"num_train_timesteps": 0}, "num_train_timesteps 0, but must have at least 2"),
        ("scheduler", {"num_train_timesteps": 1}, "num_train_timesteps 1, but must have at least 2"),
        ("scheduler", {"trained_betas": []}, "no list of numbers from 0 to 1"),
        ("scheduler", {"trained_betas": [2, 3]}, "no list of numbers from 0 to 1"),
        ("scheduler", {"trained_betas": [0.1, 0.2]}, "neither linear nor cosine"),
        ("scheduler", {"prediction_type": "unheard_of"}, "prediction_type unheard_of, but the reference predicts"),
    ],
)
def test_odd_configurations_are_not_exported(part, changes, named, tmp_path):
    model, flags, _ = golden("unet_paper_32")
    guided(str(model), str(flags), str(tmp_path / "out"))
    with pytest.raises(InputError, match=named):
        export(str(edited(tmp_path / "out", part, **changes)), str(tmp_path / "back.pt"))
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize(
    "scheduler, named",
    [
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "prediction_type flow_prediction"),
        (CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler has prediction_type None"),
        (RePaintScheduler(), "RePaintScheduler has prediction_type None"),
    ],
)
def test_a_target_that_the_reference_does_not_have_is_not_exported(scheduler, named, tmp_path):
    model, flags, _ = golden("unet_paper_32")
    guided(str(model), str(flags), str(tmp_path / "out"))
    pipeline = load_pipeline(str(tmp_path / "out"))
    PixelPipeline(pipeline.unet, scheduler).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=named):
        export(str(tmp_path / "other"), str(tmp_path / "back.pt"))


def test_heads_that_do_not_divide_the_channels_are_not_exported(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    guided(str(model), str(flags), str(tmp_path / "out"))
    pipeline = load_pipeline(str(tmp_path / "out"))
    unet = UNet2DModel.from_config({**pipeline.unet.config, "attention_head_dim": 48})
    PixelPipeline(unet, pipeline.scheduler).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"attention heads have 48 channels, which do not divide \[64\]"):
        export(str(tmp_path / "other"), str(tmp_path / "back.pt"))


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    model, flags, _ = golden("unet_paper_32")
    guided(str(model), str(flags), str(tmp_path / "out"))
    pipeline = load_pipeline(str(tmp_path / "out"))
    torch.nn.init.constant_(pipeline.unet.conv_in.bias, torch.nan)
    pipeline.save_pretrained(tmp_path / "spoilt")
    with pytest.raises(InputError, match=r"spoilt has weights that are not finite, such as conv_in\.bias"):
        export(str(tmp_path / "spoilt"), str(tmp_path / "back.pt"))
    assert not list(tmp_path.glob("back*"))


@pytest.mark.parametrize("target, warned", [("--predict_xstart True", True), ("--predict_v True", False), ("", False)])
def test_a_target_that_the_weights_cannot_tell_is_to_be_checked(target, warned, tmp_path, capfd):
    model, _, _ = golden("unet_paper_32")
    guided(str(model), f"--image_size 32 --num_head_channels 32 {target}", str(tmp_path / "out"))
    assert ("flag predict_xstart is True: check" in capfd.readouterr().err) is warned


@pytest.mark.parametrize(
    "argv, named",
    [
        (["guide"], "guided, export, single, lora"),
        (["guided", "x.pt"], "out is missing: output folder of the pipeline"),
        (["export", "none", "o.pt"], "none"),
    ],
)
def test_a_wrong_command_is_one_sentence(argv, named, capfd):
    from debias_diffusers.cli import convert

    assert convert(argv) == 2 and named in capfd.readouterr().err
