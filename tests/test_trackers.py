"""Trackers: TensorBoard's files read back, a tracker that fails, and the progress that is shown."""

import importlib.util
import io
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import tracking
from conftest import TINY
from PIL import Image

from debias_diffusers.config.loading import layered, read_config, resolved, update
from debias_diffusers.config.registry import TRACKERS
from debias_diffusers.errors import InputError
from debias_diffusers.training import device
from debias_diffusers.training import logger as logging
from debias_diffusers.training.logger import FAILURES, Logger, Trackers
from debias_diffusers.training.start import _require_packages


class Fake(tracking.GeneralTracker):
    """A tracker that keeps what it gets, and raises where `broken` says so."""

    requires_logging_directory = False
    broken = ()

    def __init__(self, project, **own):
        self.got, self.own = [], own

    def start(self):
        self._did("start", None)

    def store_init_configuration(self, values):
        self._did("values", values)

    def log(self, values, step=None):
        self._did("log", (step, values))

    def log_images(self, values, step=None):
        self._did("images", (step, values))

    def finish(self):
        self._did("finish", None)

    @property
    def tracker(self):
        return None

    def _did(self, what, value):
        self.got.append((what, value))
        if what in self.broken:
            raise ConnectionError(f"no server for {what}")


@pytest.fixture
def fake(monkeypatch):
    """Puts a fake in the place of trackers of accelerate; returns what was made."""
    made = {}

    def put(*names, broken=()):
        for name in names:

            def make(key, *arguments, **own):
                made[key] = Fake(*arguments, **own)
                made[key].name, made[key].broken = key, broken
                return made[key]

            monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, partial(make, name))
        return made

    return put


def config_of(folder, *trackers):
    values = {"output_dir": str(folder), "max_steps": 40, "log_every": 1, "report_to": trackers}
    return resolved(layered(read_config(str(TINY)), values), None)


def test_every_tracker_of_accelerate_is_known_by_its_name():
    assert {name: set(modules) for name, (modules, _) in TRACKERS.items()}.keys() == tracking.LOGGER_TYPE_TO_CLASS.keys()


def test_a_tracker_that_is_not_installed_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, (_, package) in TRACKERS.items():
        with pytest.raises(InputError, match=f"report_to is {name}, but it is not installed; run pip install {package}$"):
            _require_packages(config_of(tmp_path, name))
    assert config_of(tmp_path, "none").run.report_to == ()


def test_a_folder_of_the_name_of_a_tracker_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="report_to is wandb, but it is not installed"):
        _require_packages(config_of(tmp_path, "wandb"))
    with pytest.raises(InputError, match="report_to is trackio, but it is not installed"):
        device.start_accelerator(config_of(tmp_path, "trackio"))


def test_several_trackers_get_the_numbers_and_the_grids(tmp_path, fake, capsys):
    """One of them TensorBoard, whose files are read back; one fails at each line, and the others go on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = fake("swanlab", "wandb")
    fake("comet_ml", broken=("log", "finish"))
    config, lines = config_of(tmp_path, "tensorboard", "swanlab", "comet_ml", "wandb"), []
    run = SimpleNamespace(folder=tmp_path, metrics=SimpleNamespace(append=lines.append))
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    one_process = SimpleNamespace(num_processes=1, is_main_process=True, gather=None)
    with Logger(config, run, one_process, 0) as logger:
        for step in range(1, 5):
            logger.log_step(step, 1 / step, 0.1, 2.0, SimpleNamespace(reset=lambda _: {"loss_by_t": [0.5] + [None] * 9}))
        logger.log_picture(4, tmp_path / "step-00000004.png", picture)
    said = capsys.readouterr().err
    assert "comet_ml failed at step 1: no server for log; it is tried again, and the training goes on" in said
    assert "comet_ml failed at step 3" in said and "given up" in said and said.count("warning: ") == 2
    tracked = EventAccumulator(str(tmp_path / "logs"), size_guidance={"images": 0})
    tracked.Reload()
    assert [event.value for event in tracked.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [event.value for event in tracked.Scalars("loss_by_t/0.0-0.1")] == [0.5] * 4
    (event,) = tracked.Images("samples")
    assert event.step == 4
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), np.asarray(picture.convert("RGB")))
    for name in ("swanlab", "wandb"):
        got = made[name].got
        assert [what for what, _ in got] == ["start", "values", *["log"] * 4, "images", "finish"]
        assert got[1][1]["batch_size"] == 8
        assert [(step, values["loss"]) for what, (step, values) in got[2:6]] == [(line["step"], line["loss"]) for line in lines]
        assert got[6][1] == (4, {"samples": [picture]})


def test_a_tracker_that_cannot_start_ends_the_command_and_the_others(tmp_path, fake):
    made = fake("wandb")
    fake("swanlab", broken=("start",))
    problem = Trackers().start(config_of(tmp_path, "wandb", "swanlab"), SimpleNamespace(folder=tmp_path))
    assert problem == "report_to has swanlab, but it cannot start: no server for start"
    assert made["wandb"].got[-1] == ("finish", None)


def test_a_tracker_is_tried_again_until_it_failed_in_a_row(tmp_path, fake, capsys):
    made, trackers = fake("wandb"), Trackers()
    assert trackers.start(config_of(tmp_path, "wandb"), SimpleNamespace(folder=tmp_path)) is None
    steps = iter(range(100))
    for broken in (True, True, False, *[True] * FAILURES, False):
        made["wandb"].broken = ("log",) if broken else ()
        trackers.log({"loss": 1.0}, next(steps))
    assert [step for what, (step, _) in made["wandb"].got[2:]] == list(range(3 + FAILURES))  # not the last
    assert capsys.readouterr().err.count("warning: wandb failed") == 3


def test_trackio_and_others_get_grids_in_their_own_ways(tmp_path, monkeypatch):
    picture, path = Image.new("L", (8, 8)), tmp_path / "step-00000007.png"
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda image: ("picture", image)))
    got = []
    native = SimpleNamespace(log_image=lambda *arguments, **more: got.append((arguments, more)))
    calls = {name: (lambda *arguments, **more: got.append((arguments, more))) for name in ("log", "log_images", "log_artifact")}
    for name in ("trackio", "aim", "mlflow", "comet_ml", "dvclive"):
        logging._log_picture(SimpleNamespace(name=name, tracker=native, **calls), 7, path, picture)
    assert got == [
        (({"samples": ("picture", picture)},), {"step": 7}),
        (({"samples": picture},), {"step": 7}),
        ((str(path), "samples"), {}),
        ((picture,), {"name": "samples", "step": 7}),
        ((path.name, picture), {}),
    ]


# ---- progress --------------------------------------------------------------------------------------------------------


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


def shown(tmp_path, monkeypatch, terminal):
    """What 40 steps of a second each say, with a validation loss and a metric on the way."""
    now, stream = [0.0], Stream(terminal)
    monkeypatch.setattr(logging, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", stream)
    config = update(config_of(tmp_path), {"log_every": 0})
    with Logger(config, SimpleNamespace(metrics=SimpleNamespace(append=lambda _: None)), SimpleNamespace(), 0) as progress:
        for step in range(1, 41):
            now[0] += 1
            progress.log_step(step, 0.5, 0.1, 1.0, SimpleNamespace(values=None))
            if step == 20:
                progress.log_values(step, {"validation_loss": 0.25, "validation_mse": 0.3})
                progress.log_metrics(step, {"fid": 12.0, "kid": 1.0})
    return stream.getvalue()


def test_in_a_file_progress_is_whole_lines(tmp_path, monkeypatch):
    lines = shown(tmp_path, monkeypatch, terminal=False).splitlines()
    loss = "loss 0.5 (mean of {} steps), 8 images/s"
    assert lines == [
        f"step 10 of 40, 00:30 left, {loss.format(10)}",
        f"step 20 of 40, 00:20 left, {loss.format(20)}",
        f"step 30 of 40, 00:10 left, {loss.format(30)}, validation_loss 0.25, fid 12",
        f"step 40 of 40, 00:00 left, {loss.format(40)}, validation_loss 0.25, fid 12",
    ]


def test_in_a_terminal_progress_is_one_line(tmp_path, monkeypatch):
    said = shown(tmp_path, monkeypatch, terminal=True)
    assert said.count("\n") == 1 and "\r" in said and "/40 steps, " in said and "left, loss 0.5" in said and "8 images/s" in said
