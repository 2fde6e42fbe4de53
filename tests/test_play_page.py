"""The page of the playground in Chromium: it draws, compares, refuses, cancels and shows the steps; and a Space starts it."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import threading

import numpy as np
import pytest
from conftest import STARTED, command, wait_for
from PIL import Image

from debias_diffusers import cli

pytestmark = pytest.mark.nightly
WAIT = 300_000  # milliseconds after which what a page shows is taken to hang


@contextlib.contextmanager
def started(*arguments, **options):
    """The address of a playground; what else it said."""
    process = command(*arguments, **options)
    STARTED.remove(process)  # it serves several tests, and is ended here
    said = []
    reader = threading.Thread(target=lambda: said.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        wait_for(lambda: process.poll() is not None or any("http://" in line for line in said))
        assert process.poll() is None, "".join(said)
        yield re.search(r"http://\S+", "".join(said))[0], said
    finally:
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM


@contextlib.contextmanager
def opened(browser, url, **options):
    """A page, which asks no other server for anything and has no errors in its console."""
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
    page.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:")) else wrong.append(request.url))
    page.goto(url)
    page.wait_for_selector("#draw")
    yield page
    context.close()
    assert wrong == []


def draw(page, until="Done."):
    page.click("#draw")
    page.wait_for_function("text => document.querySelector('#message').innerText.includes(text)", arg=until)


def fill(page, label, value):
    control = page.get_by_label(label, exact=True).locator("visible=true").first
    control.fill(str(value))
    control.press("Tab")


@pytest.fixture(scope="module")
def run(trained_by_class, tmp_path_factory):
    return shutil.copytree(trained_by_class, tmp_path_factory.mktemp("play") / "run")


@pytest.fixture(scope="module")
def two(run):
    """A playground of a run twice."""
    with started("-m", "debias_diffusers.play", run, run, "--num_threads", 1, "--max_image_steps", 30_000) as (url, said):
        assert url.startswith("http://127.0.0.1:")
        yield url
    assert "Traceback" not in "".join(said)


def downloaded(page, selector, path):
    with page.expect_download() as found:
        page.click(selector)
    found.value.save_as(path)
    return path


def test_it_draws_and_compares_and_the_shown_command_repeats_the_picture(browser, two, run, tmp_path):
    with opened(browser, two) as page:
        page.get_by_label("Weights of run (2)").fill("raw")
        page.get_by_label("Weights of run (2)").press("Enter")
        fill(page, "Seed", 3)
        draw(page)
        for number, weights in ((1, "ema"), (2, "raw")):
            words = shlex.split(page.locator(f"#command-{number} .cm-content").inner_text().replace("\n", " "))
            assert words[0] == "debias-sample" and "--seed" in words and ("raw" in words) == (weights == "raw")
            assert cli.sample(words[1:]) == 0
            (folder,) = [path for path in (run / "samples").iterdir() if ("raw" in path.name) == (weights == "raw") and path.is_dir()]
            archive = downloaded(page, f"#download-{number}", tmp_path / f"{number}.zip")
            shutil.unpack_archive(archive, tmp_path / str(number))
            for path in folder.glob("*.png"):
                np.testing.assert_array_equal(Image.open(path), Image.open(tmp_path / str(number) / path.name))
            picture = downloaded(page, f"#picture-{number} [aria-label=Download]", tmp_path / f"{number}.png")
            np.testing.assert_array_equal(Image.open(picture).convert("RGB"), Image.open(folder / "preview" / "grid.png").convert("RGB"))


def test_the_slider_shows_x_t_and_x_0_of_a_step(browser, two):
    with opened(browser, two, viewport={"width": 390, "height": 844}, color_scheme="dark") as page:
        draw(page)
        image = page.locator("#stage-1 img")
        last = image.get_attribute("src")
        page.locator("#steps-1 input[type=range]").fill("1")
        page.wait_for_function("before => document.querySelector('#stage-1 img').src !== before", arg=last)
        assert "t = 999, evaluation 1 of 20" in page.locator("#steps-1").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_bad_input_is_refused_in_words_and_the_next_request_is_drawn(browser, two):
    with opened(browser, two) as page:
        fill(page, "Seed", -1)
        draw(page, "seed is -1, but must be at least 0 and below 2^32")
        fill(page, "Seed", 0)
        draw(page)


def test_a_request_is_cancelled(browser, two):
    with opened(browser, two) as page:
        page.locator("input[aria-label*='Steps']").first.fill("250")
        page.click("#draw")
        page.wait_for_function("document.body.innerText.includes('of 250 evaluations')")
        page.click("#cancel")
        page.wait_for_function("document.querySelector('#message').innerText.includes('Cancelled.')")
        page.locator("input[aria-label*='Steps']").first.fill("4")
        draw(page)


def test_a_text_to_image_model_draws_prompts(browser, text_models):
    with started("-m", "debias_diffusers.play", text_models["xl"], "--num_threads", 1) as (url, said), opened(browser, url) as page:
        draw(page, "prompt is empty; write what to draw")
        page.locator("textarea").first.fill("a handwritten seven")
        page.get_by_label("Watch the steps").check()
        draw(page)
        assert "--prompt 'a handwritten seven'" in page.locator("#command-1 .cm-content").inner_text().replace("\n", " ")
        page.locator("#stage-1 img").wait_for()
    assert "Traceback" not in "".join(said)


def test_a_space_starts_with_a_local_model(browser, run, tmp_path):
    assert cli.play([str(run), "--space", str(tmp_path / "space"), "--num_threads", "1"]) == 0
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "space"), "TMPDIR": str(temporary)}
    environment.pop("SPACE_ID", None)
    with started("app.py", cwd=tmp_path / "space", env=environment) as (url, said), opened(browser, url) as page:
        draw(page)
        assert list(temporary.glob("debias-play-*"))
    assert "warning: host" not in "".join(said)
    assert list(temporary.glob("debias-play-*")) == []  # its pictures
