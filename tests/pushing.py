"""Commands with the real client, in processes of their own, against a Hub of the test's."""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from conftest import HANG, ROOT, SERVER, STARTED, forbid_torch, wait_for
from hub.server import HubServer


def environment(hub, home, token="hf_write", **more):
    """Of a command that talks to this Hub and has a home of its own."""
    off = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN"}
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms", "HF_HUB_DISABLE_TELEMETRY": "1"}
    mine |= {"HF_TOKEN": token} if token else {}
    mine |= {} if hub.xet else {"HF_HUB_DISABLE_XET": "1"}
    return {name: value for name, value in os.environ.items() if name not in off} | mine | more


def _in_environment(variables, limits):
    """In the forked process: these environment variables, as if the client were imported with them, and limits of `hub.client`.

    The client and ours wait for a moment where they would for seconds; what they meant to wait is added up and said last.
    """
    os.environ.clear()
    os.environ.update(variables)
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            importlib.reload(sys.modules[name])
    if "huggingface_hub.hf_api" in sys.modules:
        sys.modules["huggingface_hub.hf_api"].api.endpoint = sys.modules["huggingface_hub.constants"].ENDPOINT
    for name in ("diffusers.loaders.lora_base", "diffusers.utils.hub_utils"):  # which have copies of their own
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE
    from debias_diffusers.hub import client

    vars(client).update(limits)
    really, meant = time.sleep, 0.0

    def sleep(seconds):
        nonlocal meant
        meant += seconds
        really(min(seconds, 0.02))

    time.sleep = sleep
    return lambda: print(f"waited {meant:g} s", file=sys.stderr, flush=True)


def _script(text, *arguments):
    sys.argv[1:] = arguments
    exec(text, {})


def _do(program, arguments, variables, limits, torch, said):
    """In the forked process: does a command of ours, or a script, all of whose output goes to the file `said`."""
    os.chdir(ROOT)
    for descriptor in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), descriptor)
    multiprocessing.set_start_method("fork", force=True)
    if not torch:
        forbid_torch()
    say_waits = _in_environment(variables, limits)
    from debias_diffusers import cli

    code = _script(*arguments) if program == "script" else getattr(cli, program)(arguments)
    say_waits()
    sys.exit(code)


class Worker:
    """Does commands, one at a time, in processes forked from one that has imported the client, torch and diffusers.

    Args:
        hub: a HubServer.
        home: folder of their cache.
        limits: of `hub.client`, in seconds.
        settings: more environment variables.
    """

    def __init__(self, hub, home, limits=None, **settings):
        self.home, self.limits, self.environment = home, limits or {}, environment(hub, home, **settings)
        self.process = None

    def start(self, program, *args, token="hf_write", timeout=None, torch=True):
        """The process that does `train`, `sample`, `evaluate`, `push` or a script now.

        Args:
            program: one of these.
            args: its arguments.
            token: of its user.
            timeout: of its requests, in seconds, in place of the limit.
            torch: whether it may import torch.
        """
        self.drain()
        self.home.mkdir(parents=True, exist_ok=True)
        self.said = Path(tempfile.mkstemp(dir=self.home, prefix="said")[1])
        limits = self.limits | ({"TIMEOUT": timeout} if timeout else {})
        task = (program, [str(arg) for arg in args], {**self.environment, "HF_TOKEN": token}, limits, torch, self.said)
        self.process = SERVER.Process(target=_do, args=task)
        self.process.start()
        STARTED.append(self.process)
        return self.process.pid

    def result(self):
        """(exit code, what was said)."""
        self.process.join(HANG)
        code = self.process.exitcode
        assert code is not None, self.said.read_text()
        self.process = None
        return code, self.said.read_text()

    def drain(self):
        """Ends a command that a test left which failed."""
        if self.process:
            self.process.kill()
            self.result()

    def run(self, program, *args, **options):
        self.start(program, *args, **options)
        return self.result()

    def push(self, run, *flags):
        return self.run("push", "push", run, *flags)

    def script(self, text, *args, **options):
        """What a script printed that uses the Hub; one that fails ends the process, and so the test."""
        code, said = self.run("script", text, *args, **options)
        assert code == 0, said
        return said

    def killed(self, run, *flags, when):
        """Pushes until `when()`, and kills it; whether it was still at work."""
        pid = self.start("push", "push", run, *flags, timeout=HANG)
        when()
        os.kill(pid, signal.SIGKILL)
        return self.result()[0] == -signal.SIGKILL


@contextmanager
def served(folder, xet, limits=None):
    """A Hub, and what does commands with it."""
    folder.mkdir()
    with HubServer(folder / "hub", xet=xet) as hub:
        worker = Worker(hub, folder / "home", limits)
        try:
            yield hub, worker
        finally:
            worker.drain()


def repository(hub, repo):
    return hub.store.repositories["model", repo]


def settle(hub):
    """Waits until what has arrived at the Hub is done, whoever has left."""
    wait_for(lambda: all(line["status"] is not None for line in hub.log))


def copy_of(run, place):
    """A run that a push may write into."""
    shutil.copytree(run, place)
    return place
