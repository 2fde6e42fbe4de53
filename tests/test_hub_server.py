"""The stand-in for the Hub answers the real client as the Hub does, and every fault that it can have reaches that client."""

import hashlib
import json
import random
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub
import pytest
from conftest import wait_for
from hub import request
from hub.card import checked
from hub.server import HubServer
from pushing import Worker

LARGE = random.Random(0).randbytes(12_000_000)
CONTENTS = {
    "small.txt": b"small",
    "model.safetensors": LARGE,
    "notes/README.md": b"---\nlicense: mit\n---\n",
    "notes/deep/zeros.bin": bytes(300_000),
}
OWN = {".gitattributes"}  # what the Hub puts into a new repository

# What every client begins with. `failed` gives the class of an error, and the status that is behind it.
BEGIN = """
import json, sys, time
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

api, folder, slept = HfApi(), Path(sys.argv[1]), []
time.sleep = slept.append

def failed(call, *args, **options):
    try:
        call(*args, **options)
    except Exception as error:
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        return [type(error).__name__, getattr(response, "status_code", None)]

def push(name, **options):
    return api.upload_file(repo_id="alice/demo", path_or_fileobj=folder / name, path_in_repo=name, **options)

def say(value):
    print(json.dumps(value))
"""


def client(hub, folder, script, token="hf_write"):
    """What a client says last, in a process of its own."""
    said = Worker(hub, folder / f"home of {token}").script(BEGIN + script, folder, token=token)
    return json.loads([line for line in said.splitlines() if not line.startswith("waited")][-1])


def put_files(folder):
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def serving(folder, xet):
    put_files(folder)
    return HubServer(folder / "hub", xet=xet)


def assert_sound(hub):
    assert [line["error"] for line in hub.log if "error" in line] == []


@pytest.fixture(params=[False, True], ids=["lfs", "xet"])
def hub(request, tmp_path):
    with serving(tmp_path, request.param) as server:
        yield server
    assert_sound(server)


@pytest.fixture
def lfs_hub(tmp_path):
    with serving(tmp_path, xet=False) as server:
        yield server
    assert_sound(server)


@pytest.fixture
def xet_hub(tmp_path):
    with serving(tmp_path, xet=True) as server:
        yield server
    assert_sound(server)


PUSH = """
assert api.whoami()["name"] == "alice"
url = api.create_repo("alice/demo")
assert api.create_repo("alice/demo", exist_ok=True) == url
api.auth_check("alice/demo", write=True)
first = api.list_repo_commits("alice/demo")[0].commit_id
push("small.txt")
push("model.safetensors")
api.upload_folder(repo_id="alice/demo", folder_path=folder / "notes", path_in_repo="notes", commit_message="notes")
api.create_tag("alice/demo", tag="step/1")
api.create_branch("alice/demo", branch="other", revision=first)
push("small.txt", revision="other")
api.delete_file("small.txt", "alice/demo")
refs = api.list_repo_refs("alice/demo")
info = api.model_info("alice/demo", revision="step/1", files_metadata=True)
say({
    "names": sorted(api.list_repo_files("alice/demo", revision="step/1")),
    "below": sorted(item.path for item in api.list_repo_tree("alice/demo", "notes")),
    "kinds": [type(item).__name__ for item in api.get_paths_info("alice/demo", ["model.safetensors", "notes", "none"])],
    "sizes": {file.rfilename: file.size for file in info.siblings},
    "exists": [api.file_exists("alice/demo", name) for name in ("model.safetensors", "small.txt")],
    "refs": [ref.name for ref in refs.branches + refs.tags],
    "folder": snapshot_download("alice/demo", revision="step/1"),
    "stale": failed(push, "small.txt", parent_commit=first),
    "missing": failed(api.model_info, "alice/none"),
    "revision": failed(api.model_info, "alice/demo", revision="none"),
    "entry": failed(hf_hub_download, "alice/demo", "none.txt"),
    "again": failed(api.create_repo, "alice/demo"),
})
"""


def test_what_a_client_pushes_is_read_back(hub, tmp_path):
    hub.page_size = 2
    said = client(hub, tmp_path, PUSH)
    folder = tmp_path / said.pop("folder")
    assert {name: (folder / name).read_bytes() for name in CONTENTS} == CONTENTS
    pushed = hub.files("alice/demo", "step/1")
    assert {name: pushed[name] for name in CONTENTS} == CONTENTS and set(pushed) == {*CONTENTS, *OWN}
    assert said == {
        "names": sorted(pushed),
        "below": ["notes/README.md", "notes/deep"],
        "kinds": ["RepoFile", "RepoFolder"],
        "sizes": {name: len(content) for name, content in pushed.items()},
        "exists": [True, False],
        "refs": ["main", "other", "step/1"],
        "stale": ["HfHubHTTPError", 412],
        "missing": ["RepositoryNotFoundError", 404],
        "revision": ["RevisionNotFoundError", 404],
        "entry": ["RemoteEntryNotFoundError", 404],
        "again": ["HfHubHTTPError", 409],
    }
    titles = [commit["title"] for commit in hub.commits("alice/demo")]
    assert titles[:2] == ["Delete small.txt with huggingface_hub", "notes"] and titles[-1] == "initial commit"
    assert hub.commits("alice/demo")[0]["tree"]["model.safetensors"]["sha256"] == hashlib.sha256(LARGE).hexdigest()
    assert set(hub.files("alice/demo", "other")) == {"small.txt", *OWN}
    assert any("/v1/xorbs/" in line for line in hub.requests()) == bool(hub.xet)
    assert any("/lfs-put/" in line for line in hub.requests()) != bool(hub.xet)


def test_others_may_not_write_nor_see_what_is_private(lfs_hub, tmp_path):
    client(lfs_hub, tmp_path, "api.create_repo('alice/demo'); api.create_repo('lab/hidden', private=True); say(None)")
    asked = """
say([
    failed(push, "small.txt"),
    failed(api.auth_check, "alice/demo", write=True),
    failed(api.create_repo, "mine"),
    failed(api.auth_check, "alice/demo"),
    failed(api.model_info, "lab/hidden"),
])
"""
    forbidden = ["HfHubHTTPError", 403]
    assert client(lfs_hub, tmp_path, asked, "hf_read") == [forbidden, forbidden, forbidden, None, ["RepositoryNotFoundError", 404]]
    assert client(lfs_hub, tmp_path, "say(failed(api.whoami))", "hf_unknown") == ["HfHubHTTPError", 401]


def test_data_sets_are_repositories_too(hub, tmp_path):
    script = """
options = {"repo_id": "lab/images", "repo_type": "dataset"}
api.create_repo(**options)
api.upload_folder(folder_path=folder / "notes", **options)
tree = [item.path for item in api.list_repo_tree(recursive=True, **options)]
say([api.dataset_info("lab/images").sha, sorted(tree), hf_hub_download(filename="deep/zeros.bin", **options)])
"""
    sha, tree, path = client(hub, tmp_path, script)
    assert sha == hub.commits("lab/images", kind="dataset")[0]["id"]
    assert tree == [".gitattributes", "README.md", "deep", "deep/zeros.bin"]
    assert (tmp_path / path).read_bytes() == CONTENTS["notes/deep/zeros.bin"]


@pytest.mark.skipif(huggingface_hub.__version__ < "2", reason="huggingface_hub 1 repeats other requests")
def test_every_fault_reaches_the_client(lfs_hub, tmp_path):
    client(lfs_hub, tmp_path, "api.create_repo('alice/demo'); push('small.txt'); say(None)")
    lfs_hub.clear()
    lfs_hub.fault(path="whoami", status=503, body="<html>")
    lfs_hub.fault(path="/refs", status=403, code="GatedRepo")
    lfs_hub.fault(path="/tree/", status=429, headers={"Retry-After": "7"})
    lfs_hub.fault(path="/auth-check", action="drop")
    lfs_hub.fault(path="/auth-check", action="drop", fin=True)
    lfs_hub.fault(method="PUT", action="drop_upload", after_bytes=5_000_000)
    lfs_hub.fault(path="/commit/", action="drop_after", skip=1)
    lfs_hub.fault(method="GET", path="/resolve/", action="truncate", after_bytes=2)
    said = client(
        lfs_hub,
        tmp_path,
        """
say({
    "status": failed(api.whoami),
    "code": failed(api.list_repo_refs, "alice/demo"),
    "asked to wait": [failed(api.list_repo_files, "alice/demo"), *slept],
    "reset": failed(api.auth_check, "alice/demo"),
    "closed": failed(api.auth_check, "alice/demo"),
    "sent again": failed(push, "model.safetensors"),
    "answer lost": failed(push, "notes/README.md"),
    "cut": failed(hf_hub_download, "alice/demo", "small.txt"),
})
""",
    )
    assert said == {
        "status": ["HfHubHTTPError", 503],
        "code": ["GatedRepoError", 403],
        "asked to wait": [None, 8],
        "reset": ["ReadError", None],
        "closed": ["RemoteProtocolError", None],
        "sent again": None,
        "answer lost": ["ReadError", None],
        "cut": ["ReadError", None],
    }
    sent = [line for line in lfs_hub.log if line["method"] == "PUT"]
    assert [line["status"] for line in sent] == ["drop", 200]
    assert 5_000_000 <= sent[0]["received"] < sent[1]["received"] == len(LARGE)
    assert set(lfs_hub.files("alice/demo")) == {"small.txt", "model.safetensors", "notes/README.md", *OWN}  # the lost answer, too
    lfs_hub.clear()
    assert client(lfs_hub, tmp_path, "say(failed(api.whoami))") is None
    assert lfs_hub.requests() == ["GET /api/whoami-v2"]


def test_a_request_is_held_until_the_test_lets_it_go(lfs_hub, tmp_path, monkeypatch):
    release, slept = lfs_hub.hold(path="whoami", times=1), []
    lfs_hub.fault(path="whoami", action="delay", delay=0.5)
    with ThreadPoolExecutor() as pool:
        said = pool.submit(client, lfs_hub, tmp_path, "say([failed(api.whoami), failed(api.whoami)])")
        wait_for(lambda: lfs_hub.log)
        assert lfs_hub.log[0]["status"] is None and not said.done()
        monkeypatch.setattr(request.time, "sleep", slept.append)
        release.set()
        assert said.result() == [None, None] and 0.5 in slept
    assert [line["status"] for line in lfs_hub.log] == [200, 200] and lfs_hub.faults.left == 0


def test_faults_of_xet_reach_the_client(xet_hub, tmp_path):
    xet_hub.fault(path="/v1/xorbs/", status=503)
    xet_hub.fault(path="/v1/shards", status=403, skip=1)
    script = "api.create_repo('alice/demo'); say([failed(push, 'model.safetensors'), failed(push, 'notes/deep/zeros.bin')])"
    assert client(xet_hub, tmp_path, script) == [None, ["ConnectionError", None]]
    assert xet_hub.files("alice/demo")["model.safetensors"] == LARGE
    assert "notes/deep/zeros.bin" not in xet_hub.files("alice/demo")
    assert [line["status"] for line in xet_hub.log if "/v1/xorbs/" in line["path"]] == [503, 200, 200]


def test_large_objects_go_in_parts_and_are_checked(lfs_hub, tmp_path):
    lfs_hub.multipart_over = lfs_hub.part_size = 5_000_000
    client(lfs_hub, tmp_path, "api.create_repo('alice/demo'); push('model.safetensors'); say(None)")
    assert [line["received"] for line in lfs_hub.log if "/lfs-part/" in line["path"]].count(5_000_000) == 2
    assert lfs_hub.files("alice/demo")["model.safetensors"] == LARGE
    digest = hashlib.sha256(b"right").hexdigest()
    for content, size, status in ((b"wrong", 5, 400), (b"right", 4, 400), (b"right", 5, 200)):
        address = lfs_hub.signed("lfs-put", digest, str(size))
        assert put(address, content) == status
    assert lfs_hub.store.object_path(digest).read_bytes() == b"right"


def put(address, content):
    try:
        with urllib.request.urlopen(urllib.request.Request(address, content, method="PUT")) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


RESULT = "model-index: [{name: a, results: [{task: {type: t}, dataset: {name: d%s}, metrics: [{type: fid%s}]}]}]"


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: mit\ntags: [a, b]\n" + RESULT % (", type: t", ", value: 1"), None),
        ("license: mine", "license"),
        ("license: [", "YAML"),
        ("- license", "mapping"),
        ("tags: diffusers", "tags"),
        ("datasets: [1]", "datasets"),
        (RESULT % ("", ", value: 1"), "model-index[0].results[0].dataset.type"),
        (RESULT % (", type: t", ""), "model-index[0].results[0].metrics[0].value"),
    ],
)
def test_cards_are_checked(metadata, error):
    errors, warnings = checked(f"---\n{metadata}\n---\n# A model\n")
    assert warnings == [] and len(errors) == (error is not None)
    assert error is None or error in errors[0]


def test_the_client_says_what_is_wrong_with_a_card(lfs_hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mine\n---\n")
    said = client(lfs_hub, tmp_path, "api.create_repo('alice/demo'); say(failed(push, 'README.md'))")
    assert said == ["ValueError", 400]
    assert checked("no metadata") == ([], ["empty or missing yaml metadata in repo card"])
