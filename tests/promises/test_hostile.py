"""Files that somebody made to do harm: nothing in them runs, none of them ends in a traceback, and nothing leaves its folder."""

import builtins
import functools
import importlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import tarfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from conftest import TINY, run, train_args
from PIL import Image as Picture

from debias_diffusers import cli
from debias_diffusers.config.loading import layered, read_config, update
from debias_diffusers.errors import DebiasError, InputError
from debias_diffusers.evaluation import feature_extractors
from debias_diffusers.evaluation.feature_extractors import Extractor
from debias_diffusers.hub.model_card import model_card
from debias_diffusers.pipelines.pixel_pipeline import load_pipeline
from debias_diffusers.runs import checkpoints

# ---- weights that are programs ---------------------------------------------------------------------------------------


class Calls:
    """What is unpickled as the call of a function, which may be what another call returns."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Never; but what pickle is told to call must be something that can be called."""


class Remembers(torch.nn.Module):
    """A program of TorchScript that makes a file when it is loaded."""

    def __init__(self, mark: str):
        super().__init__()
        self.mark = mark
        self.kept = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self):
        return self.mark, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.mark = state[0]
        self.training = state[1]
        self.kept = torch.zeros(1)
        torch.save(self.kept, self.mark)

    def forward(self, x):
        return x


def in_zip(content):
    return lambda path: torch.save(content, path)


def as_legacy(content):
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=False)


def as_plain(content, protocol):
    return lambda path: path.write_bytes(pickle.dumps(content, protocol))


def as_tar(content):
    """The first format of torch, in which a tar holds the parts."""

    def write(path):
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                data = pickle.dumps(content if name == "storages" else {} if name == "sys_info" else 0)
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))

    return write


def hostile_files(mark):
    """Ways to write a file that makes the file `mark` when it is read without care."""
    touch, source = f"touch {mark}", f"open({str(mark)!r}, 'w').close()"
    bomb = Calls(os.system, touch)
    tensor = torch.zeros(2)
    array = np.empty(1, dtype=object)
    array[0] = bomb
    module = torch.nn.Linear(2, 2)
    module.register_buffer("bomb", None)
    module.note = bomb
    deep = bomb
    for _ in range(20):
        deep = OrderedDict({"state_dict": [deep, tensor]})
    storage = tensor.untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    return {
        "os.system": in_zip({"weight": bomb}),
        "exec": in_zip({"weight": Calls(exec, source)}),
        "eval": in_zip({"weight": Calls(eval, source)}),
        "subprocess": in_zip({"weight": Calls(subprocess.call, ["touch", str(mark)])}),
        "nested": in_zip({"weight": tensor, "more": deep}),
        "as a key": in_zip({Calls(os.system, touch): tensor}),
        "numpy's objects": in_zip({"weight": array}),
        "numpy's dtype": in_zip({"weight": Calls(np.dtype, Calls(eval, f"[{source}, 'f4'][1]"))}),
        "hooks of a tensor": in_zip({"weight": Calls(torch._utils._rebuild_tensor_v2, typed, 0, (2,), (1,), False, bomb)}),
        "a module": in_zip(module),
        "getattr": in_zip({"weight": Calls(Calls(getattr, Calls(importlib.import_module, "os"), "system"), touch)}),
        "partial": in_zip({"weight": Calls(functools.partial(os.system, touch))}),
        "torch's own": in_zip({"weight": Calls(torch.serialization.pickle.loads, pickle.dumps(bomb))}),
        "setstate": in_zip({"weight": Calls(map, os.system, [touch]), "list": Calls(list, Calls(map, os.system, [touch]))}),
        "legacy": as_legacy({"weight": bomb}),
        "protocol 0": as_plain({"weight": bomb}, 0),
        "protocol 4": as_plain({"weight": bomb}, 4),
        "tar": as_tar(bomb),
        "TorchScript": lambda path: torch.jit.save(torch.jit.script(Remembers(str(mark))), str(path)),
    }


HOSTILE = list(hostile_files(Path("mark")))


def read_without_care(path):
    """What every door would do if it did not refuse: the proof that the file does harm."""
    try:
        torch.load(path, weights_only=False)
    except Exception:
        builtins.print("it need not end well")


def doors(path, folder):
    """Every command that reads such a file."""
    target = ["--resolution", "8", "--num_threads", "1", "--cache_dir", ""]
    for extractor in ("inception-v3-compat", "vgg16", "clip-vit-b-32"):
        flags = ["--feature_extractor", extractor, "--feature_extractor_weights", str(path), "--metrics", "fid", *target]
        yield cli.evaluate, ["stats", "digits", str(folder / "stats.safetensors"), *flags]
    yield cli.convert, ["guided", str(path), str(folder / "out"), "--flags", "--image_size 32 --num_heads 2"]


@pytest.mark.row(38, "a file of weights that contains code is an error for every command, and the code does not run")
@pytest.mark.parametrize("forced", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_file_that_runs_when_read_does_not_run_here(kind, forced, tmp_path, monkeypatch, capfd, trials):
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    hostile_files(mark)[kind](path)
    read_without_care(path)
    assert mark.exists(), "the file does no harm, so that the test shows nothing"
    mark.unlink()
    capfd.readouterr()
    for command, arguments in doors(path, tmp_path):
        trials()
        assert command(arguments) == 2, arguments
        said = capfd.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith("error: ") and "model.pt" in said[0], said
        assert any(advice in said[0] for advice in ("state dict", "they are fetched", "copy it once more", "another kind")), said
        assert not mark.exists(), arguments
    assert kind != "os.system" or "it holds more than tensors (posix.system)" in said[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt"]


@pytest.mark.row(38, "a file of weights that contains code is an error for every command, and the code does not run")
def test_a_name_that_promises_safetensors_changes_nothing(tmp_path):
    path, mark = tmp_path / "weights.safetensors", tmp_path / "mark"
    hostile_files(mark)["os.system"](path)
    for extractor in ("inception-v3-compat", "digits"):
        with pytest.raises(InputError, match=r"weights\.safetensors"):
            Extractor(extractor, ["fid"], str(path))
    assert not mark.exists()


# ---- what was fetched or kept before ---------------------------------------------------------------------------------


@pytest.mark.row(41, "code in the caches of torch and torch-fidelity does not run")
@pytest.mark.parametrize("extractor", ["inception-v3-compat", pytest.param("vgg16", marks=pytest.mark.nightly), "clip-vit-b-32"])
def test_a_poisoned_file_in_the_place_of_fetched_weights_does_not_run(extractor, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    sha256 = feature_extractors.MODEL_METADATA["clip-vit-b-32"]["hash"]
    kept, mark = tmp_path / "hub" / "checkpoints", tmp_path / "mark"
    kept.mkdir(parents=True)
    for name in ("weights-inception-2015-12-05-6726825d.pth", "vgg16-397923af.pth", f"clip-vit-b-32-{sha256}.pt"):
        hostile_files(mark)["os.system"](kept / name)
    with pytest.raises(InputError, match=r"cannot be fetched|is not the file of clip"):
        Extractor(extractor, ["fid"])
    assert not mark.exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.row(41, "code in the caches of torch and torch-fidelity does not run")
def test_the_features_that_torch_fidelity_keeps_are_neither_read_nor_written(tmp_path, monkeypatch, trials):
    """Its cache is full of hostile files under every name that it would give to a set of features or statistics."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    mark, names = tmp_path / "mark", set()
    images = tmp_path / "images"
    images.mkdir()
    for grey in range(12):
        Picture.new("L", (8, 8), 20 * grey).save(images / f"{grey}.png")
    hostile_files(mark)["os.system"](tmp_path / "hostile.pt")
    for cache in (tmp_path / "torch" / "fidelity_cache", tmp_path / "xdg" / "torch" / "fidelity_cache"):
        cache.mkdir(parents=True)
        for of in ("digits", str(images), images.name):
            for layer in ("features", "features-features", "stat-fid-digits-features", "features-logits"):
                for item in (f"{of}-{layer}", f"{of}-digits-{layer}", f"{of}-{layer}-digits"):
                    path = cache / f"{item.replace('/', '_')}.pt"
                    shutil.copy(tmp_path / "hostile.pt", path)
                    names.add(path)
    before = {path: path.stat().st_mtime_ns for path in names}
    opened = []
    original = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *args, **kwargs: (opened.append(str(file)), original(file, *args, **kwargs))[1])
    flags = ["--reference", "digits", "--metrics", "fid,prc,is,colour", "--allow_few_images", "--num_threads", "1"]
    assert cli.evaluate(["score", str(images), *flags, "--cache_dir", str(tmp_path / "own")]) == 0
    for path in names:
        trials()
        assert str(path) not in opened
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*fidelity_cache/*.pt")} == before
    assert not mark.exists() and {path.suffix for path in (tmp_path / "own").iterdir()} == {".safetensors"}


@pytest.mark.row(41, "code in the caches of torch and torch-fidelity does not run")
def test_a_poisoned_file_among_our_own_features_is_computed_anew(tmp_path):
    flags = ["stats", "digits", str(tmp_path / "stats.safetensors"), "--metrics", "fid", "--resolution", "8", "--num_threads", "1"]
    assert cli.evaluate([*flags, "--cache_dir", str(tmp_path / "own")]) == 0
    (kept,) = (tmp_path / "own").iterdir()
    sound, statistics = kept.read_bytes(), safetensors.torch.load_file(tmp_path / "stats.safetensors")
    hostile_files(tmp_path / "mark")["os.system"](kept)
    assert cli.evaluate([*flags, "--cache_dir", str(tmp_path / "own")]) == 0
    assert not (tmp_path / "mark").exists() and kept.read_bytes() == sound
    again = safetensors.torch.load_file(tmp_path / "stats.safetensors")
    assert again.keys() == statistics.keys() and all(torch.equal(again[name], statistics[name]) for name in again)


# ---- files that are not as they were written -------------------------------------------------------------------------

TOKENS = [
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"9" * 30,
    b"true",
    b'"../../x"',
    b'"\\u0000"',
    b"[" * 3000,
    b"9" * 5000,
]


def mutated(content, chance):
    """Bits, bytes, lengths, or a value of JSON in the place of another."""
    data, kind = bytearray(content), chance.randrange(7)
    place = chance.randrange(len(data))
    if kind == 0:
        for _ in range(chance.randrange(1, 17)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        del data[place:]
    elif kind == 2:
        data[place:place] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
    elif kind == 3:
        del data[place : place + chance.randrange(1, 60)]
    elif kind == 4:
        data[place:place] = data[place // 2 : place]
    elif kind == 5:
        data[:8] = chance.choice([0, 2**63, 2**64 - 1, len(data), 10**9]).to_bytes(8, "little")  # the length of safetensors' header
    else:
        ends = [k for k, byte in enumerate(data[:5000]) if byte in b":,[{"]
        if ends:
            first = chance.choice(ends) + 1
            last = next((k for k in range(first, len(data)) if data[k] in b",]}\n"), first)
            data[first:last] = chance.choice(TOKENS)
    return bytes(data)


def read_model(folder):
    load_pipeline(str(folder))


def read_checkpoint(folder):
    checkpoints.latest_valid(folder / "checkpoints")


def read_configuration(folder):
    read_config(str(folder / "config.json"))


LAST = "checkpoints/step-00000024/"
FILES = {
    "model_index.json": read_model,
    "unet/config.json": read_model,
    "scheduler/scheduler_config.json": read_model,
    "unet/diffusion_pytorch_model.safetensors": read_model,
    LAST + "model.safetensors": read_checkpoint,
    LAST + "manifest.json": read_checkpoint,
    LAST + "state.json": read_checkpoint,
    "config.json": read_configuration,
}


@pytest.mark.row(39, "a mutated file gives a clear error, quickly and without much memory")
@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_refused_or_read_but_ends_in_no_other_error(name, count, trained, tmp_path, trials):
    folder, chance = tmp_path / "run", random.Random(f"{name} {count}")
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000018")
    content, refused = (trained / name).read_bytes(), 0
    FILES[name](folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        trials()
        (folder / name).write_bytes(mutated(content, chance))
        began = time.process_time()
        try:
            FILES[name](folder)
        except DebiasError as error:
            refused += 1
            assert len(str(error)) < 2000, (number, str(error)[:2000])
        assert time.process_time() - began <= 2, number
    assert refused >= count // 3  # some changes, of a number in a configuration, are another sound file
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    assert grown <= 1e9


@pytest.mark.row(39, "a mutated file gives a clear error, quickly and without much memory")
def test_what_is_nested_or_repeated_without_end_is_refused(trained, tmp_path, trials):
    depth = 20_000  # more than any Python reads
    deep = "[" * depth + "]" * depth
    many = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)
    )  # 9^12 words, if they were written out
    folder = tmp_path / "run"
    for name, text in (("deep.json", deep), ("deep.yaml", deep), ("many.yaml", many + "seed: *a11\nema_decay: *a11\n")):
        trials()
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
            read_config(str(tmp_path / name))
        assert len(str(error.value)) < 5000
    for name, read in FILES.items():
        if name.endswith(".json"):
            trials()
            shutil.copytree(trained, folder)
            shutil.rmtree(folder / "checkpoints" / "step-00000018")
            (folder / name).write_text('{"a":' * depth + "1" + "}" * depth)
            with pytest.raises(DebiasError):
                read(folder)
            shutil.rmtree(folder)
    (tmp_path / "unet.json").write_text(deep)
    code, _, err = run(*train_args(folder, "--model_config", tmp_path / "unet.json"))
    assert code == 2 and "Traceback" not in err and "unet.json cannot be read" in err


# ---- names and texts -------------------------------------------------------------------------------------------------

# As the Hub finds it (huggingface_hub.repocard).
FRONT_MATTER = re.compile(r"^(\s*---[\r\n]+)([\S\s]*?)([\r\n]+---(\r\n|\n|$))")
TEXTS = [
    "faces\n---\nlicense: mit\n---\n# Another card",
    "faces\r\n## Configuration\r\n| seed | 7 |",
    "faces | 1 |\n| seed | 7",
    "<script>alert(1)</script>",
    "![x](https://example.com/pixel.png)",
    "[click](javascript:alert(1))",
    "`` ` ``` </td></table>",
    "faces\u2028| seed | 7 |\u2029\x0b\x0c\x1b[31m\u202egnp.secaf",
    "a\\",
    "\\|",
    "../../x",
    "!!python/object/apply:os.system ['true']",
    "${HOME} {{ 7 * 7 }} %s {0}",
    "\udcff of bytes that are no text",
]


def front_matter(weighting):
    """What the Hub reads of a card without figures, of data that are not on the Hub."""
    tags = ["debias_diffusers", weighting, "epsilon"]
    return {"license": "unknown", "library_name": "diffusers", "pipeline_tag": "unconditional-image-generation", "tags": tags}


def plain_cell(line):
    """The two cells of a row of the card; the second as it is shown, without its marks of code."""
    cells = [cell.replace("\0", "|") for cell in line.replace("\\|", "\0").split("|")]
    assert len(cells) == 4 and cells[0] == cells[3] == "", line
    return cells[1].strip(), cells[2].strip()


@pytest.mark.row(42, "hostile names stay text in the model card and inside their folder on the disk")
@pytest.mark.parametrize("field", ["dataset", "split", "image_column", "init", "model_config", "eval_metrics"])
def test_a_hostile_text_is_shown_as_text_in_the_card(field, trials):
    sound = update(layered(read_config(str(TINY))), {"output_dir": "x"})
    usual = model_card(update(sound, {field: "name"}), 5, 0)
    for text in TEXTS:
        trials()
        card = model_card(update(sound, {field: text}), 5, 0)
        card.encode()
        lines, expected = card.split("\n"), usual.split("\n")
        assert card.splitlines() == lines[:-1] and len(lines) == len(expected)
        changed = [line for line, other in zip(lines, expected) if line != other]
        (row,) = (line for line in changed if line.startswith("|"))
        name, shown = plain_cell(row)
        assert name == field and shown[0] == shown[-1] == "`" and "`" not in shown[1:-1]
        assert all(line.isprintable() for line in changed)
        for sentence in (line for line in changed if line != row):
            assert shown in sentence and sentence.count("`") % 2 == 0
        assert yaml.safe_load(card.split("---\n")[1]) == front_matter("debiased")


@pytest.mark.row(42, "hostile names stay text in the model card and inside their folder on the disk")
def test_a_hostile_name_of_a_weighting_of_ones_own_stays_within_the_front_matter_and_its_code(trials):
    sound = update(layered(read_config(str(TINY))), {"output_dir": "x"})
    for text in TEXTS[:-1]:
        trials()
        card = model_card(update(sound, {"weighting": text}), 5, 0)
        front = FRONT_MATTER.match(card)
        assert yaml.safe_load(front[2]) == front_matter(text)
        (sentence,) = (line for line in card[front.end() :].splitlines() if "is weighted with" in line)
        assert sentence.count("`") == 2 and sentence.isprintable()


@pytest.mark.row(42, "hostile names stay text in the model card and inside their folder on the disk")
@pytest.mark.parametrize("name", ["../../x", "/etc/hostname", "..", ".", "", "a/b", "x\0y", "\ud800", "C:\\x", "x" * 300])
def test_a_checkpoint_that_names_files_elsewhere_is_damaged(name, trained, tmp_path):
    """Even where all sizes and hashes are right."""
    folder = tmp_path / "run" / "checkpoints" / "step-00000024"
    shutil.copytree(trained / "checkpoints" / "step-00000024", folder)
    (tmp_path / "x").write_bytes((folder / "model.safetensors").read_bytes())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"].pop("model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    there = sorted(tmp_path.rglob("*"))
    with pytest.raises(DebiasError, match="every checkpoint is damaged"):
        checkpoints.latest_valid(folder.parent)
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.row(42, "hostile names stay text in the model card and inside their folder on the disk")
@pytest.mark.parametrize(
    "index",
    [
        {"unet": ["os", "system"]},
        {"unet": ["subprocess", "Popen"]},
        {"unet": ["../../evil", "UNet2DModel"]},
        {"unet": ["evil", "UNet2DModel"]},
        {"scheduler": ["evil", "Evil"]},
        {"../../evil": ["diffusers", "UNet2DModel"]},
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": "../../evil"},
    ],
    ids=str,
)
def test_a_model_that_names_modules_or_folders_elsewhere_runs_nothing(index, trained, tmp_path, monkeypatch):
    """evil.py lies where Python would find it, and in the model's own folders."""
    folder, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoints"))
    for place in (tmp_path, folder, folder / "unet", folder / "scheduler"):
        (place / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    there = sorted(tmp_path.rglob("*"))
    try:
        load_pipeline(str(folder))
    except InputError:
        assert index.get("_class_name") is None or isinstance(index["_class_name"], list)
    assert not mark.exists() and sorted(tmp_path.rglob("*")) == there
    assert index.get("_class_name") or safetensors.torch.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
