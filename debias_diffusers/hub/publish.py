"""A run on the Hub: what is pushed, and how it gets there whole and once, while the training goes on. No torch.

At a checkpoint the files that belong together are linked into RUN/.push/step-N (nothing is copied; the run replaces its
files, it never changes them). A process of its own takes the newest such folder and pushes it: first the files, then one
commit that names the commit it builds on. Whatever goes wrong, the branch is read anew before anything is decided.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..config.loading import layered, read_config
from ..config.schema import HubConfig, PushConfig
from ..errors import DebiasError, HubError, InputError, RunInUseError, StoppedError
from ..runs import checkpoints
from ..runs.metrics_file import METRICS, step_of
from ..runs.run_directory import CHECKPOINTS, CONFIG, SAMPLES
from ..utils.console import say
from ..utils.files import draft_of, read_file, remove, remove_drafts, said_if_not_writable, take_lock, write_file
from ..utils.signals import StopSignal
from . import client, model_card
from .client import WEIGHTS, api, retried
from .model_card import variant

PENDING = ".push"  # in a run: snapshots that are on their way,
SENDING = "sending"  # the one that is being sent,
TO = "to.json"  # and where they are sent to
CARD, GRID = "README.md", "samples.png"
PIECE = 1 << 20
PATIENCE = 10.0  # seconds for the push of a training that was killed to end
STILL, SLOWEST = 900.0, 50e3  # seconds and bytes a second after which a push is taken to have come to a stop


# ---- what is pushed --------------------------------------------------------------------------------------------------


def snapshot(run: Path, step: int) -> Path:
    """Links what is pushed of a run at a checkpoint into a folder that later steps do not change.

    The pipeline with averaged weights, the other averages as its variants, configuration, metrics, card, and the newest grid. No
    state of the optimizer.

    Raises:
        CannotWriteError: nothing is left behind.
        InputError: a file of the run is missing.
    """
    final = run / PENDING / checkpoints.name_of(step)
    draft = draft_of(final)
    files = _files(run, step)
    if missing := [path for path in files.values() if not path.is_file()]:
        raise InputError(f"{run} cannot be pushed: {missing[0]} is missing")
    with said_if_not_writable(final):
        try:
            for name, path in files.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                _link(path, draft / name, step)
            _drop(final)
            os.rename(draft, final)
        except OSError:
            remove(draft)
            raise
    return final


def _files(run: Path, step: int) -> dict[str, Path]:
    """Names in the repository and the files of the run behind them."""
    found = {name: run / name for name in (client.MODEL_INDEX, "unet/config.json", "scheduler/scheduler_config.json", CONFIG, CARD)}
    # Weights from the checkpoint and not from the export, which may be a step ahead where a run was killed.
    first, *others = layered(read_config(str(run / CONFIG))).optimization.ema_decay
    names = {f"{WEIGHTS}.safetensors": first} | {f"{WEIGHTS}.{variant(rate)}.safetensors": rate for rate in others}
    folder = run / CHECKPOINTS / checkpoints.name_of(step)
    found |= {f"unet/{name}": folder / checkpoints.ema_file(rate) for name, rate in names.items()}
    if (run / METRICS).is_file():  # not where nothing was logged
        found[METRICS] = run / METRICS
    grids = sorted((run / SAMPLES).glob("step-*.png"))  # of later steps, too, where the training has gone on
    if drawn := [path for path in grids if path.stem <= checkpoints.name_of(step)]:
        found[GRID] = drawn[-1]
    return found


def _link(path: Path, place: Path, step: int) -> None:
    """metrics.jsonl grows where it lies, so its lines so far are copied; all else is replaced by a rename, and a link keeps it."""
    if path.name == METRICS:
        lines = path.read_bytes().splitlines(keepends=True)
        place.write_bytes(b"".join(line for line in lines if step_of(line) <= step))
        return
    try:
        os.link(path, place)
    except OSError:  # of file systems without links
        shutil.copyfile(path, place)


def _contents(folder: Path, repo: str, license: str | None) -> dict[str, Path | bytes]:
    """Names in the repository and what they hold; the card names the repository and its licence."""
    found: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    text = (folder / CARD).read_text(encoding="utf-8")
    found[CARD] = model_card.published(text, repo, license, GRID if GRID in found else None).encode()
    return found


# ---- what is on its way ----------------------------------------------------------------------------------------------


def waiting(run: Path) -> list[Path]:
    """Snapshots that are not on the Hub yet, oldest first."""
    return [*checkpoints.checkpoints(run / PENDING / SENDING), *checkpoints.checkpoints(run / PENDING)]


def _take(run: Path) -> Path | None:
    """The newest snapshot, out of the way of whoever drops older ones for newer; older ones go."""
    while ready := checkpoints.checkpoints(run / PENDING):
        with said_if_not_writable(run / PENDING):
            for older in (*ready[:-1], run / PENDING / SENDING):
                _drop(older)
            (run / PENDING / SENDING).mkdir()
            with contextlib.suppress(FileNotFoundError):  # dropped for a newer one meanwhile
                return ready[-1].rename(run / PENDING / SENDING / ready[-1].name)
    left = checkpoints.checkpoints(run / PENDING / SENDING)
    return left[-1] if left else None


def _drop(folder: Path) -> None:
    """Removes a snapshot; under another name first, so that nobody takes what is half removed."""
    out_of_sight = draft_of(folder)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(out_of_sight)
        remove(out_of_sight)


# ---- how it gets there -----------------------------------------------------------------------------------------------


def publish(repo: str, contents: Mapping[str, Path | bytes], message: str) -> str:
    """Makes a repository's main branch hold these files, in one commit, and returns that commit.

    Nothing is committed where the branch holds them already, as after an answer that was lost.

    Raises:
        HubError: the Hub refuses, or could not be reached for as long as `hub.retried` tries.
    """
    hashes = {name: _hashes(content) for name, content in contents.items()}
    return retried(partial(_commit_what_is_missing, repo, contents, hashes, message), f"committing to {repo}")


def _commit_what_is_missing(repo: str, contents: Mapping[str, Path | bytes], hashes: Mapping[str, set[str]], message: str) -> str:
    """One try: what the branch holds now decides what is sent; the commit counts only on top of that."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    tip: str = retried(lambda: api().model_info(repo), f"reading {repo}").sha or ""
    there = retried(lambda: _listing(repo, tip), f"reading {repo}")
    missing = [name for name in contents if there.get(name) not in hashes[name]]
    # Weights of another model would be taken for ours: .bin, variants, pieces.
    foreign = [name for name in there if name.startswith(f"unet/{WEIGHTS}") and name not in contents]
    if not missing and not foreign:
        return tip
    additions = [CommitOperationAdd(name, content if isinstance(content := contents[name], bytes) else str(content)) for name in missing]
    retried(lambda: api().preupload_lfs_files(repo, additions, free_memory=False), f"sending to {repo}")
    operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in foreign)]
    done: Any = api().create_commit(repo, operations, commit_message=message, parent_commit=tip)
    return str(done.oid)


def _listing(repo: str, commit: str) -> dict[str, str]:
    """Files of a commit and their hashes: sha256 of large ones, git's of the others."""
    files: Any = (entry for entry in api().list_repo_tree(repo, recursive=True, revision=commit) if hasattr(entry, "blob_id"))
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def _hashes(content: Path | bytes) -> set[str]:
    """By which the Hub may know a file."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    for piece in _pieces(content):
        sha256.update(piece)
        git.update(piece)
    return {sha256.hexdigest(), git.hexdigest()}


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with open(content, "rb") as file:
        while piece := file.read(PIECE):
            yield piece


def push(config: PushConfig) -> None:
    """Pushes what is on its way of a run, and the run as it stands where nobody trains it.

    Raises:
        InputError: there is no run, or no repository is named.
        RunInUseError: another process pushes it, or trains it and nothing waits.
        HubError: as of `publish`.
    """
    run = Path(config.run)
    if not (run / CONFIG).is_file() or not (run / client.MODEL_INDEX).is_file():
        raise InputError(f"{run} is no run with an exported model; name the directory of a run that has saved once")
    if not waiting(run) and not checkpoints.checkpoints(run / CHECKPOINTS):
        raise InputError(f"{run} has no checkpoint; train it first")
    to = _where_to(config)
    if config.background:
        _end_with_standard_input()
    with _alone(run, PATIENCE if config.background else 0.0):
        if not config.background:
            _add_as_it_stands(run)
        if not waiting(run):
            return  # another process was faster
        repo = client.ready(to)
        write_file(run / PENDING / TO, json.dumps(dataclasses.asdict(dataclasses.replace(to, hub_model_id=repo))).encode())
        while folder := _take(run):
            _push_snapshot(folder, repo, to)
            _drop(folder)


def _where_to(config: PushConfig) -> HubConfig:
    """What the command says; without a name, all as of the push before."""
    names = ("hub_model_id", "hub_private", "hub_tags", "hub_license")
    if config.hub_model_id is not None:
        return HubConfig(**{name: getattr(config, name) for name in names})
    path = Path(config.run) / PENDING / TO
    if not path.is_file():
        raise InputError(f"hub_model_id is missing, and {config.run} was never pushed; add --hub_model_id, such as user/digits")
    try:
        before = HubConfig(**json.loads(read_file(path)))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged; add --hub_model_id, such as user/digits") from error
    given = {name: getattr(config, name) for name in names if getattr(config, name)}
    return dataclasses.replace(before, **given)


def _push_snapshot(folder: Path, repo: str, to: HubConfig) -> None:
    step = checkpoints.step_of(folder)
    commit = publish(repo, _contents(folder, repo, to.hub_license), f"Step {step}")
    if to.hub_tags:
        _tag(repo, folder.name, commit)
    say(f"step {step} is on the Hub: {api().endpoint}/{repo}/tree/{commit}")


def _tag(repo: str, name: str, commit: str) -> None:
    """Gives a commit a name, unless another has it, as after a run with the same steps."""
    refs = retried(lambda: api().list_repo_refs(repo), f"reading {repo}")
    at = next((tag.target_commit for tag in refs.tags if tag.name == name), None)
    if at is None:
        retried(lambda: api().create_tag(repo, tag=name, revision=commit, exist_ok=True), f"tagging {repo}")
    elif at != commit:
        say(f"tag {name} of {repo} stays at commit {at}; delete it on the Hub to have it moved")


@contextlib.contextmanager
def _alone(run: Path, patience: float) -> Iterator[None]:
    """One push of a run at a time."""
    end = time.monotonic() + patience
    while True:
        try:
            lock: IO[str] = take_lock(run / PENDING)
            break
        except RunInUseError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
    with lock:
        yield


def _add_as_it_stands(run: Path) -> None:
    """A snapshot of the newest checkpoint, which may be newer than what waits, if nobody trains the run at this moment."""
    try:
        lock = take_lock(run)
    except RunInUseError as error:
        if waiting(run):
            return
        raise RunInUseError(f"{error}, and nothing of it waits to be pushed; a training pushes by itself with --push_to_hub") from error
    with lock:
        remove_drafts(run / PENDING)
        found, damaged = checkpoints.latest_valid(run / CHECKPOINTS)
        for sentence in damaged:
            say(f"{sentence}; an older checkpoint is pushed")
        if found is None:
            raise InputError(f"{run} has no checkpoint; train it first")
        snapshot(run, found.step)


def _end_with_standard_input() -> None:
    """Ends this process when the one that holds the other end of its standard input has ended, in whatever way."""

    def watch() -> None:
        while os.read(0, 1):  # not through sys.stdin, whose lock an interpreter that ends could not take
            pass
        os._exit(143)

    threading.Thread(target=watch, daemon=True).start()


# ---- while training --------------------------------------------------------------------------------------------------


class Publisher:
    """Pushes a run in a process of its own, and never makes the training wait but at its end."""

    def __init__(self, run: Path, to: HubConfig, step: int) -> None:
        """`to` names the repository in full; `step` is where the run stands."""
        self.run, self.to = run, to
        self.offered: int | None = None  # the newest step that was handed over
        self.process: subprocess.Popen[bytes] | None = None
        self.deadline = 0.0  # of the process
        for folder in waiting(run):
            if checkpoints.step_of(folder) > step:  # of steps that will be trained again
                _drop(folder)

    def offer(self, step: int) -> None:
        """Hands a checkpoint over that was just written. What goes wrong is said."""
        try:
            folder = snapshot(self.run, step)
            for older in checkpoints.checkpoints(self.run / PENDING):
                if older != folder:  # not the one that is being sent; the disk must not fill while the Hub is away
                    _drop(older)
            self.offered = step
        except (DebiasError, OSError) as error:
            say(f"step {step} is not pushed: {error}")
        self.resume()

    def resume(self) -> None:
        """Starts pushing what is on its way, if that is not being done. What goes wrong is said."""
        try:
            if self._is_over() and waiting(self.run):
                self._start()
        except OSError as error:
            say(f"no push was started: {error}")

    def _is_over(self) -> bool:
        """Whether no process is pushing; one that has come to a stop is ended."""
        if self.process is None or self.process.poll() is not None:
            return True
        if time.monotonic() < self.deadline:
            return False
        say(f"a push has not ended for so long that it is taken to have come to a stop: {self.to.hub_model_id}")
        self.process.kill()
        self.process.wait()
        return True

    def _start(self) -> None:
        size = sum(path.stat().st_size for folder in waiting(self.run) for path in folder.rglob("*"))
        self.deadline = time.monotonic() + STILL + size / SLOWEST
        package = str(Path(__file__).parent.parent.parent)  # which may be importable for the script that was started only
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, *self._command(), "--background"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the training, with which this ends
        )

    def _command(self) -> list[str]:
        """What a user types to do the same."""
        flags = [f"--hub_model_id={self.to.hub_model_id}", *(["--hub_private"] if self.to.hub_private else [])]
        flags += ["--hub_tags"] if self.to.hub_tags else []
        flags += [f"--hub_license={self.to.hub_license}"] if self.to.hub_license else []
        return ["-m", "debias_diffusers.hub", "push", str(self.run), *flags]

    def finish(self, step: int, stop: StopSignal) -> None:
        """Waits until the run as of its last step is on the Hub.

        Raises:
            HubError: it did not get there; names the command that finishes the job.
            StoppedError: a signal came; names it, too.
        """
        if self.offered != step:
            self.offer(step)
        command = shlex.join(["python", *self._command()])
        unfinished = f"finished at step {step}, and {self.run} is complete, but it is not on the Hub; {command} pushes it"
        if self.offered != step:
            raise HubError(unfinished)
        say(f"pushing step {step} to {self.to.hub_model_id}")
        self._wait(stop, unfinished)  # for one that may have begun before this step was there
        if waiting(self.run):
            self.resume()
            self._wait(stop, unfinished)
        if waiting(self.run):
            raise HubError(unfinished)

    def _wait(self, stop: StopSignal, unfinished: str) -> None:
        while not self._is_over():
            if stop.signum:
                raise StoppedError(f"stopped by {signal.Signals(stop.signum).name}: {unfinished}", stop.signum)
            time.sleep(0.05)
