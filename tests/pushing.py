"""Commands with the real client, in processes of their own, against a Hub of the test's."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import psutil
from conftest import HANG, ROOT, wait_for
from hub.server import HubServer

# Reads a command a line, with the token of its user, and answers with the process that does it, and then with how that ended and what it
# said. The client and ours wait for a moment where they would for seconds; what they meant to wait is added up and said last.
WORKER = """
import json, os, sys, tempfile, time
really, meant = time.sleep, [0.0]
def sleep(seconds):
    meant[0] += seconds
    really(min(seconds, 0.02))
time.sleep = sleep
import huggingface_hub
from huggingface_hub import CommitOperationAdd, ModelCardData, hf_api  # noqa: F401
from debias_diffusers import cli
from debias_diffusers.hub import client, publish  # noqa: F401
client.TIMEOUT = float(os.environ.get("TIMEOUT", client.TIMEOUT))
if "TORCH" in os.environ:  # what the commands import, once for all
    import datasets
    from debias_diffusers.evaluation import likelihood, score  # noqa: F401
    from debias_diffusers.training import setup  # noqa: F401
for line in sys.stdin:
    program, token, arguments, limit = json.loads(line)
    client.TIMEOUT = limit or client.TIMEOUT
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if pid == 0:
            os.environ["HF_TOKEN"] = token
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            if program == "script":
                text, *sys.argv[1:] = arguments
                exec(text, {})
                code = 0
            else:
                code = getattr(cli, program)(arguments)
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
    """A process that has imported the client, and does commands in children of its own."""

    def __init__(self, hub, home, **settings):
        self.home, self.environment = home, environment(hub, home, **settings)
        self.begin()

    def begin(self):
        self.busy = False
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, env=self.environment, **streams)

    def start(self, program, *args, token="hf_write", timeout=None):
        """The process that does `train`, `sample`, `evaluate`, `push` or a script now; `timeout` is of its requests, in seconds."""
        self.drain()
        self.process.stdin.write(json.dumps([program, token, [str(arg) for arg in args], timeout]) + "\n")
        self.process.stdin.flush()
        self.busy = True
        return int(self.process.stdout.readline())

    def result(self):
        """(exit code, what was said)."""
        answer = json.loads(self.process.stdout.readline())
        self.busy = False
        return answer

    def drain(self):
        """Forgets a command that a test left which failed: in a process anew, so that no answer is taken for that of another command."""
        ended = self.process.poll() is not None
        if not ended and not self.busy:
            return
        for process in [] if ended else [*psutil.Process(self.process.pid).children(), self.process]:
            process.kill()
        self.close()
        self.begin()

    def run(self, program, *args, **options):
        self.start(program, *args, **options)
        return self.result()

    def push(self, run, *flags):
        return self.run("push", "push", run, *flags)

    def script(self, text, *args):
        """What a script printed that uses the Hub; one that fails ends the process, and so the test."""
        code, said = self.run("script", text, *args)
        assert code == 0, said
        return said

    def killed(self, run, *flags, when):
        """Pushes until `when()`, and kills it; whether it was still at work."""
        pid = self.start("push", "push", run, *flags, timeout=HANG)
        when()
        os.kill(pid, signal.SIGKILL)
        return self.result()[0] == -signal.SIGKILL

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextmanager
def served(folder, xet, **settings):
    """A Hub, and a process that does commands with it."""
    folder.mkdir()
    with HubServer(folder / "hub", xet=xet) as hub:
        worker = Worker(hub, folder / "home", **settings)
        try:
            yield hub, worker
        finally:
            worker.close()


def repository(hub, repo):
    return hub.store.repositories["model", repo]


def settle(hub):
    """Waits until what has arrived at the Hub is done, whoever has left."""
    wait_for(lambda: all(line["status"] is not None for line in hub.log))


def copy_of(run, place):
    """A run that a push may write into."""
    shutil.copytree(run, place)
    return place
