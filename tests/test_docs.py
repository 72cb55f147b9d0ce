"""The pages: links lead somewhere, recipes and templates are good, commands exist and run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
import yaml
from conftest import ROOT

from itune import cli, recipes, records, templates

PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
EDITORS = "docs/howto/editors.md"  # installs things; test_editors.py has its commands
HOWTO = [name for name in NAMES if name.startswith("docs/howto/") and name != EDITORS]
HOWTO.append("docs/own-data.md")
FENCE = re.compile(r'^ *```(\w*)(?: title="([^"]+)")?\n(.*?)^ *```', re.S | re.M)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)")
START = re.compile(r"(\$ |[A-Z_]+=\S+ |python -m |accelerate launch .*-m )*$")
PROGRAM = typer.main.get_command(cli.app)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ {4}.*$", "", FENCE.sub("", page), flags=re.M)


def anchors(page: str) -> set[str]:
    """What a heading is called in an address, as Python-Markdown and GitHub both have it."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page), re.M)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"`", "", each)).strip().lower() for each in headings]
    return {re.sub(r"[-\s]+", "-", each) for each in plain}


def dead_links(name: str, page: str) -> list[str]:
    """The links of a page that lead nowhere in this checkout."""
    dead = []
    for link in LINK.findall(INLINE.sub("", prose(page))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        there = target.is_file()
        if there and anchor:
            there = anchor in anchors(target.read_text(encoding="utf-8"))
        if not there:
            dead.append(link)
    return dead


def commands(page: str) -> Iterator[list[str]]:
    """Every `itune ...` line of a page, in blocks of code, indented ones, and the prose."""
    blocks = [body for kind, _, body in FENCE.findall(page) if kind in ("sh", "bash", "")]
    indented = re.findall(r"^ {4}(\S.*)$", FENCE.sub("", page).replace("\\\n", " "), re.M)
    lines = [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *indented]
    for line in (*lines, *INLINE.findall(prose(page))):
        before, found, after = line.partition("itune ")
        if (
            found
            and re.match("(pretrain|tune|eval|generate) ", f"{after} ")
            and START.match(before)
        ):
            yield shlex.split(after.replace("…", " ").replace("...", " "), comments=True)


def refusal(words: list[str]) -> str:
    """What the program's own parser says against a command; empty where it takes it."""
    words = ["1" if word in ("N", "K") else word for word in words]
    wanted = PROGRAM.commands[words[0]]  # type: ignore[attr-defined]
    try:
        with wanted.make_context(words[0], words[1:]):
            return ""
    except typer.Exit:  # such as --schema, which has done its work
        return ""
    except Exception as error:  # typer's own, which it exports under no name
        return f"{type(error).__name__}: {error}"


def named_recipes(page: str) -> set[str]:
    """The recipes that commands of a page name barely, which have to be among the shipped."""
    found = {
        words[place + 1]
        for words in commands(page)
        for place, word in enumerate(words[:-1])
        if word in ("--recipe", "-r")
    }
    return {name for name in found if name.islower() and not name.endswith(".yaml")}


def files(page: str) -> Iterator[tuple[str, str]]:
    """The files that a page shows whole, by the name that it gives them."""
    for _, title, body in FENCE.findall(page):
        if title:
            yield title, body


@pytest.mark.parametrize("name", NAMES)
def test_no_link_leads_nowhere(name: str) -> None:
    assert dead_links(name, text(name)) == []


def test_every_page_is_reached_from_the_site() -> None:
    listed = set(re.findall(r": (\S+\.md)$", text("mkdocs.yml"), re.M))
    made = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert listed == made


@pytest.mark.parametrize("name", NAMES)
def test_every_command_is_one_that_the_program_takes(name: str) -> None:
    faults = {shlex.join(words): refusal(words) for words in commands(text(name))}
    assert not {line: fault for line, fault in faults.items() if fault}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_that_is_named_ships(name: str) -> None:
    assert named_recipes(text(name)) <= set(records.names_in(ROOT / "recipes"))


def test_a_wrong_option_and_a_dead_link_would_be_found() -> None:
    page = (
        "# Here\n\nSee [this](gone.md), [that](#nowhere) and `itune tune --recipe x --previw 1`.\n"
    )
    assert dead_links("docs/index.md", page) == ["gone.md", "#nowhere"]
    [wrong] = commands(page)
    assert "--previw" in refusal(wrong)
    assert named_recipes("`itune tune --recipe imdv`") == {"imdv"}
    block = "```sh\nHF_HUB_OFFLINE=1 itune eval --metrics f1\n```\n"
    assert "--metrics" in refusal(next(commands(block)))


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_and_template_shown_is_good(name: str, tmp_path: Path) -> None:
    for title, body in files(text(name)):
        if not title.endswith(".yaml"):
            continue
        if "task" in yaml.safe_load(body):
            templates.loads(body, title)
        else:
            recipes.loads(body, title)


def test_there_are_recipes_commands_and_links_to_check() -> None:
    pages = [text(name) for name in NAMES]
    assert sum(len(list(commands(page))) for page in pages) > 80
    assert sum(len(LINK.findall(page)) for page in pages) > 80
    assert all(
        any(title.endswith(".yaml") for title, _ in files(text(name)))
        for name in HOWTO
        if "offline" not in name
    )


def test_the_first_page_has_the_quick_starts_own_commands() -> None:
    target = text("Makefile").split("\nquickstart:")[1].split("\n\n")[0]
    made = re.sub(r"\$\(BIN\)/|^\t", "", target.split("\n", 1)[1], flags=re.M)
    shown = [body for kind, _, body in FENCE.findall(text("docs/start.md")) if kind == "sh"]
    assert made.strip() in {each.strip() for each in shown}


def test_both_readmes_show_the_same_files_figures_and_pictures() -> None:
    english, chinese = text("README.md"), text("README.zh.md")
    assert dict(files(english)) == dict(files(chinese))
    shown = (r"!\[[^]]*\]\(([^)]+)\)", r"^```bash\n(.*?)^```", r"\d\.\d{3} \(\d\.\d{3}\)")
    for each in (*shown, r"^```\n(quickstart-.*?)^```"):
        assert (
            re.findall(each, english, re.S | re.M) == re.findall(each, chinese, re.S | re.M) != []
        )
    assert "(README.zh.md)" in english
    assert "(README.md)" in chinese


# --- the how-to pages, typed ---------------------------------------------------------------------

SHORT = {
    "pretrain": ["-s", "training.max_steps=2"],
    "tune": ["-s", "training.max_steps=2"],
    "eval": ["--limit", "4"],
    "generate": ["-s", "generation.max_new_tokens=4"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOWTO)
def test_the_commands_of_a_how_to_run(name: str, tmp_path: Path, tiny_model_dir: Path) -> None:
    """As they are typed on the page, cut short, on a tiny model in place of the quick start's."""
    page = text(name)
    make = [sys.executable, str(ROOT / "recipes/quickstart/make_data.py")]
    subprocess.run([*make, "--output", ".quickstart", "--rows", "40"], cwd=tmp_path, check=True)
    shutil.copytree(tiny_model_dir, tmp_path / "runs/quickstart-pretrain")
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for title, body in files(page):
        (tmp_path / title).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / title).write_text(body, encoding="utf-8")
    shown = "\n".join(body for kind, _, body in FENCE.findall(page) if kind == "sh")
    lines = [shlex.split(line) for line in shown.replace("\\\n", " ").splitlines() if line]
    assert lines
    for words in lines:
        words = [word for word in words if word != "HF_HUB_OFFLINE=1"]
        program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "itune"]
        extra = SHORT.get(words[1], []) if words[0] == "itune" else []
        done = subprocess.run(
            [*program, *words[1:], *extra], cwd=tmp_path, capture_output=True, text=True,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stderr[-2000:]}"
