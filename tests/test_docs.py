"""The pages: their examples are run by bench/docs.py, their links lead somewhere, docs/cli.md is today's."""

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import click
import pytest

from mlx_dgemma.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def load(name):
    """A script of bench/ as a module."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_page(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    command = [sys.executable, str(ROOT / "bench" / "docs.py"), str(page)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fenced(mark, text, language="sh"):
    return f"<!-- {mark} -->\n```{language}\n{text}\n```\n"


@pytest.mark.parametrize(
    "page",
    [
        fenced("run", "echo one\necho two") + fenced("output", "one\ntwo"),
        fenced("run", "echo took 1.7 s") + fenced("output", "took ... s"),
        fenced("run 3", "exit 3"),
        fenced("file a.txt", "one") + fenced("run", "cat a.txt") + fenced("output", "one"),
        "<!-- hidden\necho one > a.txt\n-->\n" + fenced("run", "cat a.txt") + fenced("output", "one"),
        fenced("run", "x = 1\nprint('a')", "python") + fenced("run", "print(x)", "python") + fenced("output", "1"),
        "```sh\nexit 1\n```\n",
    ],
)
def test_examples_that_do_what_the_page_says_pass(tmp_path, page):
    done = run_page(tmp_path, page)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("page", "said"),
    [
        (fenced("run", "echo one\necho two") + fenced("output", "one\nthree"), "-three\n+two"),
        (fenced("run", "echo one") + fenced("output", ""), "+one"),
        (fenced("run", "echo why >&2; exit 7"), "It exited with 7.\nwhy"),
        (fenced("run", "false\necho on"), "It exited with 1."),
        (fenced("run", "false | cat"), "It exited with 1."),
        (fenced("run", "raise SystemExit(4)", "python"), "It exited with 4."),
        ("<!-- hidden\nexit 5\n-->\n", "It exited with 5."),
        ("<!-- run -->\nno block\n", "1 of 1 marks have no block"),
        ("<!-- run -->\n\n" + fenced("output", "x"), "1 of 2 marks have no block"),
    ],
)
def test_an_example_that_does_something_else_fails(tmp_path, page, said):
    done = run_page(tmp_path, page)
    assert done.returncode == 1
    assert said in done.stderr


def test_what_a_page_leaves_running_ends_with_it(tmp_path):
    page = fenced(
        "run",
        f"(trap 'echo ended > {tmp_path}/ended; exit' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done) &\n"
        f"until test -e {tmp_path}/up; do sleep 0.1; done",
    )
    assert run_page(tmp_path, page).returncode == 0
    done = subprocess.run(
        ["bash", "-c", f"until test -e {tmp_path}/ended; do sleep 0.1; done"], timeout=60, check=False
    )
    assert done.returncode == 0


def test_the_marks_of_every_page_can_be_read():
    docs = load("docs")
    counts = {page.name: len([one for one in docs.blocks(page.read_text()) if one.kind == "run"]) for page in PAGES}
    run = (
        "README",
        "models-and-memory",
        "options-and-modes",
        "pictures-and-video",
        "text-that-fits",
        "server",
        "macos",
    )
    assert [name for name in run if counts[f"{name}.md"] == 0] == []


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", CODE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = CODE.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_short_and_names_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.encode()) <= 9000
    assert [page.name for page in PAGES[1:] if page.name not in readme] == []


def test_the_tree_in_the_architecture_names_every_module():
    tree = CODE.findall((ROOT / "docs" / "architecture.md").read_text())[1]
    named = {name.rpartition("/")[2] for name in re.findall(r"[\w/]+\.py", tree)}
    files = [*(ROOT / "convert").rglob("*.py"), *(ROOT / "mlx_dgemma").rglob("*.py")]
    assert named == {file.name for file in files if not file.name.startswith("__")}


def test_the_command_line_page_names_every_command_and_option():
    page = (ROOT / "docs" / "cli.md").read_text()
    context = click.Context(main)
    for name in main.list_commands(context):
        assert f"\n## {name}\n" in page
        part = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        command = main.get_command(context, name)
        flags = [
            flag for one in command.params for flag in one.opts if isinstance(one, click.Option) and not one.hidden
        ]
        assert [flag for flag in flags if flag not in part] == []


def test_the_command_line_page_is_up_to_date():
    current = load("cli_page").is_current()
    if current is None:
        pytest.skip("another version of click words its help differently")
    assert current, "run python bench/cli_page.py"


def test_the_picture_shows_a_whole_run_in_its_last_step():
    file = ROOT / "docs" / "canvas.svg"
    assert file.stat().st_size < 300_000
    groups = ET.parse(file).getroot().findall("{http://www.w3.org/2000/svg}g")
    texts = [" ".join("".join(group.itertext()).split()) for group in groups]
    assert len(groups) > 5
    assert [group.get("visibility") for group in groups] == ["hidden"] * (len(groups) - 1) + [None]
    assert texts[-1].endswith(f"step {len(groups)} of {len(groups)}")
    assert texts[-1].startswith("Once there was a duck named Leo.")
    assert "was happy." in texts[-1]
