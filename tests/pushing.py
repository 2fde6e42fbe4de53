"""Pushes by the real client, in processes of their own, against a Hub of the test's."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

from conftest import ROOT, wait_for
from hub.server import HubServer

# Reads an argument list a line and answers with the process that does it, and then with how that ended and what it said. The client
# and ours wait for a moment where they would for seconds; what they meant to wait is added up and said last.
WORKER = """
import json, os, sys, tempfile, time
really, meant = time.sleep, [0.0]
def sleep(seconds):
    meant[0] += seconds
    really(min(seconds, 0.02))
time.sleep = sleep
from debias_diffusers import cli, hub, publish  # noqa: F401
import huggingface_hub
from huggingface_hub import hf_api, ModelCardData, CommitOperationAdd  # noqa: F401
hub.TIMEOUT = float(os.environ["TIMEOUT"])
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.dup2(said.fileno(), 2)
            code = cli.push(["push", *json.loads(line)])
            print(f"waited {meant[0]:g} s", file=sys.stderr, flush=True)
            os._exit(code)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        said.seek(0)
        print(json.dumps([os.waitstatus_to_exitcode(status), said.read()]), flush=True)
"""


def environment(hub, home, token="hf_write", **more):
    """Of a command that talks to this Hub and has a home of its own."""
    off = {"HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN"}
    mine = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms", "HF_HUB_DISABLE_TELEMETRY": "1"}
    mine |= {"HF_TOKEN": token} if token else {}
    mine |= {} if hub.xet else {"HF_HUB_DISABLE_XET": "1"}
    return {name: value for name, value in os.environ.items() if name not in off} | mine | more


class Worker:
    """A process that has imported the client, and pushes in children of its own."""

    def __init__(self, hub, home):
        settings = environment(hub, home, TIMEOUT="1")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], cwd=ROOT, env=settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, run, *flags):
        """The process that pushes now."""
        self.process.stdin.write(json.dumps([str(run), *map(str, flags)]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def result(self):
        """(exit code, what was said)."""
        return json.loads(self.process.stdout.readline())

    def push(self, run, *flags):
        self.start(run, *flags)
        return self.result()

    def killed(self, run, *flags, when):
        """Pushes until `when()`, and kills it; whether it was still at work."""
        pid = self.start(run, *flags)
        when()
        os.kill(pid, signal.SIGKILL)
        return self.result()[0] == -signal.SIGKILL


@contextmanager
def served(folder, xet):
    """A Hub, and a process that pushes to it."""
    folder.mkdir()
    with HubServer(folder / "hub", xet=xet) as hub:
        worker = Worker(hub, folder / "home")
        try:
            yield hub, worker
        finally:
            worker.process.stdin.close()
            worker.process.wait()


def repository(hub, repo):
    return hub.store.repositories["model", repo]


def settle(hub):
    """Waits until what has arrived at the Hub is done, whoever has left."""
    wait_for(lambda: all(line["status"] is not None for line in hub.log))


def copy_of(run, place):
    """A run that a push may write into."""
    shutil.copytree(run, place)
    return place
