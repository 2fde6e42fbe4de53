"""Pushing a run to the Hub, in one commit for each push, in a subprocess of the training. No torch.

At a checkpoint the files to push are hard-linked into RUN/.push/step-N (the run replaces its files and never changes them, so
the links keep this version). A subprocess takes the newest of these folders, uploads the files, and makes one commit on top
of the newest one. After any error the branch is read again before anything else is done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..config.loading import layered, read_config
from ..config.schema.hub import HubConfig, PushConfig
from ..errors import DebiasError, HubError, InputError, RunInUseError, StoppedError
from ..runs import checkpoints
from ..runs.lora_folder import exported_weights
from ..runs.metrics_file import METRICS_FILE, step_of_line
from ..runs.model_folder import BASE_RECORD, LORA_WEIGHTS, is_lora, text_parts
from ..runs.run_directory import CHECKPOINTS, CONFIG, SAMPLES
from ..utils.console import say
from ..utils.files import (
    acquire_lock,
    link_or_copy,
    read_json,
    remove_folder,
    remove_temporary_files,
    temporary_folder,
    translate_write_errors,
    write_and_fsync,
    write_file,
)
from ..utils.signals import SignalHandler
from . import client, model_card
from .client import WEIGHTS, api, retried
from .model_card import variant

PENDING = ".push"  # in a run: folders of files to push,
SENDING = "sending"  # in it: the folder that is being uploaded,
TO = "to.json"  # and the HubConfig of the last push
CARD, GRID = "README.md", "samples.png"
LOCK_TIMEOUT = 10.0  # seconds to wait for the subprocess of a training that was killed
MIN_TIMEOUT, MIN_BYTES_PER_SECOND = 900.0, 50e3  # the time limit of a push


# ---- the files -------------------------------------------------------------------------------------------------------


def stage(run: Path, step: int) -> Path:
    """Hard-links the files to push of a checkpoint into a folder that later steps do not change.

    The pipeline or LoRA with averaged weights, other averages as its variants, configuration, metrics, model card, and the newest grid
    of samples. No optimizer state.

    Raises:
        CannotWriteError: nothing is left behind.
        InputError: a file of the run is missing.
    """
    final = run / PENDING / checkpoints.folder_name(step)
    files = _files(run, step)
    if missing := [path for path in files.values() if not path.is_file()]:
        raise InputError(f"{run} cannot be pushed: {missing[0]} is missing")
    with translate_write_errors(final), temporary_folder(final) as folder:
        for name, path in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _link(run, path, folder / name, step)
        remove_folder(final)
        os.rename(folder, final)
    return final


def _files(run: Path, step: int) -> dict[str, Path]:
    """Names in the repository, and the files of the run."""
    lora = is_lora(run)
    pipeline = (client.MODEL_INDEX, "unet/config.json", "scheduler/scheduler_config.json")
    found = {name: run / name for name in (*((BASE_RECORD,) if lora else pipeline), CONFIG, CARD)}
    parts = [run / part for part in text_parts(run) if part != "unet"]
    found |= {f"{part.name}/{path.name}": path for part in parts for path in sorted(part.glob("[!.]*")) if path.is_file()}
    # Weights from the checkpoint and not from the export, which may be newer where a run was killed.
    first, *others = layered(read_config(str(run / CONFIG))).optimization.ema_decay
    stem = Path(LORA_WEIGHTS).stem if lora else f"unet/{WEIGHTS}"
    names = {f"{stem}.safetensors": first} | {f"{stem}.{variant(rate)}.safetensors": rate for rate in others}
    folder = run / CHECKPOINTS / checkpoints.folder_name(step)
    found |= {name: folder / checkpoints.weights_file(rate) for name, rate in names.items()}
    if (run / METRICS_FILE).is_file():  # not where nothing was logged
        found[METRICS_FILE] = run / METRICS_FILE
    grids = sorted((run / SAMPLES).glob("step-*.png"))  # of later steps, too, where the training has gone on
    if drawn := [path for path in grids if path.stem <= checkpoints.folder_name(step)]:
        found[GRID] = drawn[-1]
    return found


def _link(run: Path, path: Path, place: Path, step: int) -> None:
    """Puts a file of a run in its place.

    metrics.jsonl is appended to, so its lines up to `step` are copied; the card gets this step, as the export is of another one after
    a kill between the two; adapters of a checkpoint get the names of diffusers; all other files are replaced by renames, so a link is
    enough. What is copied is synced, or a push after a power cut would send what is left of it.
    """
    if path.suffix == ".safetensors" and is_lora(run):
        write_and_fsync(place, exported_weights(path, run / LORA_WEIGHTS))
    elif path.name == METRICS_FILE:
        lines = path.read_bytes().splitlines(keepends=True)
        write_and_fsync(place, b"".join(line for line in lines if step_of_line(line) <= step))
    elif path.name == CARD:
        write_and_fsync(place, model_card.of_step(path.read_text(encoding="utf-8"), step).encode())
    else:
        link_or_copy(path, place)


def _contents(folder: Path, repo: str, license: str | None) -> dict[str, Path | bytes]:
    """Names in the repository and contents; the card is completed with the repository and the licence."""
    found: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    text = (folder / CARD).read_text(encoding="utf-8")
    found[CARD] = model_card.published(text, repo, license, GRID if GRID in found else None).encode()
    return found


# ---- the queue -------------------------------------------------------------------------------------------------------


def waiting(run: Path) -> list[Path]:
    """Staged folders that are not on the Hub yet, oldest first."""
    return [*checkpoints.list_checkpoints(run / PENDING / SENDING), *checkpoints.list_checkpoints(run / PENDING)]


def _take(run: Path) -> Path | None:
    """Moves the newest staged folder to SENDING, where the training does not drop it for a newer one, and drops the older ones."""
    while ready := checkpoints.list_checkpoints(run / PENDING):
        with translate_write_errors(run / PENDING):
            for older in (*ready[:-1], run / PENDING / SENDING):
                remove_folder(older)
            (run / PENDING / SENDING).mkdir()
            with contextlib.suppress(FileNotFoundError):  # dropped for a newer one meanwhile
                return ready[-1].rename(run / PENDING / SENDING / ready[-1].name)
    left = checkpoints.list_checkpoints(run / PENDING / SENDING)
    return left[-1] if left else None


# ---- upload ----------------------------------------------------------------------------------------------------------


def publish(repo: str, contents: Mapping[str, Path | bytes], message: str) -> str:
    """Makes the main branch of a repository hold these files, in one commit, and returns the hash of that commit.

    No commit is made where the branch holds them already, as after an answer that was lost.

    Raises:
        HubError: the Hub refuses, or cannot be reached for as long as `client.retried` tries; or a LoRA would go to a pipeline.
    """
    return retried(partial(_commit, repo, contents, message), f"committing to {repo}")


def _commit(repo: str, contents: Mapping[str, Path | bytes], message: str) -> str:
    """One attempt: uploads the files, then commits those that differ, on top of the newest commit (error 412 if another comes first)."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = retried(lambda: api().model_info(repo), f"reading {repo}")
    names = [file.rfilename for file in head.siblings or []]
    if BASE_RECORD in contents and client.MODEL_INDEX in names:  # as where a base model is named by mistake, which would lose its UNet
        raise HubError(f"{repo} holds a pipeline, in place of which no LoRA would be loaded; name another repository")
    # Other weights in unet/, or of a LoRA, would be loaded in place of these: .bin, variants, shards.
    kinds = (f"unet/{WEIGHTS}", Path(LORA_WEIGHTS).stem)
    foreign = [name for name in names if name.startswith(kinds) and name not in contents]
    operations: list[Any] = [*(CommitOperationAdd(*item) for item in contents.items()), *map(CommitOperationDelete, foreign)]
    commit: Any = api().create_commit(repo, operations, commit_message=message, parent_commit=head.sha)
    return str(commit.oid)


# ---- the command -----------------------------------------------------------------------------------------------------


def push(config: PushConfig) -> None:
    """Pushes what is staged of a run, and its newest checkpoint if it is not being trained.

    Raises:
        InputError: there is no run, or no repository is named.
        RunInUseError: another process pushes it, or trains it and nothing is staged.
        HubError: as of `publish`.
    """
    run = Path(config.run)
    if not run.exists():
        raise InputError(f"{run} does not exist; name the directory of a run that has saved once")
    if not (run / CONFIG).is_file() or not ((run / client.MODEL_INDEX).is_file() or is_lora(run)):
        raise InputError(f"{run} is no run with an exported model; name the directory of a run that has saved once")
    if not waiting(run) and not checkpoints.list_checkpoints(run / CHECKPOINTS):
        raise InputError(f"{run} has no checkpoint; train it first")
    to = _target(config)
    if config.background:
        _exit_with_parent()
    with _lock(run, LOCK_TIMEOUT if config.background else 0.0):
        if not config.background:
            _stage_newest(run)
        if not waiting(run):
            return  # another process has pushed it
        repo = client.ready(to)
        write_file(run / PENDING / TO, json.dumps(dataclasses.asdict(dataclasses.replace(to, hub_model_id=repo))).encode())
        while folder := _take(run):
            _push_folder(folder, repo, to)
            remove_folder(folder)


def _target(config: PushConfig) -> HubConfig:
    """The repository and options of the command; without a name, those of the last push with what the command gives beside it."""
    given = {name: getattr(config, name) for name in ("hub_model_id", "hub_private", "hub_tags", "hub_license")}
    if config.hub_model_id is not None:
        return HubConfig(**given)
    path = Path(config.run) / PENDING / TO
    if not path.is_file():
        raise InputError(f"hub_model_id is missing, and {config.run} was never pushed; add --hub_model_id, such as user/digits")
    try:
        return HubConfig(**{**read_json(path), **{name: value for name, value in given.items() if value}})
    except TypeError as error:
        raise InputError(f"{path} is damaged; add --hub_model_id, such as user/digits") from error


def _push_folder(folder: Path, repo: str, to: HubConfig) -> None:
    step = checkpoints.step_of_folder(folder)
    commit = publish(repo, _contents(folder, repo, to.hub_license), f"Step {step}")
    if to.hub_tags:
        _tag(repo, folder.name, commit)
    say(f"step {step} is on the Hub: {api().endpoint}/{repo}/tree/{commit}")


def _tag(repo: str, name: str, commit: str) -> None:
    """Tags a commit, unless another commit has that tag, as after a run with the same steps."""
    refs = retried(lambda: api().list_repo_refs(repo), f"reading {repo}")
    at = next((tag.target_commit for tag in refs.tags if tag.name == name), None)
    if at is None:
        retried(lambda: api().create_tag(repo, tag=name, revision=commit, exist_ok=True), f"tagging {repo}")
    elif at != commit:
        say(f"tag {name} of {repo} stays at commit {at}; delete it on the Hub to have it moved")


def _lock(run: Path, timeout: float) -> IO[str]:
    """A lock for one push of a run at a time; waits up to `timeout` seconds for it."""
    end = time.monotonic() + timeout
    while True:
        try:
            return acquire_lock(run / PENDING)
        except RunInUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _stage_newest(run: Path) -> None:
    """Stages the newest checkpoint, which may be newer than what is staged, if the run is not being trained."""
    try:
        lock = acquire_lock(run)
    except RunInUseError as error:
        if waiting(run):
            return
        raise RunInUseError(f"{error}, and nothing of it is staged for a push; a training pushes by itself with --push_to_hub") from error
    with lock:
        remove_temporary_files(run / PENDING)
        found, damaged = checkpoints.latest_valid(run / CHECKPOINTS)
        for sentence in damaged:
            say(f"{sentence}; an older checkpoint is pushed")
        if found is None:
            raise InputError(f"{run} has no checkpoint; train it first")
        if found.shards:
            raise InputError(
                f"{run} cannot be pushed: its newest checkpoint, of step {found.step}, is in the parts of --sharded_checkpoints; "
                f"continue the training with --no_sharded_checkpoints, and push the next one"
            )
        stage(run, found.step)


def _exit_with_parent() -> None:
    """Ends this process when its standard input closes: the parent holds the other end and may be killed."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would block the exit of the interpreter
            pass
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


# ---- while training --------------------------------------------------------------------------------------------------


class Publisher:
    """Pushes a run in a subprocess; the training waits for it at its end only."""

    def __init__(self, run: Path, to: HubConfig, step: int) -> None:
        """`to` names the repository in full; `step` is the one that the run resumes from."""
        self.run, self.to = run, to
        self.offered: int | None = None  # the newest step that was staged
        self.process: subprocess.Popen[bytes] | None = None
        self.deadline = 0.0  # of the process, as of time.monotonic
        for folder in waiting(run):
            if checkpoints.step_of_folder(folder) > step:  # will be trained again
                remove_folder(folder)

    def offer(self, step: int) -> None:
        """Stages a checkpoint that was just written, and starts to push it. Errors are printed."""
        try:
            folder = stage(self.run, step)
            for older in checkpoints.list_checkpoints(self.run / PENDING):
                if older != folder:  # only the newest is kept, or the disk would fill while the Hub is down
                    remove_folder(older)
            self.offered = step
        except (DebiasError, OSError) as error:
            say(f"step {step} is not pushed: {error}")
        self.resume()

    def resume(self) -> None:
        """Starts a push if something is staged and none is running. Errors are printed."""
        try:
            if self._is_idle() and waiting(self.run):
                self._start()
        except OSError as error:
            say(f"no push was started: {error}")

    def _is_idle(self) -> bool:
        """Whether no push is running; one that is over its time limit is killed."""
        if self.process is None or self.process.poll() is not None:
            return True
        if time.monotonic() < self.deadline:
            return False
        say(f"the push to {self.to.hub_model_id} has timed out and is stopped; the next one sends what is missing")
        self.process.kill()
        self.process.wait()
        return True

    def _start(self) -> None:
        size = sum(path.stat().st_size for folder in waiting(self.run) for path in folder.rglob("*"))
        self.deadline = time.monotonic() + MIN_TIMEOUT + size / MIN_BYTES_PER_SECOND
        package = str(Path(__file__).parent.parent.parent)  # only the directory of the script may be on sys.path
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, *self._command(), "--background"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C goes to the training, which then ends this
        )

    def _command(self) -> list[str]:
        """The command that a user types for the same push."""
        flags = [f"--hub_model_id={self.to.hub_model_id}", *(["--hub_private"] if self.to.hub_private else [])]
        flags += ["--hub_tags"] if self.to.hub_tags else []
        flags += [f"--hub_license={self.to.hub_license}"] if self.to.hub_license else []
        return ["-m", "debias_diffusers.hub", "push", str(self.run), *flags]

    def finish(self, step: int, stop: SignalHandler) -> None:
        """Waits until the last step of the run is on the Hub.

        Raises:
            HubError: the push failed; names the command that finishes it.
            StoppedError: a signal came; names it, too.
        """
        if self.offered != step:
            self.offer(step)
        command = shlex.join(["python", *self._command()])
        unfinished = f"finished at step {step}, and {self.run} is complete, but it is not on the Hub; {command} pushes it"
        if self.offered != step:
            raise HubError(unfinished)
        say(f"pushing step {step} to {self.to.hub_model_id}")
        self._wait(stop, unfinished)  # for a push that may have begun before this step was staged
        if waiting(self.run):
            self.resume()
            self._wait(stop, unfinished)
        if waiting(self.run):
            raise HubError(unfinished)

    def _wait(self, stop: SignalHandler, unfinished: str) -> None:
        while not self._is_idle():
            if stop.signum:
                raise StoppedError(f"stopped by {signal.Signals(stop.signum).name}: {unfinished}", stop.signum)
            time.sleep(0.05)
