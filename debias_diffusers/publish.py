"""A run on the Hub: what is pushed, and how it gets there whole and once, while the training goes on. No torch.

At a checkpoint the files that belong together are linked into RUN/.push/step-N (nothing is copied; the run replaces its
files, it never changes them). A process of its own pushes that folder: first the files, then one commit that names the
commit it builds on. Whatever goes wrong, the branch is read anew before anything is decided.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from . import checkpoint, hub
from .card import TITLE, variant
from .config import PushConfig, TrainConfig, layered, read_config
from .errors import CannotWriteError, HubError, InputError, RunInUseError
from .files import DRAFT, remove, said_if_not_writable, take_lock
from .hub import WEIGHTS, api, retried
from .run import CHECKPOINTS, CONFIG, METRICS, SAMPLES, say

PENDING = ".push"  # in a run: snapshots that are on their way
CARD, GRID, PLACEHOLDER = "README.md", "samples.png", '"PATH"'
PIPELINE = (hub.MODEL_INDEX, "unet", "scheduler")
PIECE = 1 << 20


# ---- what is pushed --------------------------------------------------------------------------------------------------


def snapshot(run: Path, step: int) -> Path:
    """Links what is pushed of a run, as it stands now, into a folder that later steps do not change.

    The exported pipeline, the other averages as its variants, configuration, metrics, card, and the newest grid. No state of
    the optimizer.

    Raises:
        CannotWriteError: nothing is left behind.
    """
    final = run / PENDING / checkpoint.name_of(step)
    draft = final.with_name(DRAFT + final.name)
    with said_if_not_writable(final):
        try:
            remove(draft)
            for name, path in _files(run, step).items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                _link(path, draft / name)
            remove(final)
            os.rename(draft, final)
        except OSError:
            remove(draft)
            raise
    return final


def _files(run: Path, step: int) -> dict[str, Path]:
    """Names in the repository and the files of the run behind them."""
    parts = [run / name for name in PIPELINE]
    pipeline = [path for part in parts for path in ([part] if part.is_file() else sorted(part.rglob("*"))) if path.is_file()]
    found = {path.relative_to(run).as_posix(): path for path in (*pipeline, run / CONFIG, run / METRICS, run / CARD)}
    for rate in _config(run).optimization.ema_decay[1:]:  # the first is the exported one
        path = run / CHECKPOINTS / checkpoint.name_of(step) / f"ema_{rate}.safetensors"
        found[f"unet/{WEIGHTS}.{variant(rate)}.safetensors"] = path
    if grids := sorted((run / SAMPLES).glob("step-*.png")):
        found[GRID] = grids[-1]
    return found


def _config(run: Path) -> TrainConfig:
    return layered(read_config(str(run / CONFIG)))


def _link(path: Path, place: Path) -> None:
    """metrics.jsonl grows where it lies; everything else is replaced by a rename, so that a link keeps what it is now."""
    if path.name != METRICS:
        with contextlib.suppress(OSError):  # of file systems without links
            os.link(path, place)
            return
    shutil.copyfile(path, place)


def _contents(folder: Path, repo: str) -> dict[str, Path | bytes]:
    """Names in the repository and what they hold; the card names the repository."""
    found: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    card = (folder / CARD).read_text(encoding="utf-8").replace(PLACEHOLDER, f'"{repo}"')
    if GRID in found:
        card = card.replace(f"{TITLE}\n", f"{TITLE}\n\n![Drawn while it was trained]({GRID})\n", 1)
    found[CARD] = card.encode()
    return found


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
    foreign = [name for name in there if f"/{WEIGHTS}" in f"/{name}" and name not in contents]
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


def push(config: PushConfig) -> str:
    """Pushes what is on its way of a run, or the run as it stands; returns the commit.

    Raises:
        InputError: there is no run, or no repository is named.
        RunInUseError: another process pushes it.
        HubError: as of `publish`.
    """
    run = Path(config.run)
    if not (run / CONFIG).is_file() or not (run / hub.MODEL_INDEX).is_file():
        raise InputError(f"{run} is no run with an exported model; name the directory of a run that has saved once")
    wanted = _config(run).hub
    name = config.hub_model_id or wanted.hub_model_id
    if name is None:
        raise InputError(f"hub_model_id is missing, and {run} does not know any; add --hub_model_id, such as user/digits")
    if config.background:
        _end_with_standard_input()
    with _alone(run, patience=10.0 if config.background else 0.0):
        pending: Path | None = newest(run) or _as_it_stands(run)
        repo = hub.full_name(name)
        private = config.hub_private or wanted.hub_private
        retried(lambda: api().create_repo(repo, private=private or None, exist_ok=True), f"making {repo}")
        while pending:
            commit = _push_snapshot(pending, repo, config.hub_tags or wanted.hub_tags)
            for path in checkpoint.checkpoints(run / PENDING):
                if path.name <= pending.name:
                    remove(path)
            pending = newest(run)
    return commit


def _push_snapshot(folder: Path, repo: str, tagged: bool) -> str:
    step = int(folder.name.removeprefix("step-"))
    commit = publish(repo, _contents(folder, repo), f"Step {step}")
    if tagged:
        _tag(repo, folder.name, commit)
    say(f"step {step} is on the Hub: {api().endpoint}/{repo}/tree/{commit}")
    return commit


def _tag(repo: str, name: str, commit: str) -> None:
    """Gives a commit a name, unless another has it, as after a run with the same steps."""
    refs = retried(lambda: api().list_repo_refs(repo), f"reading {repo}")
    at = next((tag.target_commit for tag in refs.tags if tag.name == name), None)
    if at is None:
        retried(lambda: api().create_tag(repo, tag=name, revision=commit, exist_ok=True), f"tagging {repo}")
    elif at != commit:
        say(f"tag {name} of {repo} stays at commit {at}; delete it on the Hub to have it moved")


def newest(run: Path) -> Path | None:
    """The newest snapshot that is on its way."""
    found = checkpoint.checkpoints(run / PENDING)
    return found[-1] if found else None


@contextlib.contextmanager
def _alone(run: Path, patience: float) -> Iterator[None]:
    """One push of a run at a time. That of a training which was just killed takes a moment to end."""
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


def _as_it_stands(run: Path) -> Path:
    """A snapshot of a run that nobody trains at this moment."""
    try:
        lock = take_lock(run)
    except RunInUseError as error:
        raise RunInUseError(f"{error}, and nothing of it waits to be pushed; a training pushes by itself with --push_to_hub") from error
    with lock:
        found = checkpoint.checkpoints(run / CHECKPOINTS)
        if not found:
            raise InputError(f"{run} has no checkpoint; train it first")
        return snapshot(run, int(found[-1].name.removeprefix("step-")))


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

    def __init__(self, run: Path, repo: str) -> None:
        self.run, self.repo = run, repo
        self.offered: int | None = None  # the newest step that was handed over
        self.process: subprocess.Popen[bytes] | None = None

    def offer(self, step: int) -> None:
        """Hands a checkpoint over that was just written. What goes wrong is said."""
        try:
            snapshot(self.run, step)
        except CannotWriteError as error:
            say(f"step {step} is not pushed: {error}")
            return
        self.offered = step
        self.resume()

    def resume(self) -> None:
        """Starts pushing what is on its way, if that is not being done."""
        if newest(self.run) and (self.process is None or self.process.poll() is not None):
            package = str(Path(__file__).parent.parent)  # which may be importable for the script that was started only
            paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "debias_diffusers.hub", "push", str(self.run), f"--hub_model_id={self.repo}", "--background"],
                stdin=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # Ctrl-C is for the training, with which this ends
            )

    def finish(self, step: int) -> None:
        """Waits until the run as of its last step is on the Hub.

        Raises:
            HubError: it did not get there; names the command that finishes the job.
        """
        if self.offered != step:
            self.offer(step)
        done = self.offered == step
        while done and newest(self.run):
            self.resume()
            done = self.process is not None and self.process.wait() == 0
        if not done:
            raise HubError(
                f"finished at step {step}, and {self.run} is complete, but it is not on the Hub; "
                f"python -m debias_diffusers.hub push {shlex.quote(str(self.run))} pushes it"
            )
