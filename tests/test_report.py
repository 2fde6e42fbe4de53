"""`eval.py report`: what stands on the page against the files of the runs, and the page in a browser."""

import base64
import json
import re
import shutil
from html import unescape

import pytest
from conftest import metrics
from PIL import Image

from debias_diffusers import cli
from debias_diffusers.analysis.charts import chart, scale_of
from debias_diffusers.analysis.figures import Curve
from debias_diffusers.analysis.run_files import read_runs
from debias_diffusers.analysis.run_report import POINTS, differing, grouped, make_page, spread
from debias_diffusers.config.schema.evaluation import ReportConfig
from debias_diffusers.config.schema.objective import ObjectiveConfig
from debias_diffusers.config.validation.evaluation import report_problems
from debias_diffusers.diffusion.noise_schedule import make_schedule
from debias_diffusers.hub.model_card import CITATION
from debias_diffusers.utils.files import acquire_lock

SCORE = {"target": "", "images": 300, "scheduler": "unipc", "steps": 10, "fid": 3.25, "intervals": {"fid": [3.0, 3.5]}}


def scores_of(*targets):
    rows = [{**SCORE, "target": str(target)} for target in targets]
    return json.dumps({"reference": {"name": "digits"}, "extractor": {"name": "digits"}, "targets": rows})


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Two runs: of the second the weighting is said to be another, it stopped at step 12, and it has no grids."""
    root = tmp_path_factory.mktemp("reports")
    first, second = (shutil.copytree(trained, root / name) for name in ("first", "second"))
    (first / "samples").mkdir(exist_ok=True)
    for k, step in enumerate((8, 16, 24)):
        Image.new("L", (200, 200), 80 * k).save(first / "samples" / f"step-{step:08d}.png")
    (first / "scores.json").write_text(scores_of(first, "elsewhere"))
    config = json.loads((second / "config.json").read_text())
    (second / "config.json").write_text(json.dumps(config | {"weighting": "constant", "sample_every": 5}))
    shutil.rmtree(second / "checkpoints")
    lines = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
    evaluated = json.dumps({"step": 12, "eval_fid": 31.5, "eval_precision": float("nan")}) + "\n"
    (second / "metrics.jsonl").write_text("".join([*lines[:12], evaluated, lines[12][:20]]))  # a line that is being written
    (second / "README.md").unlink()
    return first, second


def page_of(*folders, scores=()):
    command = ["report", *map(str, folders), "--output", str(folders[0].parent / "report.html")]
    assert cli.evaluate([*command, *(["--scores", *map(str, scores)] if scores else [])]) == 0
    return (folders[0].parent / "report.html").read_text()


def charts(page):
    """The numbers of each chart: (x, y) by title and label."""
    parts = re.findall(
        r'<figure class="chart"><h3>([^<]*?)(?: <span.*?</span>)?</h3>.*?<script type="application/json">(.*?)</script>', page, re.DOTALL
    )
    return {unescape(title): {line["label"]: (line["x"], line["y"]) for line in json.loads(text)["lines"]} for title, text in parts}


def test_the_numbers_of_the_page_are_those_of_the_run(runs):
    first, second = runs
    page = page_of(first, second)
    found, lines = charts(page), metrics(first)
    steps = [line["step"] for line in lines]
    for title, name in (("Loss", "loss"), ("Gradient norm", "grad_norm"), ("Learning rate", "learning_rate")):
        assert found[title]["first"][0] == steps
        assert found[title]["first"][1] == pytest.approx([line[name] for line in lines], rel=1e-5)
    assert found["Images per second"]["second"][0] == list(range(1, 13))  # the half line is left out
    for k in range(10):
        seen = [(line["step"], line["loss_by_t"][k]) for line in lines if line["loss_by_t"][k] is not None]
        x, y = found["Loss by timestep, first"][f"{k / 10:.1f} to {(k + 1) / 10:.1f}"]
        assert x == [step for step, _ in seen] and y == pytest.approx([value for _, value in seen], rel=1e-5)
        last = [value for _, value in seen[-max(1, len(seen) // 10) :]]
        assert found["Loss by timestep, at the end"]["first"][1][k] == pytest.approx(sum(last) / len(last), rel=1e-5)
    assert found["fid"] == {"second": ([12], [31.5])}
    # The debiased weight is 1/sqrt(SNR) on the noise, the constant one 1; both as shares of their sum.
    (x, y), (_, constant) = (found["Weight of the error of epsilon"][name] for name in ("first", "second"))
    expected = make_schedule(ObjectiveConfig()).snr.rsqrt()
    assert y == pytest.approx((expected / expected.sum())[x].tolist(), rel=1e-4) and set(constant) == {0.001}
    for text in ("finished at step 24", "step 12 of 24, not training now", "3.25 (3 to 3.5)", "against digits", "31.5 (step 12)"):
        assert text in page
    assert page.count("<td>3.25 (3 to 3.5)</td>") == 1  # not that of the other target
    assert '<tr class=marked><th scope="row">weighting</th><td>debiased</td><td>constant</td></tr>' in page
    assert "second has no grids yet." in page and "second has no model card yet" in page
    assert unescape(page).count(CITATION.splitlines()[1]) >= 1


def test_the_time_of_the_steps_is_that_of_the_batches_that_each_had(runs, tmp_path):
    """Two lines of 10 steps at 100 images a second: of 60 images each, 6 seconds, and since a change of 600 each, a minute."""
    folder = shutil.copytree(runs[1], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    change = {"step": 10, "name": "batch_size", "before": 60, "after": 600}
    (folder / "config.json").write_text(json.dumps(config | {"batch_size": 600, "changes": [change]}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "images_per_second": 100}) + "\n" for step in (10, 20)))
    assert "<th>time of the steps</th><td>1.1 min</td>" in re.sub(r"<th[^>]*>", "<th>", page_of(folder))


def test_a_page_needs_no_other_file_and_has_the_grids(runs):
    page = page_of(runs[0])
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "@import" not in page and "url(" not in page
    images = re.findall(r'<img alt="(Images drawn by first at step \d+)" data-step="(\d+)" src="data:image/png;base64,([^"]*)"', page)
    assert [step for _, step, _ in images] == ["8", "16", "24"]
    assert all(base64.b64decode(data).startswith(b"\x89PNG") for *_, data in images)
    assert 'href="#grids-over-time"' in page and 'id="grids-over-time"' in page
    for attribute in ("aria-label=", "prefers-color-scheme: dark", "width=device-width", 'lang="en"'):
        assert attribute in page


def test_a_run_that_trains_has_just_begun_or_logs_nothing(runs, tmp_path):
    first, _ = runs
    folder = tmp_path / "begun"
    folder.mkdir()
    config = json.loads((first / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"log_every": 0, "sample_every": 0}))
    with acquire_lock(folder):
        page = page_of(folder)
    for text in ("not begun, training now", "log_every is 0", "sample_every is 0", "No metrics", "Not known yet", "no model card yet"):
        assert text in page
    assert "<script" in page and list(charts(page)) == ["Weight of the error of epsilon"]


def test_weights_that_were_learned_are_not_drawn_as_those_of_the_weighting(runs, tmp_path):
    (tmp_path / "learned").mkdir()
    config = json.loads((runs[0] / "config.json").read_text())
    (tmp_path / "learned" / "config.json").write_text(json.dumps(config | {"learned_uncertainty": True}))
    page = make_page(read_runs([str(tmp_path / "learned")]), []).html().decode()
    assert "The weights of learned were learned with it" in page and "Weight of the error of epsilon" not in charts(page)


def test_scores_that_are_named_or_moved_with_the_run(runs, tmp_path, capsys):
    first, _ = runs
    page = make_page(read_runs([str(first)]), []).html().decode()
    assert "3.25 (3 to 3.5)" not in page
    moved = shutil.copytree(first, tmp_path / "first")
    (first.parent / "named.json").write_text(scores_of(first / "samples"))
    assert page_of(moved).count("3.25 (3 to 3.5)") == 1  # those in it name where it was
    assert page_of(first, scores=[first.parent / "named.json"]).count("3.25 (3 to 3.5)") == 2
    for content, said in ((scores_of("elsewhere"), "has none of these runs"), ("{}", "is no file of eval.py score")):
        (tmp_path / "other.json").write_text(content)
        assert cli.evaluate(["report", str(first), "--scores", str(tmp_path / "other.json")]) == 2
        assert said in capsys.readouterr().err


def test_what_is_wrong_with_a_command_is_said_at_once(tmp_path, capsys):
    for given, said in (
        ({"runs": ()}, "runs are missing"),
        ({"runs": ("a", "a")}, "each can be named once"),
        ({"runs": ("a",), "output": "page.txt"}, "must name an .html file"),
    ):
        (problem,) = report_problems(ReportConfig(**given))
        assert said in problem
    assert cli.evaluate(["report", str(tmp_path), "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "is no run directory" in said and "'nowhere' does not exist" in said


def test_a_page_of_others_is_not_overwritten(runs, tmp_path, capsys):
    (tmp_path / "mine.html").write_text("<html></html>")
    assert cli.evaluate(["report", str(runs[0]), "--output", str(tmp_path / "mine.html")]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<html></html>"


def test_long_curves_are_means_of_lines_with_their_range():
    points = [(10 * k, float(k)) for k in range(1, 251)]
    curve = grouped(points)
    assert len(curve.x) == 84 <= POINTS and curve.x[-1] == 2500
    assert (curve.y[0], curve.low[0], curve.high[0], curve.y[-1]) == (2.0, 1.0, 3.0, 250.0)
    assert grouped(points[:POINTS]) == Curve([x for x, _ in points[:POINTS]], [y for _, y in points[:POINTS]], [], [])
    assert spread(range(50), 24)[::23] == [0, 49] and len(set(spread(range(50), 24))) == 24
    assert differing([{"a": (1, 2), "b": 1}, {"a": [1, 2], "b": None}]) == ["b"]


def test_a_chart_of_one_point_of_equal_and_of_hostile_values():
    made = chart("A <b>", {"</script>": Curve([5], [0.0]), "b": Curve([5, 6], [0.0, 0.0])}, {"</script>": 0, "b": 9}, "step", "linear")
    assert made.count("</script>") == 1 and "<b>" not in made and "nan" not in made and "dash1" in made
    assert re.findall(r'<circle class="dot run0 dash0" cx="([\d.]+)"', made)


def test_a_long_curve_whose_range_reaches_to_0_has_a_linear_scale():
    lines = {"a": grouped([(k, float(k - 1)) for k in range(1, 251)])}
    assert lines["a"].low[0] == 0 < min(lines["a"].y) and scale_of(lines) == "linear"
    assert '"log":false' in chart("Loss", lines, {"a": 0}, "step", scale_of(lines))
    assert scale_of({"a": grouped([(k, float(k)) for k in range(1, 251)])}) == "log"


def test_groups_of_scores_say_how_they_were_drawn(runs):
    """The same two runs with 5 and with 20 steps, and a figure that was not finite."""
    first, second = runs
    scores = json.loads(scores_of(first, second))
    drawn = {"targets": [str(first), str(second)], "training_seeds": [0, 1], "scheduler": "ddim"}
    scores["groups"] = [
        {**drawn, "steps": 5, "figures": {"fid": {"mean": 8.0, "low": 7.0, "high": 9.0}}},
        {**drawn, "steps": 20, "figures": {"fid": {"mean": None, "low": None, "high": None}}},
    ]
    (first.parent / "groups.json").write_text(json.dumps(scores))
    page = page_of(first, second, scores=[first.parent / "groups.json"])
    assert "<td>first, second</td><td>5</td><td>8 (7 to 9)</td>" in page and "<td>first, second</td><td>20</td><td></td>" in page


# ---- in Chromium -----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(browser, runs, request):
    """The page of both runs, and what its console said."""
    page_of(*runs)
    context = browser.new_context(**request.param)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda wanted: said.append(wanted.url) if not wanted.url.startswith(("file:", "data:")) else None)
    page.goto((runs[0].parent / "report.html").as_uri())
    yield page
    assert said == []
    context.close()


WIDE, PHONE = {"viewport": {"width": 1280, "height": 900}}, {"viewport": {"width": 360, "height": 740}, "has_touch": True}


@pytest.mark.nightly
@pytest.mark.parametrize("opened", [WIDE], indirect=True)
def test_the_slider_and_the_charts_answer_to_keys_and_pointer(opened):
    slider, shown = opened.get_by_label("Training step"), opened.locator(".pictures img:visible")
    assert shown.get_attribute("data-step") == "24"
    slider.press("ArrowLeft")
    assert shown.get_attribute("data-step") == "16" and slider.get_attribute("aria-valuetext") == "step 16"
    slider.press("Home")
    assert shown.get_attribute("data-step") == "8" and opened.locator(".pictures .at").inner_text() == "step 8"
    first = opened.locator(".chart").first
    assert "step 24:" in first.locator(".readout").inner_text()
    first.locator("svg").first.press("Home")
    assert "step 1:" in first.locator(".readout").inner_text() and first.locator(".cursor circle").count() == 2
    first.locator("svg").first.hover()
    assert not re.search(r"step (1|24):", first.locator(".readout").inner_text())


@pytest.mark.nightly
@pytest.mark.parametrize("opened", [PHONE], indirect=True)
def test_a_phone_scrolls_down_only(opened):
    opened.evaluate("document.querySelectorAll('details').forEach((each) => each.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth") == 360
    sizes = opened.evaluate("[...document.querySelectorAll('.chart text')].map((each) => each.getBoundingClientRect().height)")
    assert min(sizes) > 9  # pixels


@pytest.mark.nightly
@pytest.mark.parametrize("opened", [WIDE | {"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True)
def test_text_and_lines_stand_out_in_light_and_dark(opened, tmp_path, request):
    """The contrast ratio of WCAG: 4.5 for text, 3 for the lines of charts."""
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    dark = request.node.callspec.params["opened"]["color_scheme"] == "dark"
    assert (Image.open(tmp_path / "page.png").convert("L").getpixel((2, 2)) < 60) == dark
    colours = opened.evaluate(
        """() => [...document.querySelectorAll("p, td, th, a, figcaption, .line")].map((each) => {
          const style = getComputedStyle(each), line = each.classList.contains("line");
          let behind = each;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
          return [line ? style.stroke : style.color, getComputedStyle(behind).backgroundColor, line ? 3 : 4.5];
        })"""
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour, behind, least in {tuple(each) for each in colours}:
        light, deep = sorted((luminance(colour), luminance(behind)), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= least, (colour, behind)
