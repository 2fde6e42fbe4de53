"""The page of the playground, with Gradio: controls to a `Request`, what the engine has drawn to pictures, errors to words."""

from __future__ import annotations

import html
import os
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..config.registry import SOLVERS
from ..config.schema.sampling import PlayConfig
from ..errors import DebiasError, InputError, reason
from ..utils.console import say
from .engine import CancelledError, Drawn, Engine, Stage
from .request import LOOPBACK, PlayedModel, Request

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: it sends nothing to anybody

import gradio as gr

TITLE = "debias_diffusers playground"
KEPT_SECONDS = 3600  # for which pictures on the page can be fetched again
WEIGHTS_INFO = "ema: averaged, as exported; raw; another EMA decay; or sigma_rel=0.08 of a run with --post_hoc_ema."
CSS = """
.pixelated img { image-rendering: pixelated; }
.picture img, .stage img { width: 100%; object-fit: contain; }
.picture img { box-sizing: border-box; padding-top: 2.2rem; }
.message { white-space: pre-wrap; overflow-wrap: anywhere; }
.error { color: var(--error-text-color); font-weight: 600; }
footer { display: none !important; }
"""


def serve(config: PlayConfig) -> None:
    """Serves the playground until SIGINT or SIGTERM, and removes its pictures then.

    Raises:
        InputError, HubError: as `Engine`; or the port is not free.
    """
    engine = Engine(config)
    signal.signal(signal.SIGTERM, _exit)
    folder = tempfile.mkdtemp(prefix="debias-play-")
    os.environ["GRADIO_TEMP_DIR"] = folder
    page = build(engine)
    try:
        start(page, config)
        threading.Event().wait()
    finally:
        page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)


def _exit(signum: int, _: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def start(page: gr.Blocks, config: PlayConfig) -> None:
    """Starts the server of a page, and says where it is.

    Raises:
        InputError: the port is not free.
    """
    try:
        _, url, _ = page.launch(
            server_name=config.host,
            server_port=config.port,
            theme=_theme(),
            css=CSS,
            share=False,
            quiet=True,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            footer_links=[],
            enable_monitoring=False,
            state_session_capacity=100,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise InputError(f"port is {config.port or '7860 to 7959'}, which is not free on {config.host}; take another --port") from error
    if config.host not in LOOPBACK:
        say(f"warning: host is {config.host}: everybody who can reach this machine can draw here")
    say(f"the playground is at {url} (Ctrl-C ends it)")


def _theme() -> gr.themes.Base:
    """Gradio's own with fonts of the system, which are not fetched, and with greys that can be read on white (4.5:1, WCAG AA)."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(body_text_color_subdued="*neutral_500", block_title_text_color="*neutral_700")


def build(engine: Engine) -> gr.Blocks:
    """The page of an engine."""
    models = engine.models
    first = models[0]
    text = first.task == "text_to_image"
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown(f"# {'Compare' if len(models) > 1 else 'Draw with'} {html.escape(' and '.join(map(_short_name, models)))}")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                controls = _controls(engine)
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw")
                    cancel = gr.Button("Cancel", elem_id="cancel")
                message = gr.HTML(_message("One request is drawn at a time; others wait."), elem_id="message")
            with gr.Column(scale=2, min_width=280), gr.Row():
                panels = [_Panel(number, model, pixelated=not text) for number, model in enumerate(models)]
        outputs = [message, *(part for panel in panels for part in panel.outputs)]
        drawing = gr.on(
            [draw.click, *([controls["prompt"].submit] if text else [])],
            _drawer(engine, [*controls], len(models)),
            [*controls.values()],
            outputs,
            concurrency_limit=1,
            show_progress_on=[message, *(panel.picture for panel in panels)],
            trigger_mode="once",
            api_name="draw",
        )

        def stop(request: gr.Request) -> str:
            engine.cancel(str(request.session_hash))
            return _message("Cancelled.")

        def leave(request: gr.Request) -> None:
            engine.cancel(str(request.session_hash))

        cancel.click(stop, None, message, queue=False, api_name=False)
        cancel.click(None, cancels=[drawing])  # also where it waits
        page.unload(leave)
        for panel in panels:
            panel.listen()
    page.queue(max_size=engine.config.max_queue, api_open=False)
    return page


def _controls(engine: Engine) -> dict[str, Any]:
    """The controls by the names of the fields of `Request`; weights_1 and weights_2 for the weights of each model."""
    models = engine.models
    first = models[0]
    text = first.task == "text_to_image"
    controls: dict[str, Any] = {}
    if text:
        controls["prompt"] = gr.Textbox(label="Prompt", info="Several lines are several prompts, one an image in turn.", lines=2)
        controls["negative_prompt"] = gr.Textbox(label="Negative prompt", info="What guidance leads away from.")
    elif any(model.classes for model in models):
        classes = next(model.classes for model in models if model.classes)
        controls["class_labels"] = gr.Dropdown(
            list(classes), value=[], multiselect=True, label="Class labels", info="One an image in turn; all classes if empty."
        )
    limit = engine.config.max_image_steps
    schedulers = [name for name in SOLVERS if any(name in model.schedulers for model in models)]
    controls["scheduler"] = gr.Dropdown(schedulers, value=first.scheduler, label="Scheduler (solver)")
    controls["steps"] = gr.Slider(1, 250, value=min(25 if text else 20, limit), step=1, label="Steps")
    if any(model.has_guidance for model in models):
        controls["guidance_scale"] = gr.Slider(
            1, 15, value=first.guidance_scale, step=0.1, label="Guidance scale", info="Classifier-free guidance; 1 is off."
        )
    controls["num_images"] = gr.Slider(1, 16 if text else 100, value=first.num_images, step=1, label="Number of images")
    controls["seed"] = gr.Number(0, precision=0, label="Seed", info="The same seed and settings draw the same images.")
    for number, model in enumerate(models, start=1):
        of = f" of {_short_name(model)} ({number})" if len(models) > 1 else ""
        controls[f"weights_{number}"] = gr.Dropdown(
            list(model.weights),
            value=model.weights[0],
            label=f"Weights{of}",
            info=WEIGHTS_INFO if number == 1 else None,
            allow_custom_value=True,
        )
    controls["stages"] = gr.Checkbox(
        not text, label="Watch the steps", info="Keeps x_t and the estimate of x_0 of the first images." + " Takes longer." * text
    )
    return controls


def _drawer(engine: Engine, names: Sequence[str], count: int) -> Callable[..., list[Any]]:
    """What Draw calls: from the values of the controls to the values of message and panels."""

    def draw(*values: Any, progress: Any = gr.Progress(), request: gr.Request | None = None) -> list[Any]:  # noqa: B008 - so Gradio finds it
        given = dict(zip(names, values))
        weights = [given.pop(f"weights_{number + 1}") for number in range(count)]
        session = str(request.session_hash if request else None)
        with tempfile.TemporaryDirectory() as folder:
            try:
                drawn = engine.draw(
                    Request(weights=weights, **given), session, Path(folder), lambda share, done: progress(share, desc=done)
                )
            except CancelledError:
                return [_message("Cancelled."), *_Panel.unchanged(count)]
            except DebiasError as error:
                return [_message(str(error), wrong=True), *_Panel.unchanged(count)]
            except Exception as error:  # of a library: the visitor gets words, who runs the playground the rest
                traceback.print_exc()
                return [_message(f"this cannot be drawn: {reason(error)}", wrong=True), *_Panel.unchanged(count)]
            notes = dict.fromkeys(note for each in drawn for note in each.notes)
            # Gradio serves the files from its own folder, and removes them there after KEPT_SECONDS.
            kept = tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))
            shutil.copytree(folder, kept, dirs_exist_ok=True)
        return [
            _message("\n".join(["Done.", *notes])),
            *(value for each in drawn for value in _Panel.values(each, Path(folder), Path(kept))),
        ]

    return draw


class _Panel:
    """What the page shows of one model: picture, downloads, command, stages."""

    def __init__(self, number: int, model: PlayedModel, pixelated: bool) -> None:
        classes = ["pixelated"] if pixelated else []
        with gr.Column(min_width=280):
            self.picture = gr.Image(
                label=_short_name(model),
                type="filepath",
                format="png",
                buttons=["download", "fullscreen"],
                interactive=False,
                elem_id=f"picture-{number + 1}",
                elem_classes=["picture", *classes],
            )
            self.archive = gr.DownloadButton("Download all images (.zip)", interactive=False, size="sm", elem_id=f"download-{number + 1}")
            self.command = gr.Code(
                label="The same images on the command line",
                interactive=False,
                lines=1,
                wrap_lines=True,
                show_line_numbers=False,
                elem_id=f"command-{number + 1}",
            )
            self.slider = gr.Slider(
                *(1, 2),
                step=1,
                label="Steps",
                info="Above x_t, below the estimate of x_0",
                visible=False,
                interactive=True,
                elem_id=f"steps-{number + 1}",
            )
            self.stage = gr.Image(
                show_label=False,
                type="pil",
                format="png",
                buttons=["fullscreen"],
                interactive=False,
                visible=False,
                elem_id=f"stage-{number + 1}",
                elem_classes=["stage", *classes],
            )
            self.stages = gr.State((), time_to_live=KEPT_SECONDS)

    @property
    def outputs(self) -> list[Any]:
        return [self.picture, self.archive, self.command, self.stage, self.slider, self.stages]

    @staticmethod
    def unchanged(count: int) -> list[Any]:
        return [gr.skip() for _ in range(6 * count)]

    @staticmethod
    def values(drawn: Drawn, folder: Path, kept: Path) -> list[Any]:
        stages, last = drawn.stages, len(drawn.stages)
        grid, archive = (str(kept / path.relative_to(folder)) for path in (drawn.grid, drawn.archive))
        return [
            grid,
            gr.update(value=archive, interactive=True),
            drawn.command,
            gr.update(value=stages[-1].picture if stages else None, visible=bool(stages)),
            gr.update(maximum=max(2, last), value=max(1, last), label=stages[-1].name if stages else "", visible=last > 1),
            stages,
        ]

    def listen(self) -> None:
        """Shows the stage that the slider stands at."""

        def show(place: float, stages: Sequence[Stage]) -> tuple[Any, Any]:
            if not stages:
                return gr.skip(), gr.skip()
            stage = stages[min(len(stages), max(1, int(place))) - 1]
            return stage.picture, gr.update(label=stage.name)

        self.slider.input(
            show, [self.slider, self.stages], [self.stage, self.slider], queue=False, show_progress="hidden", api_name=False,
            trigger_mode="always_last",
        )  # fmt: skip


def _short_name(model: PlayedModel) -> str:
    """The last part of a path; user/name of a Hub id, without its commit."""
    return Path(os.path.abspath(model.name)).name if Path(model.name).exists() else model.name.partition("@")[0]


def _message(text: str, wrong: bool = False) -> str:
    return f'<div class="message{" error" * wrong}" role="status">{html.escape(text)}</div>'
