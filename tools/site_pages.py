"""Pages of the site that stand outside docs/: README.md and CONTRIBUTING.md. mkdocs calls these hooks (mkdocs.yml)."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?://|#)([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, with links as they are from docs/."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=LINK.sub(_from_docs, (ROOT / name).read_text())))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """The pages are beside the others on the site; other files outside docs/ are not on it, and are named without a link."""
    return LINK.sub(_on_the_site, markdown)


def _from_docs(link: re.Match[str]) -> str:
    image, text, target = link.groups()
    return f"{image}[{text}]({target.removeprefix('docs/') if target.startswith('docs/') else f'../{target}'})"


def _on_the_site(link: re.Match[str]) -> str:
    image, text, target = link.groups()
    if not target.startswith("../"):
        return link[0]
    name, _, anchor = target.removeprefix("../").partition("#")
    return f"{image}[{text}]({PAGES[name]}{'#' + anchor if anchor else ''})" if name in PAGES else text
