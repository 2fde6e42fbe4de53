"""Reports as one HTML file: text, tables and figures, without anything from elsewhere."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from .. import __version__
from ..errors import InputError
from ..hub.model_card import CITATION
from ..utils.files import read_file

GENERATOR = '<meta name="generator" content="debias_diffusers'
# A browser that opens the page loads nothing, whatever is in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --faint: #5a6470; --line: #d5dae0; --card: #f5f7f9;
  --mark: #fff3c4; --link: #0b57d0;
  --run0: #0b62c4; --run1: #c2410c; --run2: #15803d; --run3: #9333ea; --run4: #a16207; --run5: #be185d; --run6: #0e7490; --run7: #52525b;
  --light: 33%; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --text: #e4e8ec; --faint: #9aa5b1; --line: #343b43; --card: #1d2126; --mark: #4a3f14; --link: #8ab4f8;
    --run0: #62a8ff; --run1: #ff9552; --run2: #5fd38a; --run3: #c99bff; --run4: #e6c04a; --run5: #ff86b6; --run6: #4fd0e6; --run7: #b4b4bd;
    --light: 66%; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1rem; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { font-size: 1rem; margin: .2rem 0 .4rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0; }
nav a { padding: .25rem 0; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem; min-width: 0; }
figure div { overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 3px; }
.wide { grid-column: 1 / -1; }
.wide img { width: auto; max-width: 100%; margin: 0 auto; }
figcaption, .faint { color: var(--faint); font-size: .9rem; }
figcaption { padding: .4rem .2rem 0; }
.faint { font-weight: normal; }
.table { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; color: var(--faint); padding-bottom: .3rem; }
summary { cursor: pointer; color: var(--faint); padding: .4rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tr.marked { background: var(--mark); }
.words th, .words td { text-align: left; white-space: normal; vertical-align: top; max-width: 26rem; overflow-wrap: break-word; }
.words th { min-width: 6rem; overflow-wrap: normal; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .75rem;
      font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60rem; margin: .5rem 0; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .5rem 0; padding: 0; list-style: none; overflow-wrap: anywhere; }
.swatch { width: 24px; height: 8px; display: inline-block; vertical-align: middle; margin-right: .35rem; }
.chart > svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
.chart > svg:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.chart figcaption:empty { display: none; }
.chart figcaption p { margin: 0; }
.end { text-anchor: end; } .middle { text-anchor: middle; }
.rule { stroke: var(--line); stroke-width: 1; fill: none; } .axis { stroke: var(--faint); stroke-width: 1; fill: none; }
.line { stroke: var(--c); stroke-width: 1.8; fill: none; stroke-linejoin: round; } .dot { fill: var(--c); }
.band { fill: var(--c); opacity: .16; } .cursor path { stroke: var(--text); stroke-width: 1; stroke-dasharray: 3 3; }
.dash1 { stroke-dasharray: 6 3; } .dash2 { stroke-dasharray: 2 3; } .dash3 { stroke-dasharray: 8 3 2 3; }
.run0 { --c: var(--run0); } .run1 { --c: var(--run1); } .run2 { --c: var(--run2); } .run3 { --c: var(--run3); }
.run4 { --c: var(--run4); } .run5 { --c: var(--run5); } .run6 { --c: var(--run6); } .run7 { --c: var(--run7); }
.part0 { --c: hsl(265 65% var(--light)); } .part1 { --c: hsl(235 65% var(--light)); } .part2 { --c: hsl(210 70% var(--light)); }
.part3 { --c: hsl(190 75% var(--light)); } .part4 { --c: hsl(165 75% var(--light)); } .part5 { --c: hsl(130 60% var(--light)); }
.part6 { --c: hsl(80 70% var(--light)); } .part7 { --c: hsl(45 85% var(--light)); } .part8 { --c: hsl(22 85% var(--light)); }
.part9 { --c: hsl(0 75% var(--light)); }
.readout { min-height: 1.4rem; margin: .2rem; font-size: .85rem; line-height: 1.4; font-variant-numeric: tabular-nums; max-width: none; }
.readout span { margin-right: .8rem; white-space: nowrap; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.pictures img[hidden] { display: none; }
.pictures .small { image-rendering: pixelated; }
.slider { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: center; position: sticky; top: 0; background: var(--back);
          padding: .6rem 0; z-index: 1; }
.slider input { flex: 1 1 12rem; min-width: 0; height: 2rem; accent-color: var(--link); }
.slider output { font-variant-numeric: tabular-nums; }
footer { color: var(--faint); font-size: .85rem; margin-top: 2rem; border-top: 1px solid var(--line); padding: .5rem 0; }
@media (max-width: 40rem) { .wide img { max-width: none; } }
@media print { .slider, nav { display: none; } figure { break-inside: avoid; } }
"""

_BIBTEX = html.escape("\n".join(CITATION.splitlines()[1:-1]))  # without the fences of Markdown
_CITATION = (
    '<h2 id="citation">Citation</h2>\n<p>The debiased loss is that of arXiv 2310.08442. If it helps your work, cite the paper:</p>\n'
    f"<pre>{_BIBTEX}</pre>"
)

# What moves: the numbers under the pointer or the arrow keys in a chart, and the grids at the step of the slider.
SCRIPT = """
const svg = (name, values) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in values) made.setAttribute(key, values[key]);
  return made;
};
const number = (value) => String(Number(value.toPrecision(4)));
for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const drawing = chart.querySelector("svg"), cursor = chart.querySelector(".cursor"), readout = chart.querySelector(".readout");
  const place = (value, [low, high, begin, end], log) => {
    const f = log ? Math.log : (v) => v;
    return begin + (f(value) - f(low)) / (f(high) - f(low)) * (end - begin);
  };
  const all = [...new Set(data.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const nearest = (list, x) => list.reduce((best, each, k) => Math.abs(each - x) < Math.abs(list[best] - x) ? k : best, 0);
  let at = all.length - 1;
  const show = () => {
    const x = all[at], across = place(x, data.axes[0], false);
    cursor.replaceChildren(svg("path", {d: `M${across} ${data.axes[1][3]}V${data.axes[1][2]}`}));
    const title = document.createElement("span");
    title.textContent = `${data.x} ${number(x)}:`;
    readout.replaceChildren(title);
    for (const line of data.lines) {
      const k = nearest(line.x, x), said = document.createElement("span"), key = svg("svg", {class: "swatch", viewBox: "0 0 24 8"});
      key.append(svg("path", {class: `line ${line.colour}`, d: "M0 4H24"}));
      said.append(key, `${line.label} ${number(line.y[k])}` + (line.x[k] === x ? "" : ` (at ${number(line.x[k])})`));
      readout.append(said);
      cursor.append(svg("circle", {class: `dot ${line.colour}`, r: 3.5, cx: place(line.x[k], data.axes[0], false),
                                   cy: place(line.y[k], data.axes[1], data.log)}));
    }
  };
  show();
  cursor.replaceChildren();  // until something is pointed at
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect(), [low, high, begin, end] = data.axes[0];
    const x = (event.clientX - box.left) / box.width * drawing.viewBox.baseVal.width;
    at = nearest(all, low + (x - begin) / (end - begin) * (high - low));
    show();
  });
  drawing.addEventListener("focus", show);
  drawing.addEventListener("keydown", (event) => {
    const moves = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1};
    if (!(event.key in moves)) return;
    event.preventDefault();
    at = Math.min(Math.max(moves[event.key], 0), all.length - 1);
    show();
  });
}
for (const slider of document.querySelectorAll(".slider input")) {
  const steps = JSON.parse(slider.dataset.steps), said = slider.parentElement.querySelector("output");
  const move = () => {
    const step = steps[slider.value];
    slider.setAttribute("aria-valuetext", said.textContent = `step ${step}`);
    for (const run of document.querySelectorAll(".pictures figure")) {
      let shown = null;
      for (const picture of run.querySelectorAll("img")) {
        picture.hidden = true;
        if (Number(picture.dataset.step) <= step) shown = picture;
      }
      if (shown) shown.hidden = false;
      run.querySelector(".at").textContent = shown ? `step ${shown.dataset.step}` : "no grid yet";
    }
  };
  slider.addEventListener("input", move);
  move();
}
"""


class ReportPage:
    """A page that grows from top to bottom. All texts are escaped."""

    def __init__(self, title: str, contents: bool = False) -> None:
        """With `contents`, links to the sections stand below the title."""
        self.title, self.contents = title, contents
        self._sections: list[str] = []
        self._parts: list[str] = []
        self._figures: list[str] = []
        self._moves = False  # something needs the script

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._sections.append(text)
        self._add(f'<h2 id="{_anchor(text)}">{html.escape(text)}</h2>')

    def paragraph(self, text: str) -> None:
        """Adds a paragraph."""
        self._add(f"<p>{html.escape(text)}</p>")

    def figure(self, picture: bytes, caption: str, wide: bool = False) -> None:
        """Adds a figure; figures that follow each other stand side by side where there is room.

        Args:
            picture: a PNG or SVG file.
            caption: the text below it, which is also its alternative text.
            wide: it takes the whole width, and on a narrow screen keeps its size and scrolls.
        """
        name, text = ' class="wide"' if wide else "", html.escape(caption)
        image = f'<div><img alt="{text}" src="{_source(picture)}"></div>'
        self._figures.append(f"<figure{name}>{image}<figcaption>{text}</figcaption></figure>")

    def table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[object]],
        caption: str,
        folded: bool = False,
        marked: Collection[int] = (),
        words: bool = False,
    ) -> None:
        """Adds a table. Numbers have four digits; None is an empty cell.

        Args:
            header: the names of the columns.
            rows: their cells.
            caption: the text above it.
            folded: it shows its caption alone until it is opened.
            marked: numbers of rows that are highlighted.
            words: cells are text, which is broken into lines; the first of a row is its name.
        """
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
        body = "".join(_row(row, k in marked, words) for k, row in enumerate(rows))
        title = html.escape(caption)
        above = "" if folded else f"<caption>{title}</caption>"
        kind = ' class="words"' if words else ""
        table = f"<table{kind}>{above}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
        scrolled = f'<div class="table" role="region" tabindex="0" aria-label="{title}">{table}</div>'
        self._add(f"<details><summary>{title}</summary>{scrolled}</details>" if folded else scrolled)

    def preformatted(self, text: str, caption: str) -> None:
        """Adds text with its own line breaks, folded under its caption."""
        self._add(f"<details><summary>{html.escape(caption)}</summary><pre>{html.escape(text)}</pre></details>")

    def legend(self, entries: Iterable[tuple[str, str]]) -> None:
        """Adds a legend of (swatch of `charts`, label)."""
        listed = "".join(f"<li>{drawn}{html.escape(label)}</li>" for drawn, label in entries)
        self._add(f'<ul class="legend">{listed}</ul>')

    def charts(self, made: Iterable[str]) -> None:
        """Adds figures of `charts.chart` side by side."""
        joined = "\n".join(made)
        self._moves = True
        self._add(f'<div class="charts">\n{joined}\n</div>')

    def pictures(self, by_run: Mapping[str, Mapping[int, tuple[bytes, str, bool]]]) -> None:
        """Adds a slider over all steps, and for each run its newest picture at that step.

        Args:
            by_run: by label and step, a PNG or JPEG file, its alternative text, and whether it is enlarged without smoothing.
        """
        steps = sorted({step for pictures in by_run.values() for step in pictures})
        listed = html.escape(json.dumps(steps))
        last = len(steps) - 1
        slider = (
            f'<div class="slider"><label for="step">Training step</label><input id="step" type="range" min="0" max="{last}" value="{last}" '
            f'data-steps="{listed}"><output for="step">step {steps[-1]}</output></div>'
        )
        figures = []
        for label, pictures in by_run.items():
            images = "".join(
                f'<img alt="{html.escape(text)}" data-step="{step}" src="{_source(picture)}"{" class=small" if small else ""}'
                f"{'' if step == max(pictures) else ' hidden'}>"
                for step, (picture, text, small) in sorted(pictures.items())
            )
            at = f'<span class="at faint">step {max(pictures)}</span>'
            figures.append(f"<figure><h3>{html.escape(label)}, {at}</h3>{images}</figure>")
        joined = "\n".join(figures)
        self._moves = True
        self._add(f'{slider}<div class="pictures">\n{joined}\n</div>')

    def html(self) -> bytes:
        """The whole page as a UTF-8 file."""
        self._end_figures()
        title = html.escape(self.title)
        links = "".join(f'<a href="#{_anchor(text)}">{html.escape(text)}</a>' for text in (*self._sections, "Citation"))
        contents = f'<nav aria-label="Sections">{links}</nav>\n' if self.contents else ""
        script = f"<script>{SCRIPT}</script>\n" if self._moves else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'{GENERATOR} {__version__}">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n<h1>{title}</h1>\n{contents}<main>\n"
            + "\n".join(self._parts)
            + f"\n{_CITATION}\n</main>\n<footer>Made by debias_diffusers {__version__}.</footer>\n{script}</body>\n</html>\n"
        ).encode()

    def _add(self, part: str) -> None:
        self._end_figures()
        self._parts.append(part)

    def _end_figures(self) -> None:
        if self._figures:
            joined = "\n".join(self._figures)
            self._parts.append(f'<div class="figures">\n{joined}\n</div>')
            self._figures = []


def is_our_page(path: Path) -> bool:
    """Whether this package wrote an HTML file."""
    try:
        return GENERATOR.encode() in read_file(path)[:1000]
    except InputError:
        return False


def _source(picture: bytes) -> str:
    """An image file as a URL."""
    kind = "png" if picture.startswith(b"\x89PNG") else "jpeg" if picture.startswith(b"\xff\xd8") else "svg+xml"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _row(cells: Sequence[object], marked: bool, words: bool) -> str:
    """A row of a table; of one with words the first cell is a header."""
    made = [f"<td>{html.escape(_cell(value))}</td>" for value in cells]
    if words:
        made[0] = f'<th scope="row">{html.escape(_cell(cells[0]))}</th>'
    return f"<tr{' class=marked' if marked else ''}>{''.join(made)}</tr>\n"


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
