"""What is on the Hub is what was trained, for us and for stock diffusers; and what is read from it is named by its commit."""

import json
import math
import re

import huggingface_hub
import pyarrow.parquet
import pytest
import torch
import yaml
from conftest import ROOT, tensors, train_args
from hub.card import checked
from pushing import Worker, copy_of, repository, served
from safetensors.torch import load

from debias_diffusers.cli import train_config
from debias_diffusers.config import hub_names
from debias_diffusers.config.loading import differences, layered, stored, update
from debias_diffusers.errors import FetchError, HubError
from debias_diffusers.hub import client, model_card
from debias_diffusers.remote import http


@pytest.fixture(scope="module")
def worker(tmp_path_factory, trained, trained_by_class):
    """Does our commands with a Hub that has two models: one trained, one trained by class."""
    with served(tmp_path_factory.mktemp("served") / "lfs", xet=False) as (server, worker):
        for name, run in (("alice/digits", trained), ("alice/classes", trained_by_class)):
            code, said = worker.push(copy_of(run, tmp_path_factory.mktemp("runs") / "run"), "--hub_model_id", name, "--hub_tags")
            assert code == 0, said
        worker.server = server
        yield worker


@pytest.fixture
def server(worker):
    worker.drain()
    worker.server.clear()
    return worker.server


def sampled(worker, model, folder, *more, **options):
    """Draws an image: (exit code, what was said)."""
    flags = ["--steps", 2, "--num_images", 1, "--num_threads", 1, "--output_dir", folder]
    code, said = worker.run("sample", model, *flags, *more, **options)
    assert "Traceback" not in said, said
    return code, said


STOCK = """
import os, sys
sys.modules |= dict.fromkeys([name for name in sys.modules if name.startswith("debias_diffusers")])  # as if it were not installed
os.chdir(sys.argv[1])
import torch
from diffusers import DDPMPipeline
from safetensors.torch import save_file
for name, options in (("plain", {}), ("variant", {"variant": "ema_0_99"}), ("tag", {"revision": "step-00000024"})):
    pipeline = DDPMPipeline.from_pretrained("alice/digits", **options)
    save_file(pipeline.unet.state_dict(), f"{name}.safetensors")
pipeline(batch_size=2, num_inference_steps=3, generator=torch.Generator().manual_seed(0)).images[1].save("drawn.png")
"""


def test_stock_diffusers_loads_a_pushed_run_and_its_averages_bit_for_bit(worker, server, trained, tmp_path):
    worker.script(STOCK, tmp_path)
    checkpoint = tensors(trained, 24)
    for name, rate in (("plain", "ema_0.9"), ("variant", "ema_0.99"), ("tag", "ema_0.9")):
        loaded, kept = load((tmp_path / f"{name}.safetensors").read_bytes()), load(checkpoint[f"{rate}.safetensors"])
        assert loaded.keys() == kept.keys() and all(torch.equal(loaded[key], kept[key]) for key in kept)
    assert (tmp_path / "drawn.png").is_file()


OURS = """
import sys
from debias_diffusers import PixelPipeline
from safetensors.torch import save_file
pipeline = PixelPipeline.from_pretrained("alice/classes", revision="step-00000006")
save_file(pipeline.unet.state_dict(), sys.argv[1])
assert pipeline.num_classes == 10 and pipeline.config.null_label == 10
pipeline(batch_size=2, class_labels=[3, 4], guidance_scale=2, num_inference_steps=3)
"""


def test_a_class_conditional_model_comes_back_through_our_pipeline(worker, server, trained_by_class, tmp_path):
    worker.script(OURS, tmp_path / "classes.safetensors")
    loaded = load((tmp_path / "classes.safetensors").read_bytes())
    kept = load(tensors(trained_by_class, 6)["ema_0.9.safetensors"])
    assert loaded.keys() == kept.keys() and all(torch.equal(loaded[key], kept[key]) for key in kept)


def test_drawing_from_the_hub_is_drawing_from_the_run_and_names_the_commit(worker, server, trained, tmp_path):
    for model, folder in (("alice/digits", "hub"), (trained, "here")):
        code, said = sampled(worker, model, tmp_path / folder, "--weights", 0.99)
        assert code == 0, said
    assert (tmp_path / "hub" / "000000.png").read_bytes() == (tmp_path / "here" / "000000.png").read_bytes()
    settings = [json.loads((tmp_path / folder / ".sampling.json").read_text()) for folder in ("hub", "here")]
    assert settings[0].pop("model") == f"alice/digits@{server.commits('alice/digits')[0]['id']}"
    assert [each.pop("model_step") for each in settings] == [None, 24]
    assert settings[0] == settings[1]
    code, said = sampled(worker, "alice/digits", tmp_path / "none", "--weights", 0.5)
    assert code == 2 and "no weights ema_0_5" in said and "--weights ema" in said


def test_scoring_from_the_hub_knows_the_data_and_names_the_commit(worker, server, tmp_path):
    flags = ["--metrics", "fid,colour", "--num_images", 70, "--steps", 2, "--num_threads", 1, "--output", tmp_path / "score.json"]
    code, said = worker.run("evaluate", "score", "alice/digits", *flags)
    assert code == 0, said
    result = json.loads((tmp_path / "score.json").read_text())
    assert result["reference"]["name"] == "digits" and result["extractor"]["name"] == "digits"
    assert result["targets"][0]["target"] == f"alice/digits@{server.commits('alice/digits')[0]['id']}"


@pytest.mark.nightly  # a thousand noise levels
def test_bounding_bits_from_the_hub_knows_the_data_and_names_the_commit(worker, server, tmp_path):
    flags = ["--num_images", 2, "--num_threads", 1, "--output", tmp_path / "bits.json"]
    code, said = worker.run("evaluate", "bpd", "alice/digits@step-00000024", *flags)
    assert code == 0, said
    commit = server.commits("alice/digits")[0]["id"]
    assert json.loads((tmp_path / "bits.json").read_text())["model"] == f"alice/digits@{commit}"


def test_a_model_fine_tuned_from_the_hub_starts_with_its_weights(worker, server, trained, tmp_path):
    flags = ["--init", "alice/digits", "--learning_rate", 1e-30, "--max_steps", 4]
    code, said = worker.run("train", *train_args(tmp_path / "run", *flags)[1:])
    assert code == 0 and "starting from the weights of alice/digits@" in said, said
    now, before = (load(data) for data in (tensors(tmp_path / "run", 4)["model.safetensors"], tensors(trained, 24)["ema_0.9.safetensors"]))
    assert all(torch.equal(now[name], before[name]) for name in before)


# ---- without an answer -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["offline", "unreachable"])
def cut_off(request, worker, server):
    """Has the cache of the other process."""
    if request.param == "unreachable":
        server.fault(action="drop", times=math.inf)
        yield worker
        return
    yield Worker(server, worker.home, HF_HUB_OFFLINE="1")


@pytest.fixture
def drawn_before(worker, server, tmp_path):
    assert sampled(worker, "alice/digits", tmp_path / "before")[0] == 0


def test_without_the_hub_the_cache_serves_and_this_is_said(drawn_before, cut_off, server, tmp_path):
    code, said = sampled(cut_off, "alice/never-seen", tmp_path / "cold")
    assert code == 7 and "asking the Hub for model alice/never-seen" in said
    code, said = sampled(cut_off, "alice/digits", tmp_path / "after")
    commit = server.commits("alice/digits")[0]["id"]
    assert code == 0 and f"taken from the cache as of commit {commit}, which may not be its newest" in said
    assert (tmp_path / "after" / "000000.png").read_bytes() == (tmp_path / "before" / "000000.png").read_bytes()


def test_a_server_that_fails_is_said_and_its_no_is_not_hidden_by_the_cache(worker, server, tmp_path):
    assert sampled(worker, "alice/digits", tmp_path / "before")[0] == 0
    server.fault(path="/api/models/alice/digits$", status=500, times=10)
    code, said = sampled(worker, "alice/digits", tmp_path / "failing")
    assert code == 0 and "500" in said and "may not be its newest" in said
    server.clear()
    repository(server, "alice/digits").private = True
    try:
        code, said = sampled(worker, "alice/digits", tmp_path / "refused", token="")
        assert code == 7 and "no such repository, or the token may not see it" in said
        code, said = sampled(worker, "alice/digits", tmp_path / "wrong", token="hf_wrong")
        assert code == 7 and "invalid token (401)" in said and "hf_wrong" not in said
        code, said = sampled(worker, "alice/digits", tmp_path / "mine")
        assert code == 0, said
    finally:
        repository(server, "alice/digits").private = False


def test_dropped_connections_while_loading_are_tried_again(worker, server, trained, tmp_path):
    assert worker.push(copy_of(trained, tmp_path / "run"), "--hub_model_id", "alice/new")[0] == 0
    server.clear()
    listing = ["/tree/"] if int(huggingface_hub.__version__.partition(".")[0]) >= 2 else []  # older ones take it from the answer before
    for path in ("/api/models/alice/new$", *listing, "/resolve/.*json", "/cdn/"):
        server.fault(method="GET", path=path, action="drop")
    code, said = sampled(worker, "alice/new", tmp_path / "drawn")
    assert code == 0 and "trying again" in said, said
    assert server.faults.left == 0


@pytest.mark.parametrize(
    "name, named",
    [
        ("alice/nothing", "no such repository"),
        ("alice/digits@step-99999999", "no such branch, tag or commit"),
        ("runs/missing", "no such folder here"),
    ],
)
def test_what_is_not_on_the_hub_is_said(worker, server, tmp_path, name, named):
    code, said = sampled(worker, name, tmp_path / "drawn")
    assert code == 7 and f"error: asking the Hub for model {name}" in said and named in said


# ---- data ------------------------------------------------------------------------------------------------------------


UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("alice/set", repo_type="dataset", exist_ok=True)
commit = api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo="train.parquet", repo_id="alice/set", repo_type="dataset")
print(commit.oid)
"""


def commit_of(said):
    return re.search(r"^[0-9a-f]{40}$", said, re.M)[0]


def test_a_run_learns_from_the_commit_of_a_data_set_that_it_began_with(worker, server, tmp_path):
    digits = pyarrow.parquet.read_table(ROOT / "debias_diffusers" / "data" / "digits.parquet")
    pyarrow.parquet.write_table(digits.slice(0, 300), tmp_path / "set.parquet")
    first = commit_of(worker.script(UPLOAD, tmp_path / "set.parquet"))

    def train(steps, folder="run"):
        flags = ["--dataset", "alice/set", "--num_workers", 0, "--max_steps", steps]
        code, said = worker.run("train", *train_args(tmp_path / folder, *flags)[1:])
        assert code == 0, said
        return json.loads((tmp_path / folder / "config.json").read_text())["dataset"]

    assert train(4) == f"alice/set@{first}"
    pyarrow.parquet.write_table(digits.slice(0, 100), tmp_path / "fewer.parquet")
    second = commit_of(worker.script(UPLOAD, tmp_path / "fewer.parquet"))
    assert train(6) == f"alice/set@{first}"  # and no word of changed data
    text = (tmp_path / "run" / "README.md").read_text()
    assert f"at revision `{first}`" in text and "datasets:\n- alice/set\n" in text and "300 images" in text
    assert train(4, "new") == f"alice/set@{second}" and "100 images" in (tmp_path / "new" / "README.md").read_text()


# ---- names, cards and errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, is_one",
    [
        ("user/name", True),
        ("user/name@v1.0", True),
        ("user/name@refs/pr/1", True),
        ("tests/conftest.py", False),
        ("../name", False),
        ("user", False),
        ("/user/name", False),
        ("~/name", False),
        ("user/name/more", False),
        ("user/na me", False),
        ("", False),
    ],
)
def test_names_of_repositories(name, is_one, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hub_names.is_model_id(name) == is_one


def test_a_resume_may_say_the_name_without_the_commit_but_not_another_one():
    before = {"init": f"user/name@{'a' * 40}", "dataset": "user/set"}
    for now, same in (
        ("user/name", True),
        ("user/name@main", True),
        (f"user/name@{'a' * 40}", True),
        (f"user/name@{'b' * 40}", False),
        ("user/other", False),
        (None, False),
    ):
        assert (differences(before, {**before, "init": now}) == []) == same
    assert differences(before, {**before, "dataset": "user/set@v1"})


MEASURED = {"step": 20, "by": {"images": 80, "extractor": "digits"}, "figures": {"fid": 3.25, "kid": float("nan"), "precision": 0.5}}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dataset": f"user/set@{'c' * 40}", "init": f"user/base@{'d' * 40}", "ema_decay": (0.9, 0.5)},
        {"dataset": "data/photos", "init": "runs/first"},
        {"dataset": "a folder/of: images", "init": "runs/one: two"},
        {"weighting": "p2", "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("license", [None, "cc-by-4.0"])
def test_the_card_is_valid_by_the_hubs_own_rules_and_names_what_was_trained(change, license):
    config = update(layered(stored(train_config([str(arg) for arg in train_args("x")[1:]], None))), change)
    for measured in (None, MEASURED):
        text = model_card.published(model_card.model_card(config, 20, 0, 1797, measured), "alice/digits", license, "samples.png")
        errors, warnings = checked(text)
        assert errors == [] and warnings == []
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["license"] == (license or "unknown") and f"Licence of this model: `{license or 'unknown'}`" in text
        assert front.get("datasets") == (["user/set"] if "@" in change.get("dataset", "") else None)
        assert front.get("base_model") == (["user/base"] if "@" in change.get("init", "") else None)
        assert ("model-index" in front) == (measured is not None)
        if measured:
            assert front["model-index"][0]["name"] == "digits"
            (result,) = front["model-index"][0]["results"]
            assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {"fid": 3.25, "precision": 0.5}
            assert "| `fid` | 3.25 |" in text
        assert 'from_pretrained("alice/digits")' in text and "(samples.png)" in text and "PATH" not in text
        assert "Unmasking Bias in Diffusion Model Training" in text and config.objective.weighting in text


def test_a_token_that_cannot_be_one_is_not_quoted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_with a blank")
    client.api.cache_clear()
    with pytest.raises(HubError, match="characters that no token has") as error:
        client.api()
    assert "blank" not in str(error.value)
    client.api.cache_clear()


@pytest.mark.parametrize("name, value", [("ALL_PROXY", "ftp://localhost:9"), ("SSL_CERT_FILE", "/nothing/here.pem")])
def test_an_environment_that_no_client_can_be_made_with_is_one_sentence(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    huggingface_hub.close_session()
    client.api.cache_clear()
    with pytest.raises(HubError, match=f"no connection can be made as the environment has it .*{name}"):
        client.api()
    http._client.cache_clear()
    with pytest.raises(FetchError, match=f"no connection can be made as the environment has it .*{name}"):
        http.find("http://127.0.0.1:9/data.tar")
    client.api.cache_clear()


def test_what_the_client_says_is_told_without_the_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert client.said(RuntimeError("Bearer hf_secret was\nrefused")) == "Bearer TOKEN was refused"
    assert "hf_" not in client.said(RuntimeError("x" * 394 + " hf_secret"))


@pytest.mark.parametrize("name", ["a/b--c", "x/y.git"])
def test_a_name_that_the_hub_does_not_allow_is_not_asked_for_again(name):
    with pytest.raises(HubError, match=re.escape(name)) as error:
        client.pinned(name)
    assert not isinstance(error.value, client.UnreachableError)
