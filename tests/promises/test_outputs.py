"""What is written where: nothing foreign is replaced, results do not depend on a screen, and locks and signals are given back."""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import HANG, SERVER, TINY, command, metrics
from here import tiny
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

import debias_diffusers
from debias_diffusers import cli, parsing
from debias_diffusers.config.loading import to_json
from debias_diffusers.config.schema.data import DataConfig
from debias_diffusers.config.schema.evaluation import BitsConfig, MeasureConfig, ScoreConfig, StatsConfig
from debias_diffusers.config.schema.objective import WeightsConfig
from debias_diffusers.config.schema.sampling import SampleConfig
from debias_diffusers.config.schema.training import TrainConfig
from debias_diffusers.convert.guided_diffusion import guided
from debias_diffusers.data import images
from debias_diffusers.data.sources.opening import open_source
from debias_diffusers.data.sources.table import ImageTable
from debias_diffusers.errors import CannotWriteError, DebiasError, InputError
from debias_diffusers.evaluation import likelihood, plots, score, statistics
from debias_diffusers.evaluation.results import as_json
from debias_diffusers.runs.run_directory import MARKER, open_run
from debias_diffusers.training import dry_run
from debias_diffusers.training.setup.build import run_training
from debias_diffusers.training.start import train_run
from debias_diffusers.utils import files
from debias_diffusers.utils.signals import SignalHandler

FOREIGN = "files that this package did not write are never overwritten"


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures(folder, count=4):
    folder.mkdir()
    for k in range(count):
        Image.fromarray(np.full((8, 8), 40 * k, np.uint8)).save(folder / f"{k}.png")
    return folder


# ---- the run directory ------------------------------------------------------------------------------------------------

LOCKED = "process 7 on some-machine"
OURS = to_json(TrainConfig())
THEIRS = {
    "a training of another program": {"checkpoints/last.ckpt": "", "config.json": "{}", "README.md": "", "metrics.jsonl": ""},
    "a lock that nobody of us had": {".lock": "", "README.md": "mine"},
    "our lock beside other files": {".lock": LOCKED, "README.md": "mine", "config.json": '{"model_type": "bert"}'},
    "a configuration of ours alone": {"config.json": OURS},
    "and folders named like checkpoints": {"config.json": OURS, "checkpoints/step-00000001/manifest.json": '{"format": 1, "files": {}}'},
    "a lock of another program": {".lock": '{"packages": []}'},
    "another marker": {MARKER: '{"debias_diffusers": "other"}', "unet/config.json": "{}"},
    "a hidden letter": {".draft-letter.md": "dear"},
}


@pytest.mark.row(52, FOREIGN)
@pytest.mark.parametrize("kind", THEIRS)
def test_a_folder_of_somebody_else_is_no_run_directory(kind, tmp_path):
    for name, text in THEIRS[kind].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = everything(tmp_path)
    with pytest.raises(InputError, match="is not a run directory and holds other files, such as"):
        open_run(tiny(tmp_path))
    assert everything(tmp_path) == before


# What a process that is killed at its beginning leaves, of this version and of the first ones.
BEGUN = {
    "nothing": {},
    "a lock that was just made": {".lock": ""},
    "a lock": {".lock": LOCKED},
    "half a marker": {".lock": LOCKED, f".draft-77-0123abcd-{MARKER}": '{"deb'},
    "a marker": {".lock": LOCKED, MARKER: '{"debias_diffusers": "run"}'},
    "half a configuration": {".lock": LOCKED, ".draft-config.json": "{"},
    "a configuration": {".lock": LOCKED, "config.json": OURS, "metrics.jsonl": '{"step": 1}\n'},
    "a marker without a lock, as a copy may have it": {MARKER: '{"debias_diffusers": "run"}', "config.json": OURS},
}


@pytest.mark.row(52, FOREIGN)
@pytest.mark.parametrize("kind", BEGUN)
def test_a_run_that_was_killed_at_its_beginning_goes_on(kind, tmp_path):
    for name, text in BEGUN[kind].items():
        (tmp_path / name).write_text(text)
    with open_run(tiny(tmp_path)) as opened:
        assert opened.resume is None and json.loads((tmp_path / MARKER).read_text()) == {"debias_diffusers": "run"}


@pytest.mark.row(52, FOREIGN)
@pytest.mark.parametrize("without", [(MARKER,), (MARKER, ".lock")])
def test_a_run_of_a_version_without_markers_gets_one(without, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for name in without:
        (tmp_path / "run" / name).unlink()
    for _ in range(2):
        with open_run(tiny(tmp_path / "run")) as opened:
            assert opened.resume.step == 24 and (tmp_path / "run" / MARKER).is_file()


# ---- files of results -------------------------------------------------------------------------------------------------


def figures_of(folder, **options):
    measure = MeasureConfig(metrics="colour", cache_dir="", num_threads=1)
    return ScoreConfig(targets=(str(folder),), reference=str(folder), measure=measure, allow_few_images=True, **options)


def results(data, out):
    """Commands by the files that they write: what runs them, and the first of those files."""
    measure = MeasureConfig(metrics="colour", cache_dir="", resolution=8, num_threads=1)
    dry = ["--config", str(TINY), "--dry_run", "--verbose", "--output_dir", str(out / "run")]
    return {
        "scores.json": lambda: score.score(figures_of(data, output=str(out / "scores.json"))),
        "scores.png": lambda: score.score(figures_of(data, output=str(out / "scores.png"), steps="5,10")),
        "stats.safetensors": lambda: statistics.stats(
            StatsConfig(reference=str(data), out=str(out / "stats.safetensors"), measure=measure)
        ),
        "bits.json": lambda: likelihood.bits_per_dimension(BitsConfig(model=str(data), output=str(out / "bits.json"))),
        "weights.csv": lambda: plots.plot_weights(parsing.parse(WeightsConfig, ["--output_dir", str(out)], "")),
        "weights.png": lambda: plots.plot_weights(parsing.parse(WeightsConfig, ["--output_dir", str(out)], "")),
        "run-first-batch.png": lambda: dry_run.dry_run(cli.train_config(dry, None)),
    }


NAMES = list(results(Path(), Path()))


def foreign(path):
    """Somebody's file of the same kind."""
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({"conv.weight": torch.ones(3)}, path)
    elif path.suffix == ".png":
        Figure().savefig(path)
    else:
        path.write_text('{"reference": "the Bible"}' if path.suffix == ".json" else "weight,kg\n")


@pytest.mark.row(52, FOREIGN)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("there", [foreign, lambda path: path.mkdir(parents=True), lambda path: (path.parent.mkdir(), os.mkfifo(path))])
def test_a_file_of_somebody_else_is_refused_before_the_work(name, there, tmp_path, monkeypatch):
    for module, work in ((score, "make_measure"), (likelihood, "open_model"), (plots, "_table"), (dry_run, "prepare")):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("the work has begun"))
    there(tmp_path / "out" / name)
    before = everything(tmp_path / "out")
    with pytest.raises(InputError, match=rf"{name} (already exists|exists and is not a file)"):
        results(pictures(tmp_path / "data"), tmp_path / "out")[name]()
    assert everything(tmp_path / "out") == before and [path.name for path in (tmp_path / "out").iterdir()] == [name]


@pytest.mark.row(54, "an error of printing does not lose the result, and a file that cannot be written is an error before the computation")
@pytest.mark.parametrize("name", NAMES)
def test_a_result_that_cannot_be_written_is_said_before_the_work(name, tmp_path, monkeypatch):
    for module, work in ((score, "make_measure"), (likelihood, "open_model"), (plots, "_table"), (dry_run, "prepare")):
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("the work has begun"))
    data = pictures(tmp_path / "data")
    for out in (data / "0.png", Path("/proc/nowhere"), tmp_path / ("n" * 300)):
        with pytest.raises(CannotWriteError, match="cannot be written"):
            results(data, out)[name]()
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and len(everything(data)) == 4


@pytest.mark.row(52, FOREIGN)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("scores.png", "bits.json", "weights.png")])  # two need a model
def test_our_own_results_are_replaced(name, tmp_path, monkeypatch):
    png = plots.png_of
    monkeypatch.setattr(plots, "png_of", lambda _: png(Figure()))  # one with axes takes seconds
    monkeypatch.setattr(dry_run, "estimated_memory", lambda *_: dry_run.MemoryEstimate({}, 0))  # counting takes seconds
    data = pictures(tmp_path / "data")
    for _ in range(2):
        results(data, tmp_path / "out")[name]()
        written = everything(tmp_path / "out")
        (tmp_path / "out" / name).touch()
    assert Path(name) in written and everything(tmp_path / "out").keys() == written.keys()


def begun(*_):
    raise NotImplementedError("the work has begun")


@pytest.mark.row(52, FOREIGN)
def test_results_of_a_model_are_replaced_and_pictures_of_the_first_version_too(tmp_path, monkeypatch):
    (tmp_path / "bits.json").write_bytes(as_json(likelihood._result(torch.ones(2, 3), torch.ones(2))))
    monkeypatch.setattr(likelihood, "pinned_model", begun)
    with pytest.raises(NotImplementedError, match="the work has begun"):
        likelihood.bits_per_dimension(BitsConfig(model="model", output=str(tmp_path / "bits.json")))
    scores = {"reference": 0, "extractor": 0, "targets": 0}
    for text, ours in ((json.dumps(scores), True), ('{"targets": 0}', False)):
        (tmp_path / "scores.json").write_text(text)
        Figure().savefig(tmp_path / "scores.png")  # which says matplotlib, as the first version's do
        refused = contextlib.nullcontext() if ours else pytest.raises(InputError)
        with refused:
            score._require_output(figures_of(tmp_path, steps="5,10"), str(tmp_path / "scores"))
    images_of_theirs = tmp_path / "theirs.png"
    Image.new("L", (8, 8)).save(images_of_theirs)
    assert not plots.is_our_picture(images_of_theirs, True) and images.software(tmp_path / "scores.json") is None


@pytest.mark.row(52, FOREIGN)
def test_a_letter_that_is_named_like_a_temporary_file_stays(trained, tmp_path):
    (tmp_path / ".draft-letter").write_text("dear")
    with pytest.raises(InputError, match=r"holds other files, such as \.draft-letter"):
        files_of = parsing.parse(SampleConfig, [str(trained), "--output_dir", str(tmp_path), "--num_images", "1"], "")
        cli_sample(files_of)
    with pytest.raises(InputError, match="already exists"):
        guided("model.pt", "--image_size 8 --num_heads 1", str(tmp_path))
    assert everything(tmp_path) == {Path(".draft-letter"): b"dear"}
    assert files.user_files(tmp_path) == [".draft-letter"]


def cli_sample(config):
    from debias_diffusers.sampling.generate import sample

    sample(config)


# ---- standard streams -------------------------------------------------------------------------------------------------

PRINTED = "an error of printing does not lose the result, and a file that cannot be written is an error before the computation"


def _with_streams(args, broken, state, code):
    """In a forked process: a command whose standard output, or error, is in some state."""
    place = {"stdout": 1, "stderr": 2}[broken]
    if state == "closed":
        os.close(place)
        setattr(sys, broken, None)
        setattr(sys, f"__{broken}__", None)
    elif state == "ascii":
        getattr(sys, broken).reconfigure(encoding="ascii", errors="strict")
    elif state == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), place)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, place)
    code.value = getattr(cli, args[0])([str(arg) for arg in args[1:]])
    sys.exit(code.value)


def with_streams(broken, state, *args):
    """(what the command returned, the exit code of its process)."""
    code = SERVER.Value("i", -1)
    process = SERVER.Process(target=_with_streams, args=(args, broken, state, code))
    process.start()
    process.join(300)
    return code.value, process.exitcode


STATES = ("closed", "ascii", "full", "without a reader")


@pytest.mark.row(54, PRINTED)
@pytest.mark.parametrize("state", STATES)
def test_figures_are_written_whatever_becomes_of_the_table(state, tmp_path, trials):
    data = pictures(tmp_path / "фото")
    flags = ["--reference", data, "--metrics", "colour", "--cache_dir", "", "--allow_few_images", "--num_threads", 1]
    for broken in ("stdout", "stderr"):
        trials()
        out = tmp_path / f"{broken}.json"
        assert with_streams(broken, state, "evaluate", "score", data, *flags, "--output", out) == (0, 0)
        assert json.loads(out.read_text())["targets"][0]["target"] == str(data)
    lost = state not in ("closed", "ascii")  # who closes it wants nothing of it
    assert with_streams("stdout", state, "evaluate", "score", data, *flags) == ((4, 4) if lost else (0, 0))


@pytest.mark.row(54, PRINTED)
@pytest.mark.parametrize("broken", ["stderr", pytest.param("stdout", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("state", STATES)
def test_training_and_sampling_go_on_whatever_becomes_of_the_progress(state, broken, trained, tmp_path, trials):
    trials()
    flags = ["--config", TINY, "--max_steps", 1, "--warmup_steps", 0, "--output_dir", tmp_path / "run"]
    assert with_streams(broken, state, "train", *flags) == (0, 0)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1]
    flags = ["--num_images", 2, "--steps", 2, "--num_threads", 1, "--output_dir", tmp_path / "images"]
    assert with_streams(broken, state, "sample", trained, *flags) == (0, 0)
    assert len(list((tmp_path / "images").glob("0*.png"))) == 2
    assert with_streams(broken, state, "train", "--help") == (0, 0)
    assert with_streams(broken, state, "train", "--max_stepz", 3) == (2, 2)


# ---- places that cannot be written ------------------------------------------------------------------------------------

CACHES = "a cache or home folder that cannot be written does not stop a command"


@pytest.mark.row(55, CACHES)
@pytest.mark.parametrize("options", [{}, {"class_conditional": True}, {"dataset": "emoji"}])
def test_embedded_data_need_no_cache_and_are_what_runs_have_written_down(options, monkeypatch):
    config = DataConfig(**{"dataset": "digits", **options})
    file = Path(images.__file__).parent / f"{config.dataset}.parquet"
    theirs = ImageTable(datasets.load_dataset("parquet", split="train", data_files=str(file)), config)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("needs its cache"))
    ours = open_source(config)
    assert ours.fingerprint() == theirs.fingerprint() and ours.class_names == theirs.class_names
    assert [ours.read(k) for k in range(len(ours))] == [theirs.read(k) for k in range(len(theirs))]


@pytest.mark.row(55, CACHES)
def test_a_data_set_that_needs_a_cache_says_how_to_name_another(tmp_path, monkeypatch):
    shutil.copy(Path(images.__file__).parent / "digits.parquet", tmp_path / "mine.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere/datasets")
    with pytest.raises(InputError, match=r"/proc/nowhere/datasets cannot be written: name a folder that can with .* HF_HOME"):
        open_source(DataConfig(dataset=str(tmp_path / "mine.parquet")))


@pytest.mark.row(55, CACHES)
def test_training_is_measured_without_a_home(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/proc/nowhere")
    config = tiny(
        tmp_path / "run", "--max_steps", 4, "--eval_every", 4, "--eval_images", 80, "--eval_metrics", "colour", "--batch_size", 40
    )
    with open_run(config) as held, SignalHandler() as stop:
        run_training(config, held, stop)
    assert "eval_brightness_bias" in metrics(tmp_path / "run")[-1]
    assert "warning: features are not kept" in capsys.readouterr().err


# ---- one process after the other in one ------------------------------------------------------------------------------

GIVEN_BACK = "locks are released and signal handlers restored when a training ends, in whatever way"


def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.row(56, GIVEN_BACK)
def test_a_second_training_in_one_process_finds_its_run_and_signals_free(tmp_path, capsys, trials):
    before, folder = handlers(), tmp_path / "run"
    flags = ["--config", str(TINY), "--checkpoint_every", "0", "--warmup_steps", "0", "--output_dir", str(folder)]
    for steps, code in ((2, 0), (1, 2), (3, 0), (3, 0)):  # begun; refused; resumed; finished
        trials()
        assert cli.train([*flags, "--max_steps", str(steps)]) == code, capsys.readouterr().err
        assert handlers() == before
        files.acquire_lock(folder).close()
    config = tiny(folder, "--checkpoint_every", 0, "--warmup_steps", 0, "--max_steps", 9)
    with pytest.raises(DebiasError, match="stopped by SIGTERM"):
        train_run(config, callback=lambda *_: SignalHandler.newest._on_signal(signal.SIGTERM, None))
    trials()
    assert handlers() == before
    files.acquire_lock(folder).close()


@pytest.mark.row(56, GIVEN_BACK)
def test_training_works_in_a_thread(tmp_path):
    before, codes = handlers(), []
    flags = ["--config", str(TINY), "--max_steps", "4", "--output_dir", str(tmp_path / "run")]
    thread = threading.Thread(target=lambda: codes.append(cli.train(flags)))
    thread.start()
    thread.join()
    assert codes == [0] and handlers() == before


@pytest.mark.row(56, GIVEN_BACK)
def test_a_handler_that_was_installed_meanwhile_stays():
    before = signal.getsignal(signal.SIGTERM)
    with SignalHandler() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop._on_signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_IGN


@pytest.mark.row(56, GIVEN_BACK)
@pytest.mark.parametrize("recorded", [False, True])
def test_before_processes_are_connected_a_signal_ends_one_wherever_it_waits(recorded):
    before = handlers()
    with SignalHandler(at_once=True) as stop:
        assert handlers() == [signal.SIG_DFL] * 2
        if recorded:
            stop.record()
            assert handlers() == [stop._on_signal] * 2
    assert handlers() == before


# ---- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.row(36, "wrong values and combinations are an error at once, with exit code 2, both names and advice")
@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_a_wrong_flag_is_told_whatever_the_encoding_and_the_width(encoding, monkeypatch, trials):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    monkeypatch.setenv("COLUMNS", "20")
    for arguments, sentence in (
        (["--max_stepz", "3"], "Unrecognized options: --max_stepz, 3; did you mean --max_steps?; train.py --help lists all flags"),
        (["--max_steps", "many"], "Error parsing --max_steps: invalid literal for int() with base 10: 'many'; "),
        (["--max_steps"], "Missing value for argument '--max_steps'. Expected 1 values."),
        (["--prediction_type", "noise"], "invalid choice 'noise' for argument '--prediction_type'. Expected one of epsilon, flow, "),
    ):
        trials()
        with pytest.raises(InputError) as error:
            cli.train_config(arguments, None)
        assert str(error.value).startswith(sentence)
    with pytest.raises(InputError, match=r"^model is missing: it stands without a flag, before the options; sample\.py --help"):
        parsing.parse(SampleConfig, ["--model", "run"], "sample.py")
    with pytest.raises(InputError, match=r"^model is missing: a run directory, .*; sample\.py --help lists all flags$"):
        parsing.parse(SampleConfig, [], "sample.py")


def test_a_module_that_is_no_command_says_what_to_run(capsys):
    for arguments in (["-m", "debias_diffusers.training"], ["-mdebias_diffusers.plots"], ["-Im", "debias_diffusers.data", "--x"]):
        with pytest.raises(SystemExit, match="2"):
            debias_diffusers._require_command(["-m", "--x"], ["python", *arguments])
        assert (
            "is no command; run python -m debias_diffusers {train,sample,eval,convert,hub,cache,ema,play,shards}" in capsys.readouterr().err
        )
    for arguments in (["-m", "debias_diffusers.hub"], ["-m", "debias_diffusers"], ["-m", "pytest", "debias_diffusers"]):
        debias_diffusers._require_command(["-m"], ["python", *arguments])
    debias_diffusers._require_command(["train.py"], ["python", "train.py", "debias_diffusers.training"])
    process = command("-m", "debias_diffusers.training", "--max_steps", 3)
    assert "is no command" in process.communicate(timeout=HANG)[1] and process.returncode == 2


def test_the_package_is_the_command(capsys):
    process = command("-m", "debias_diffusers", "draw")
    said = "error: python -m debias_diffusers draw is not known; take one of train, sample, eval, convert, hub, cache, ema, play, shards\n"
    assert process.communicate(timeout=HANG) == ("", said) and process.returncode == 2
    for arguments, usage in (
        ([], "-m debias_diffusers {train"),
        (["eval"], "debias_diffusers eval {score"),
        (["convert", "-h"], "{guided,export,single,lora}"),
    ):
        assert cli.main(arguments) == 0 and usage in capsys.readouterr().out
    assert cli.main(["train", "--max_steps", "0"]) == 2 and "max_steps is 0" in capsys.readouterr().err


def test_statistics_that_were_replaced_can_be_read(tmp_path):
    data = pictures(tmp_path / "data")
    results(data, tmp_path)["stats.safetensors"]()
    assert set(load_file(tmp_path / "stats.safetensors")) == {"colour/mu", "colour/sigma"}
