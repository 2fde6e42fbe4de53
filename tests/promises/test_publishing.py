"""A push gets to the Hub whole and once, whatever the network does, and a training neither waits for it nor dies of it."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import psutil
import pytest
from conftest import HANG, command, cpu_of_children, gone, metrics, newest_step, tensors, train_args, wait_for, writers
from pushing import Worker, copy_of, environment, repository, served, settle
from safetensors.numpy import load, save

from debias_diffusers.config.schema.hub import HubConfig
from debias_diffusers.errors import HubError
from debias_diffusers.hub import publish
from debias_diffusers.hub.client import PREFLIGHT
from debias_diffusers.runs import checkpoints

MODES = {"lfs": False, "xet": True}


@pytest.fixture(scope="module", params=MODES)
def both(request, tmp_path_factory):
    """A Hub of each kind of transfer, and a process that pushes to it."""
    with served(tmp_path_factory.mktemp("served") / request.param, MODES[request.param], {"TIMEOUT": 1}) as pair:
        yield pair


# What does not depend on how files are sent.
OVER_LFS = pytest.mark.parametrize("both", ["lfs"], indirect=True)
OVER_XET = pytest.mark.parametrize("both", ["xet"], indirect=True)
KNOWN_LICENSE = pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1."), reason="huggingface_hub 1 asks huggingface.co for licences, whatever HF_ENDPOINT says"
)


@pytest.fixture
def hub(both):
    both[1].drain()
    both[0].clear()
    both[0].worker = both[1]
    yield both[0]
    both[0].clear()


@pytest.fixture
def worker(both):
    return both[1]


NAMES = (f"alice/model-{number}" for number in itertools.count())
UNIQUE = itertools.count(1)
REPOSITORY = {"README.md", ".gitattributes"}


@pytest.fixture
def repo():
    return next(NAMES)


@pytest.fixture
def run(trained, tmp_path):
    return unlike_others(copy_of(trained, tmp_path / "run"))


def unlike_others(run):
    """Weights that no store has seen, or they would not be sent."""
    generator = np.random.default_rng(next(UNIQUE))
    found = checkpoints.verify(run / "checkpoints" / "step-00000024")
    files = {path.name: path.read_bytes() for path in found.path.glob("*.safetensors")}
    for name in ("ema_0.9.safetensors", "ema_0.99.safetensors"):
        weights = {key: generator.standard_normal(value.shape, np.float32) for key, value in load(files[name]).items()}
        files[name] = save(weights)
    checkpoints.write(run / "checkpoints", 24, writers(files), found.state, keep=2)
    return run


def pushed(run):
    """What a repository must hold of a run, but for the card."""
    names = ["config.json", "metrics.jsonl", "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"]
    files = {name: (run / name).read_bytes() for name in names}
    averages = run / "checkpoints" / "step-00000024"
    files["unet/diffusion_pytorch_model.safetensors"] = (averages / "ema_0.9.safetensors").read_bytes()
    return files | {"unet/diffusion_pytorch_model.ema_0_99.safetensors": (averages / "ema_0.99.safetensors").read_bytes()}


def require_whole(hub, run, repo, commits=1):
    """All is there, in one commit beyond that of the new repository."""
    files = hub.files(repo)
    card = files.pop("README.md").decode()
    assert f'from_pretrained("{repo}")' in card and "PATH" not in card
    del files[".gitattributes"]
    assert files == pushed(run)
    assert len(hub.commits(repo)) == 1 + commits


REQUESTS = {
    "whoami": ("GET", "/api/whoami-v2"),
    "create": ("POST", "/api/repos/create"),
    "rights": ("GET", "/auth-check/write"),
    "tip": ("GET", r"/api/models/alice/[\w-]+$"),
    "preupload": ("POST", "/preupload/"),
    "card": ("POST", "/api/validate-yaml"),
    "commit": ("POST", "/commit/"),
    "refs": ("GET", "/refs$"),
    "tag": ("POST", "/tag/"),
}
OF_LFS = {"batch": ("POST", "/info/lfs/objects/batch"), "send": ("PUT", "/"), "verify": ("POST", "/lfs-verify")}
OF_XET = {"token": ("GET", "/xet-write-token/"), "xorb": ("POST", "/v1/xorbs/"), "shard": ("POST", "/v1/shards")}

FAULTS = {
    "429 with Retry-After": {"action": "status", "status": 429, "headers": {"Retry-After": "3"}, "times": 4},
    "500 four times": {"action": "status", "status": 500, "times": 4},
    "reset": {"action": "drop", "times": 4},
    "closed": {"action": "drop", "fin": True, "times": 4},
    "reset in the middle": {"action": "drop_upload", "after_bytes": 100, "times": 2},
    "answer lost": {"action": "drop_after", "times": 1},
    "time-out": {"action": "delay", "times": 1},  # the client waits for one second, the server for ever; with Xet both as long as it takes
}
USUAL = ("429 with Retry-After", "answer lost")


@pytest.mark.row(43, "a push survives 429, 500, resets, lost responses and timeouts at each of its requests, and makes one commit")
@pytest.mark.parametrize(
    "fault, everywhere",
    [*((fault, False) for fault in USUAL), *(pytest.param(fault, True, marks=pytest.mark.nightly) for fault in FAULTS)],
)
def test_a_push_survives_faults_at_each_request(hub, worker, run, fault, everywhere, trials):
    """Requests that do not depend on how files are sent are tried over LFS, and nightly over Xet, too.

    Each of them meets one of the usual faults, and nightly every fault.
    """
    own = OF_XET if hub.xet else OF_LFS
    requests = list((REQUESTS | own if everywhere or not hub.xet else own).items())
    for name, (method, path) in requests if everywhere else requests[USUAL.index(fault) :: len(USUAL)]:
        trials()
        repo = next(NAMES)
        unlike_others(run)
        hub.clear()
        silent = {} if fault != "time-out" else {"delay": 6} if name in OF_XET else {"until": threading.Event()}
        hub.fault(method=method, path=path, **FAULTS[fault], **silent)
        code, said = worker.push(run, "--hub_model_id", repo, "--hub_tags")
        assert code == 0, (name, said)
        assert hub.faults.left == 0, name
        require_whole(hub, run, repo)
        if name not in OF_XET:  # which waits by itself
            assert float(re.search(r"waited (\S+) s", said)[1]) > 0, (name, said)
        assert repository(hub, repo).tags == {"step-00000024": hub.commits(repo)[0]["id"]}


@OVER_LFS
def test_the_wait_that_a_server_asks_for_is_kept(hub, worker, run, repo):
    hub.fault(path="/commit/", status=429, headers={"Retry-After": "77"})
    code, said = worker.push(run, "--hub_model_id", repo)
    assert code == 0 and "trying again in 77 s" in said and "waited 77 s" in said


@pytest.mark.row(43, "a push survives 429, 500, resets, lost responses and timeouts at each of its requests, and makes one commit")
def test_a_commit_whose_answer_was_lost_is_found_and_not_made_again(hub, worker, run, repo):
    hub.fault(path="/commit/", action="drop_after", times=1)
    code, said = worker.push(run, "--hub_model_id", repo)
    assert code == 0 and "trying again" in said
    require_whole(hub, run, repo)
    assert [request for request in hub.requests() if "/commit/" in request] == [f"POST /api/models/{repo}/commit/main"]
    assert f"/{repo}/tree/{hub.commits(repo)[0]['id']}" in said


def test_what_is_there_already_is_not_pushed_again(hub, worker, run, repo):
    assert worker.push(run, "--hub_model_id", repo)[0] == 0
    assert worker.push(run, "--hub_model_id", repo)[0] == 0
    require_whole(hub, run, repo)
    (run / "metrics.jsonl").write_text("")
    assert worker.push(run, "--hub_model_id", repo)[0] == 0
    require_whole(hub, run, repo, commits=2)


@OVER_LFS
def test_files_of_others_stay_but_not_weights_that_would_be_taken_for_these(hub, worker, run, repo):
    assert worker.push(run, "--hub_model_id", repo)[0] == 0
    add = """
import sys
from huggingface_hub import HfApi
weights = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.ema_0_5.safetensors")
for name in ("notes.txt", "vae/diffusion_pytorch_model.safetensors", *(f"unet/{name}" for name in weights)):
    HfApi().upload_file(path_or_fileobj=b"x" * 9, path_in_repo=name, repo_id=sys.argv[1])
"""
    worker.script(add, repo)
    (run / "metrics.jsonl").write_text("")
    assert worker.push(run, "--hub_model_id", repo)[0] == 0
    assert set(hub.files(repo)) == {*pushed(run), *REPOSITORY, "notes.txt", "vae/diffusion_pytorch_model.safetensors"}


def test_a_lora_is_not_pushed_over_a_pipeline(monkeypatch):
    """Whose UNet it would delete."""
    there = [SimpleNamespace(rfilename=name) for name in ("model_index.json", "unet/diffusion_pytorch_model.safetensors")]
    head = SimpleNamespace(sha="0" * 40, siblings=there)
    fake = SimpleNamespace(model_info=lambda _: head, create_commit=lambda *_, **__: pytest.fail("it was committed"))
    monkeypatch.setattr(publish, "api", lambda: fake)
    with pytest.raises(HubError, match="user/base holds a pipeline"):
        publish.publish("user/base", {"base_model.json": b"{}", "pytorch_lora_weights.safetensors": b""}, "Step 1")


# ---- kills and company -----------------------------------------------------------------------------------------------


@pytest.mark.row(44, "killed at any request of a push, the repository is old or complete; the same command finishes in one commit")
@pytest.mark.parametrize("some", [4, pytest.param(1, marks=pytest.mark.nightly)], ids=["some", "all"])
def test_a_push_that_is_killed_is_finished_by_the_same_command(hub, worker, run, some, trials):
    assert worker.push(run, "--hub_model_id", next(NAMES))[0] == 0
    requests = len(hub.requests())
    assert requests >= 9
    for point in range(0, requests, some):
        trials()
        repo = next(NAMES)
        unlike_others(run)
        hub.clear()
        release = hub.hold(skip=point)
        assert worker.killed(run, "--hub_model_id", repo, when=lambda point=point: wait_for(lambda: len(hub.requests()) > point)), point
        release.set()
        settle(hub)
        there = set(hub.files(repo)) - {".gitattributes"} if ("model", repo) in hub.store.repositories else set()
        assert there in (set(), {*pushed(run), "README.md"}), point
        hub.clear()
        code, said = worker.push(run, "--hub_model_id", repo)
        assert code == 0, said
        require_whole(hub, run, repo)
        assert not publish.waiting(run)


def test_two_pushes_at_once_make_one_commit_each_and_none_twice(hub, worker, run, repo, tmp_path):
    """Of the same files one suffices; of different ones the second builds on the first."""
    same = copy_of(run, tmp_path / "same")
    other = unlike_others(copy_of(run, tmp_path / "other"))
    second = Worker(hub, tmp_path / "home", {"TIMEOUT": 1})
    for runs, commits in (((run, same), 1), ((run, other), 2)):
        hub.clear()
        name = next(NAMES)
        # The first to commit waits within the server until the other has sent its files.
        release = hub.hold(path="/commit/", times=1)
        worker.start("push", "push", runs[0], "--hub_model_id", name, timeout=HANG)
        wait_for(lambda: hub.log)
        second.start("push", "push", runs[1], "--hub_model_id", name, timeout=HANG)
        wait_for(lambda: sum("/commit/" in request for request in hub.requests()) > 1)
        release.set()
        results = [worker.result(), second.result()]
        assert [code for code, _ in results] == [0, 0], results
        assert len(hub.commits(name)) == 1 + commits
        whole = [pushed(each) for each in runs]
        assert {n: data for n, data in hub.files(name).items() if n not in REPOSITORY} in whole
        assert all(commit["title"] in ("Step 24", "initial commit") for commit in hub.commits(name))


@OVER_LFS
def test_a_run_is_pushed_by_one_process_at_a_time(hub, worker, run, repo, tmp_path):
    second = Worker(hub, tmp_path / "home", {"TIMEOUT": 1})
    release = hub.hold(path="/api/whoami-v2")
    worker.start("push", "push", run, "--hub_model_id", repo, timeout=HANG)
    wait_for(lambda: hub.log)
    code, said = second.push(run, "--hub_model_id", repo)
    assert code == 3 and "in use by process" in said
    release.set()
    assert worker.result()[0] == 0


@OVER_LFS
def test_a_command_that_a_test_has_left_is_ended_and_answers_for_no_other(hub, run, repo, tmp_path):
    hub.hold(path="/api/whoami-v2")
    worker = Worker(hub, tmp_path / "home", {"TIMEOUT": 1})
    pid = worker.start("push", "push", run, "--hub_model_id", repo, timeout=HANG)
    wait_for(lambda: hub.log)
    code, said = worker.push(run)
    assert code == 2 and "never pushed" in said and gone(pid)


@OVER_LFS
def test_the_newest_checkpoint_is_pushed_and_not_what_was_left_over(hub, worker, run, repo):
    publish.stage(run, 18)
    assert worker.push(run, "--hub_model_id", repo)[0] == 0
    require_whole(hub, run, repo)
    assert hub.commits(repo)[0]["title"] == "Step 24" and not publish.waiting(run)


@KNOWN_LICENSE
@OVER_LFS
def test_a_push_does_again_what_the_one_before_was_told(hub, worker, run, repo):
    code, said = worker.push(run)
    assert code == 2 and "never pushed; add --hub_model_id" in said
    assert worker.push(run, "--hub_model_id", repo, "--hub_tags", "--hub_license", "cc-by-4.0")[0] == 0
    assert "license: cc-by-4.0\n" in hub.files(repo)["README.md"].decode()
    del repository(hub, repo).tags["step-00000024"]
    assert worker.push(run)[0] == 0
    require_whole(hub, run, repo)
    assert set(repository(hub, repo).tags) == {"step-00000024"}
    code, said = worker.push(run, "--hub_license", "my-own")
    assert code == 7 and "hub_license is my-own, which the Hub must know" in said
    code, said = worker.push(run, "--hub_private")
    assert code == 7 and f"{repo} is public" in said
    assert len(hub.commits(repo)) == 2


@OVER_LFS
def test_a_damaged_or_incomplete_run_is_not_pushed(hub, worker, run, repo):
    path = run / "checkpoints" / "step-00000024" / "ema_0.9.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, said = worker.push(run, "--hub_model_id", repo)
    assert code == 0 and "an older checkpoint is pushed" in said and hub.commits(repo)[0]["title"] == "Step 18"
    assert "\nStep 18 of 24; the weights are averaged" in hub.files(repo)["README.md"].decode()
    (run / "unet" / "config.json").unlink()
    code, said = worker.push(run, "--hub_model_id", repo)
    assert code == 2 and "unet/config.json is missing" in said


# ---- before a training -----------------------------------------------------------------------------------------------


def refused(hub, folder, *flags, token="hf_write", limits=None, **settings):
    """A training that must not begin and imports no torch: what was said."""
    args = train_args(folder / "run", "--push_to_hub", "--hub_model_id", "digits", *flags)
    code, said = Worker(hub, folder / "home", limits, **settings).run("train", *args[1:], token=token, torch=False)
    return sentence_of(code, re.sub(r"waited \S+ s\n$", "", said), folder, token)


def sentence_of(code, said, folder, token):
    assert code == 7 and "Traceback" not in said, said
    assert newest_step(folder / "run") == 0 and "images/s" not in said
    assert not token or token not in said
    return said.splitlines()[-1]


@OVER_LFS
@pytest.mark.row(45, "what the Hub would reject is an error before the training, within five seconds, and does not print the token")
@pytest.mark.parametrize(
    "token, flags, settings, named",
    [
        ("", [], {}, ["not logged in", "hf auth login"]),
        ("hf_wrong", [], {}, ["invalid token (401)", "HF_TOKEN"]),
        ("hf_write", ["--hub_model_id", "bob/digits"], {}, ["hub_model_id 'bob/digits'", "may not"]),
        ("hf_write", ["--hub_model_id", "my digits"], {}, ["hub_model_id 'my digits'", "must use alphanumeric chars"]),
        ("hf_write", ["--hub_model_id", "a/b/c"], {}, ["hub_model_id 'a/b/c'", "must be in the form"]),
        ("hf_write", [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["Connection refused"]),
        ("hf_write", [], {"HF_HUB_OFFLINE": "1"}, ["offline mode is enabled"]),
        ("hf_wrïte", [], {}, ["characters that no token has"]),
        ("hf_write", ["--hub_license", "apache2"], {}, ["hub_license is apache2, which the Hub must know"]),
    ],
)
def test_what_the_hub_would_refuse_is_said_before_the_training(both, hub, tmp_path, token, flags, settings, named, trials):
    trials()
    sentence = refused(hub, tmp_path, *flags, token=token, **settings)
    assert all(text in sentence for text in ("push_to_hub is on", *named)), sentence


@OVER_LFS
@pytest.mark.row(45, "what the Hub would reject is an error before the training, within five seconds, and does not print the token")
def test_a_refusal_needs_no_five_seconds(hub, tmp_path):
    """As a user starts it."""
    args = train_args(tmp_path / "run", "--push_to_hub", "--hub_model_id", "digits")
    process = command(*args, env=environment(hub, tmp_path / "home", "hf_read"))
    with cpu_of_children() as cpu:
        _, said = process.communicate(timeout=HANG)
        assert cpu() <= 5
    assert "token of bob is read-only" in sentence_of(process.returncode, said, tmp_path, "hf_read")


@OVER_LFS
@pytest.mark.row(45, "what the Hub would reject is an error before the training, within five seconds, and does not print the token")
def test_a_hub_that_does_not_answer_delays_the_start_by_five_seconds(hub, tmp_path):
    hub.hold(path="/api/whoami-v2")
    assert "no answer within 0.5 s" in refused(hub, tmp_path, limits={"PREFLIGHT": 0.5}) and PREFLIGHT == 5
    assert [line["status"] for line in hub.log if line["path"] == "/api/whoami-v2"] == [None]  # it has not waited for one


@OVER_LFS
def test_a_public_repository_is_not_taken_for_a_private_one(hub, worker, run, tmp_path):
    assert worker.push(run, "--hub_model_id", "alice/digits")[0] == 0
    assert "alice/digits is public" in refused(hub, tmp_path / "private", "--hub_private")


# ---- while training --------------------------------------------------------------------------------------------------


def trained_and_pushed(hub, folder, *flags, during=None, token="hf_write"):
    """A tiny training that pushes: (exit code, what it said). `during` gets the process, and a function that reads what was said so far."""
    args = train_args(folder / "run", "--push_to_hub", "--hub_model_id", "run", *flags)
    pid = hub.worker.start(*["train", *args[1:]], timeout=60, token=token)
    if during:
        during(psutil.Process(pid), Path(f"/proc/{pid}/fd/2").read_text)
    code, said = hub.worker.result()
    return code, re.sub(r"waited \S+ s\n$", "", said)


@pytest.fixture
def fresh(hub):
    """No repository alice/run from another test."""
    hub.store.repositories.pop(("model", "alice/run"), None)
    return hub


@OVER_XET
def test_a_training_pushes_its_checkpoints_and_its_end(fresh, trained, tmp_path):
    code, said = trained_and_pushed(fresh, tmp_path, "--hub_tags", "--hub_private")
    assert code == 0, said
    steps = [commit["title"] for commit in reversed(fresh.commits("alice/run"))]
    assert steps[0] == "initial commit" and steps[-1] == "Step 24" and len(set(steps)) == len(steps)
    assert set(steps[1:]) <= {"Step 6", "Step 12", "Step 18", "Step 24"}
    require_whole(fresh, tmp_path / "run", "alice/run", commits=len(steps) - 1)
    assert set(repository(fresh, "alice/run").tags) == {f"step-{int(step[5:]):08d}" for step in steps[1:]}
    assert repository(fresh, "alice/run").private
    # Pushing changes nothing of the training.
    assert tensors(tmp_path / "run", 24) == tensors(trained, 24) and metrics(tmp_path / "run") == metrics(trained)
    assert not publish.waiting(tmp_path / "run")
    # The same command again finds nothing to do.
    assert trained_and_pushed(fresh, tmp_path, "--hub_tags", "--hub_private")[0] == 0
    assert len(fresh.commits("alice/run")) == len(steps)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()) + said.encode()
    everything += b"".join(fresh.files("alice/run").values())
    assert b"hf_write" not in everything


@OVER_LFS
@pytest.mark.nightly
def test_intervals_of_pushes(fresh, tmp_path):
    code, said = trained_and_pushed(fresh, tmp_path, "--hub_every", 0)
    assert code == 0, said
    assert [commit["title"] for commit in fresh.commits("alice/run")] == ["Step 24", "initial commit"]


@OVER_LFS
@pytest.mark.row(46, "a push that fails finally leaves a complete run, exit code 7, and prints the command that finishes it")
def test_a_push_that_fails_leaves_a_complete_run_and_the_command_that_finishes_it(fresh, trained, tmp_path):
    fresh.fault(path="/commit/", status=403, times=10**6)
    code, said = trained_and_pushed(fresh, tmp_path)
    assert code == 7 and "Traceback" not in said
    assert said.count("error: committing to alice/run") >= 2  # at a checkpoint, and at the end
    assert len(publish.waiting(tmp_path / "run")) <= 2  # and not one for each checkpoint
    assert tensors(tmp_path / "run", 24) == tensors(trained, 24)
    line = said.splitlines()[-1]
    assert "finished at step 24" in line and "complete" in line
    assert [commit["title"] for commit in fresh.commits("alice/run")] == ["initial commit"]
    fresh.clear()
    words = shlex.split(re.search(r"python -m debias_diffusers\.hub (push .+) pushes it", line)[1])
    code, said = fresh.worker.run("push", *words)
    assert code == 0, said
    require_whole(fresh, tmp_path / "run", "alice/run")


@OVER_LFS
def test_a_training_does_not_wait_for_a_hub_that_hangs(fresh, trained, tmp_path):
    """It reaches its last step while the first push hangs; only then it waits."""
    release = fresh.hold(path="/preupload/")

    def wait(process, said):
        wait_for(lambda: "pushing step 24" in said())
        release.set()

    code, said = trained_and_pushed(fresh, tmp_path, during=wait)
    assert code == 0, said
    assert said.index("finished at step 24") < said.index("is on the Hub"), said
    assert fresh.commits("alice/run")[0]["title"] == "Step 24"


@OVER_XET
@pytest.mark.row(44, "killed at any request of a push, the repository is old or complete; the same command finishes in one commit")
def test_a_training_that_was_killed_sends_what_is_missing(fresh, trained, tmp_path):
    fresh.hold(path="/preupload/")

    def kill(process, _):
        wait_for(lambda: preuploads(fresh))  # not only a checkpoint: the process that pushes it has started
        process.kill()

    trained_and_pushed(fresh, tmp_path, "--max_steps", 24, during=kill)
    assert publish.waiting(tmp_path / "run")
    wait_for(lambda: gone(pushing(tmp_path / "run")))
    fresh.clear()
    code, said = trained_and_pushed(fresh, tmp_path)
    assert code == 0, said
    titles = Counter(commit["title"] for commit in fresh.commits("alice/run"))
    assert titles["Step 24"] == 1 and max(titles.values()) == 1
    require_whole(fresh, tmp_path / "run", "alice/run", commits=len(titles) - 1)
    assert tensors(tmp_path / "run", 24) == tensors(trained, 24)


@OVER_XET
def test_a_push_ends_with_the_training_that_started_it(fresh, tmp_path):
    fresh.hold(path="/preupload/")

    def stop(process, _):
        wait_for(lambda: preuploads(fresh))
        process.terminate()
        process.wait(HANG)
        assert preuploads(fresh) == [None]  # it has not waited until the client gave up and asked again

    code, said = trained_and_pushed(fresh, tmp_path, "--max_steps", 100_000, "--checkpoint_every", 20, "--warmup_steps", 0, during=stop)
    assert code == 143 and "saved" in said
    wait_for(lambda: gone(pushing(tmp_path / "run")))
    assert preuploads(fresh) == [None]


def pushing(run):
    """The process that pushes a run, or pushed it last."""
    return int(re.search(r"process (\d+)", (run / ".push" / ".lock").read_text())[1])


def preuploads(hub):
    """How requests of this kind were answered; None if they were not."""
    return [line["status"] for line in hub.log if "/preupload/" in line["path"]]


@OVER_LFS
def test_a_signal_ends_the_wait_for_the_last_push(fresh, tmp_path):
    fresh.hold(path="/preupload/")

    def stop(process, said):
        wait_for(lambda: "pushing step 24" in said() and preuploads(fresh))
        process.terminate()
        process.wait(HANG)
        assert preuploads(fresh) == [None]

    code, said = trained_and_pushed(fresh, tmp_path, "--hub_every", 0, during=stop)
    line = said.splitlines()[-1]
    assert code == 143 and "stopped by SIGTERM" in line and "debias_diffusers.hub push" in line


@KNOWN_LICENSE
@OVER_LFS
def test_a_run_that_was_trained_before_is_pushed_by_the_same_command_with_the_flags(fresh, trained, tmp_path):
    copy_of(trained, tmp_path / "run")
    code, said = trained_and_pushed(fresh, tmp_path, "--hub_tags", "--hub_license", "mit")
    assert code == 0 and "finished at step 24" in said, said
    require_whole(fresh, tmp_path / "run", "alice/run")
    assert set(repository(fresh, "alice/run").tags) == {"step-00000024"}
    assert "license: mit\n" in fresh.files("alice/run")["README.md"].decode()


def test_a_push_that_cannot_be_started_is_said_and_the_training_goes_on(run, monkeypatch, capsys):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(publish.subprocess, "Popen", refuse)
    publisher = publish.Publisher(run, HubConfig(hub_model_id="alice/run"), 24)
    publisher.offer(24)
    assert "no push was started: [Errno 11]" in capsys.readouterr().err
    (run / "config.json").write_text("{")
    publisher.offer(24)
    assert "step 24 is not pushed: config" in capsys.readouterr().err


def test_only_what_is_sent_and_the_newest_are_kept(run):
    publisher = publish.Publisher(run, HubConfig(hub_model_id="alice/run"), 24)
    publisher.resume = lambda: None  # the Hub is away
    for step in (18, 24):
        publisher.offer(step)
    assert [path.name for path in publish.waiting(run)] == ["step-00000024"]
    publish._take(run)
    publisher.offer(18)
    assert [path.name for path in publish.waiting(run)] == ["step-00000024", "step-00000018"]
    publish.Publisher(run, HubConfig(hub_model_id="alice/run"), 18)  # a run that goes on from an earlier step
    assert [path.name for path in publish.waiting(run)] == ["step-00000018"]


def test_a_staged_folder_has_the_metrics_and_the_grid_of_its_step_though_the_training_has_gone_on(run):
    (run / "samples").mkdir(exist_ok=True)
    for step in (12, 18, 24):
        (run / "samples" / f"step-{step:08d}.png").write_bytes(b"%d" % step)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 25')  # half a line
    folder = publish.stage(run, 18)
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(range(1, 19))
    assert (folder / "samples.png").read_bytes() == b"18"


@pytest.mark.parametrize("links", [True, False])
def test_what_is_copied_for_a_push_is_on_the_disk_before_it_counts(links, run, monkeypatch):
    fsync, synced = os.fsync, {path.stat().st_ino for path in run.rglob("*") if links}

    def recorded(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "fsync", recorded)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    staged = [path for path in publish.stage(run, 24).rglob("*") if path.is_file()]
    assert len(staged) > 6 and {path.stat().st_ino for path in staged} <= synced


def test_a_push_over_its_time_limit_is_stopped(run, monkeypatch, capsys):
    publisher = publish.Publisher(run, HubConfig(hub_model_id="alice/run"), 24)
    publisher.process = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({HANG})"])
    publisher.deadline = time.monotonic() + HANG
    assert not publisher._is_idle()
    publisher.deadline = time.monotonic()
    assert publisher._is_idle() and publisher.process.poll() is not None
    assert "has timed out and is stopped" in capsys.readouterr().err


# ---- loading ---------------------------------------------------------------------------------------------------------


BIN_ONLY = """
import sys
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
name, run, kind = sys.argv[1:]
api = HfApi()
api.create_repo(name)
for path in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
    api.upload_file(path_or_fileobj=f"{run}/{path}", path_in_repo=path, repo_id=name)
weights = load_file(f"{run}/unet/diffusion_pytorch_model.safetensors")
class Bad:
    def __reduce__(self):
        import os
        return os.system, (f"touch {run}/it-ran",)
torch.save(weights if kind == "tensors" else {**weights, "bad": Bad()}, f"{run}/weights.bin")
api.upload_file(path_or_fileobj=f"{run}/weights.bin", path_in_repo="unet/diffusion_pytorch_model.bin", repo_id=name)
"""


@OVER_LFS
@pytest.mark.row(47, "a model with .bin weights only is an error unless a flag allows it, and then only tensors are read")
@pytest.mark.parametrize("kind", ["tensors", "program"])
def test_bin_weights_are_taken_only_when_asked_for_and_as_tensors(hub, worker, run, repo, tmp_path, kind):
    worker.script(BIN_ONLY, repo, run, kind)
    flags = ["--steps", 2, "--num_images", 2, "--num_threads", 1, "--output_dir"]
    for more, code, named in (([], 2, "--allow_pickle_import"), (["--allow_pickle_import"], 0 if kind == "tensors" else 2, "")):
        ended, said = worker.run("sample", repo, *flags, tmp_path / f"drawn{code}{len(more)}", *more, timeout=60)
        assert ended == code and named in said and "Traceback" not in said, said
    assert not (run / "it-ran").exists()


@OVER_XET
@pytest.mark.row(48, "a run saves the commit that it started from and keeps it, even if the branch moves")
def test_a_run_keeps_to_the_commit_that_it_started_from(hub, worker, run, repo, tmp_path):
    assert worker.push(run, "--hub_model_id", repo)[0] == 0
    first = hub.commits(repo)[0]["id"]

    def train(steps):
        code, said = worker.run("train", *train_args(tmp_path / "more", "--init", repo, "--max_steps", steps)[1:], timeout=60)
        assert code == 0, said
        return json.loads((tmp_path / "more" / "config.json").read_text())["init"]

    assert train(6) == f"{repo}@{first}"
    assert worker.push(unlike_others(run), "--hub_model_id", repo)[0] == 0
    assert hub.commits(repo)[0]["id"] != first
    assert train(8) == f"{repo}@{first}"
    assert f"base_model:\n- {repo}\n" in (tmp_path / "more" / "README.md").read_text()
