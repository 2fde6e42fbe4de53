"""Reports as one HTML file: text, tables and figures, without anything from elsewhere."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import __version__
from ..errors import InputError
from ..utils.files import read_file

GENERATOR = '<meta name="generator" content="debias_diffusers'

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1f24; --faint: #5a6470; --line: #d5dae0; --card: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --text: #e4e8ec; --faint: #9aa5b1; --line: #343b43; --card: #1d2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p { max-width: 46rem; margin: .5rem 0; }
.figures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem; min-width: 0; }
figure div { overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: 3px; }
.wide { grid-column: 1 / -1; }
.wide img { width: auto; max-width: 100%; min-width: min(44rem, 100%); margin: 0 auto; }
figcaption { color: var(--faint); font-size: .9rem; padding: .4rem .2rem 0; }
.table { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { caption-side: top; text-align: left; color: var(--faint); padding-bottom: .3rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
footer { color: var(--faint); font-size: .85rem; margin-top: 2rem; border-top: 1px solid var(--line); padding: .5rem 0; }
@media (max-width: 40rem) { .wide img { min-width: 44rem; } }
"""


class ReportPage:
    """A page that grows from top to bottom. All texts are escaped."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []
        self._figures: list[str] = []

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._add(f"<h2>{html.escape(text)}</h2>")

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
        kind = "png" if picture.startswith(b"\x89PNG") else "svg+xml"
        source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        name, text = ' class="wide"' if wide else "", html.escape(caption)
        image = f'<div><img alt="{text}" src="{source}"></div>'
        self._figures.append(f"<figure{name}>{image}<figcaption>{text}</figcaption></figure>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> None:
        """Adds a table. Numbers have four digits; None is an empty cell."""
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(_cell(value))}</td>' for value in row)}</tr>\n" for row in rows)
        above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._add(f'<div class="table"><table>{above}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>')

    def html(self) -> bytes:
        """The whole page as a UTF-8 file."""
        self._end_figures()
        title = html.escape(self.title)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'{GENERATOR} {__version__}">\n<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n'
            f"<body>\n<h1>{title}</h1>\n" + "\n".join(self._parts) + f"\n<footer>Made by debias_diffusers {__version__}.</footer>\n"
            "</body>\n</html>\n"
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


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
