"""The code blocks of README.md, CONTRIBUTING.md and docs/: found, their commands expanded by bash, parsed, and run.

A block has a language: bash and python are code, text and yaml are not. A block that cannot be run here has a comment before it:

    <!-- not run: GPU -->
"""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from markdown_it import MarkdownIt

CODE, OTHER = ("bash", "python"), ("text", "yaml")
REASONS = ("GPU", "network", "a server", "several nodes", "the tests themselves")


@dataclass(frozen=True)
class Block:
    """A code block: its page, the line on which it begins, its language, its text, and why it is not run ("" where it is)."""

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def pages():
    """The pages in the order of the site."""
    nav = re.findall(r"(\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    elsewhere = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
    return [elsewhere.get(name, f"docs/{name}") for name in nav]


def blocks(page):
    """The blocks of a page, those without a language too, whose language is ""."""
    found, comment = [], None
    for token in MarkdownIt().parse((ROOT / page).read_text()):
        if token.type in ("fence", "code_block"):
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, comment or ""))
        marked = re.fullmatch(r"<!-- not run: (.*) -->\s*", token.content) if token.type == "html_block" else None
        comment = marked[1] if marked else None
    return found


# Each program of the documentation is a function, which writes down how it was called in place of doing anything. Bash does the
# rest: variables, braces, comments, lines that go on. What is not here is not found, and ends the block with an error.
PROGRAMS = (
    *("debias-train", "debias-sample", "debias-eval", "python", "accelerate"),
    *("pip", "git", "cd", "make", "hf", "pytest", "ruff", "mypy", "sbatch", "ls", "pre-commit"),
)
END = "\x1e"  # of a command; its words end with \x1f


def commands(block, folder):
    """The commands of a bash block, each a list of words, as bash calls them in a folder."""
    record = Path(folder) / ".commands"
    called = "\n".join(f"""{name}() {{ printf '%s\\x1f' {name} "$@" >> "$RECORD"; printf '\\x1e' >> "$RECORD"; }}""" for name in PROGRAMS)
    record.unlink(missing_ok=True)
    done = subprocess.run(
        [shutil.which("bash"), "-euc", f"{called}\n{block.text}"],
        cwd=folder,
        env={"PATH": "/nowhere", "RECORD": str(record), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, f"{block}: {done.stderr}"
    return [call.split("\x1f")[:-1] for call in record.read_text().split(END)[:-1]]


LAUNCHER = {
    "--multi_gpu": 0,
    "--num_processes": 1,
    "--config_file": 1,
    "-m": 0,
}  # options of accelerate launch, and how many values they have


def entry(words):
    """(what is called, its arguments): train.py, sample.py, eval.py, a module of the package, or a program of others.

    `python`, the launcher with its options, and `debias-` are taken away.
    """
    name, *rest = words
    if words[:2] == ["accelerate", "launch"]:
        rest = rest[1:]
        while rest[0].startswith("-"):
            rest = rest[1 + LAUNCHER[rest[0]] :]
        name = "python"
    elif name == "accelerate":
        return name, rest
    if name == "python" and rest[0] == "-m":
        rest = rest[1:]
    if name == "python":
        name, *rest = rest
    if name == "debias_diffusers":
        name, *rest = (f"debias_diffusers.{rest[0]}", *rest[1:]) if not rest[0].startswith("-") else (name, *rest)
    scripts = {"train": "train.py", "sample": "sample.py", "eval": "eval.py"}
    short = re.sub(r"^(debias-|debias_diffusers\.)", "", name)
    return scripts.get(short, short), rest


# ---- what is smaller than on the page ---------------------------------------------------------------------------------
# The rule, the only one: where a page's own number (or list of numbers) would take minutes, one of these takes its place; those of the
# first kind also where the page leaves the number out. Everything else is as on the page.

SMALLER = {
    "train.py": ({"--max_steps": 4, "--batch_size": 4}, {"--resolution": 64, "--warmup_steps": 0}),
    "my_train.py": ({"--max_steps": 4, "--batch_size": 4}, {}),
    "cache": ({}, {"--resolution": 64}),
    "shards": ({}, {"--shard_mb": 1}),
    "sample.py": ({"--num_images": 8, "--steps": 4}, {}),
    "eval.py score": ({"--num_images": 100, "--steps": 2}, {"--bootstrap": 20}),
    "eval.py compare": ({"--num_images": 100, "--steps": 2, "--bootstrap": 20}, {}),
    "eval.py bias": ({"--num_images": 4, "--num_timesteps": 4, "--num_samples": 8, "--steps": 2}, {"--swap_steps": 2}),
    "eval.py bpd": ({}, {"--num_images": 2}),
    "benchmarks/training.py": ({"--steps": 2, "--warm": 1, "--rounds": 1, "--cases": "a", "--variants": "float32"}, {}),
    "benchmarks/loading.py": ({"--seconds": 0.1, "--resolutions": 32, "--workers": 0}, {}),
    "benchmarks/startup.py": ({"--rounds": 1}, {}),
}
DENOISING_STEPS = 4  # of a pipeline that Python code calls


def smaller(name, arguments):
    """The arguments of a command with the numbers of SMALLER, where the page's own are not smaller still."""
    asks = {"--help", "--version", "--tyro-print-completion"} & {*arguments}
    always, typed = ({}, {}) if asks else SMALLER.get(f"eval.py {arguments[0]}" if name == "eval.py" else name, ({}, {}))
    if "--resume" in arguments and "--max_steps" in always:  # further than the run that is resumed, and once more for a change
        always = always | {"--max_steps": 12 if "--allow_change" in arguments else 8}
    if "sdxl" in arguments:  # whose configuration has 1024 pixels
        always = always | typed
    words = ["--max_steps" if name == "train.py" and word == "--num_epochs" else word for word in arguments]
    for flag, number in (always | typed).items():
        if flag in words:
            place = words.index(flag) + 1
            words[place] = min(words[place].split(",")[0], str(number), key=float)
            while words[place + 1 : place + 2] and words[place + 1].isdecimal():
                del words[place + 1]
        elif flag in always:
            words += [flag, str(number)]
    return words
