"""The command group: help, mistakes, and exit codes."""

import os
import pty
import re
import sys
from pathlib import Path

import pytest
from commands import python, run, shell

COMMANDS = (
    "generate chat infill continue edit choose serve launch tune distill calibrate evaluate fuse info check setup "
    "quick-actions shortcut convert"
).split()
BIG_SEED = f"seed is {2**64}; it should be a whole number from 0 to 2**64 - 1."
NO_FOLDER = "./none does not exist; give a folder or a Hub id such as google/diffusiongemma-26B-A4B-it."
NO_DOWNLOAD = (
    "nobody/never-downloaded is not on this machine; run `hf download nobody/never-downloaded` first, or give a folder."
)


def test_help_imports_nothing_heavy():
    """Importing MLX, NumPy or the tokenizers takes seconds; --help must not."""
    code = (
        "import sys\nfrom mlx_dgemma.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]"
    assert re.findall(r"^  ([\w-]+)  ", done.stdout.partition("Commands:")[2], re.MULTILINE) == COMMANDS


def test_names_that_are_no_text_are_told_in_a_sentence():
    done = python("-m", "mlx_dgemma", "convert", "a", os.fsdecode(b"mod\xff"))
    assert done.stderr.endswith("Error: Got unexpected extra argument (mod\\udcff)\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = run(command, "-h")
    assert done.exit_code == 0
    usage, _, rest = done.stdout.partition("\n\n")
    assert usage.startswith(f"Usage: mlx-dgemma {command} ")
    assert f"mlx-dgemma {command}" in rest or command == "quick-actions"  # an example; that one's commands have them


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_help_that_cannot_be_printed_is_a_sentence():
    done = shell(f'"{sys.executable}" -m mlx_dgemma --help >/dev/full')
    said = "Error: Input or output has failed (No space left on device); mend that and try again.\n"
    assert (done.returncode, done.stderr) == (1, said)


def pages():
    """README.md, the pages of docs/ and the help of every command, which docs/cli.md holds as well."""
    docs = Path(__file__).parent.parent.parent / "docs"
    yield from (one.read_text() for one in (docs.parent / "README.md", *docs.glob("*.md")) if one.name != "cli.md")
    yield from (run(command, "-h").stdout for command in COMMANDS)


def test_no_example_empties_a_file_or_the_clipboard_where_the_command_fails():
    for page in pages():
        for script in re.findall(r"^ *```sh\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL) or [page]:
            assert re.findall(r"mlx-dgemma (?:[^\n]|\\\n)*?(?:[^2&]> ?[\w~$\"]|\| pbcopy)[^\n]*", script) == []


def test_models_are_named_alike_in_help_and_pages():
    """As FOLDER or a Hub id, by the folder that README.md makes, or by one that the page itself makes."""
    for page in pages():
        for name in re.findall(r"mlx-dgemma [^\n`]*?(?:-m|--model) ([\w~./-]+)", page):
            made = re.search(rf"(--mlx-path|fuse .*) {re.escape(name)}\b", page)
            assert name in ("FOLDER", "~/models/diffusiongemma-4bit", "./none") or re.match(r"\w[\w-]*/", name) or made


def test_version():
    assert run("--version").stdout == "mlx-dgemma, version 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "data", "code", "message"),
    [
        (["generate"], b" \n", 1, "The prompt is empty; say what you want."),
        (["generate"], b"abc\xff", 1, "stdin is not UTF-8: byte 3 is 0xff; convert it, for example with iconv."),
        (
            ["generate", "a\udce9"],
            b"",
            1,
            "The prompt is not UTF-8: byte 1 is 0xe9; convert it, for example with iconv.",
        ),
        (["chat"], b"a\xff", 1, "stdin is not UTF-8: byte 1 is 0xff; convert it, for example with iconv."),
        (["generate", "x", "--seed", 2**64], b"", 2, f"--{BIG_SEED}"),
        (["generate", "x", "--max-tokens", 0], b"", 2, "Invalid value for '--max-tokens': 0 is not in the range x>=1."),
        (["generate", "-f", "none"], b"", 2, "Invalid value for '-f' / '--file': File 'none' does not exist."),
        (["info", "--context", 5000], b"", 2, "--context is 5000; it should be from 1 to 4096, this model's longest."),
        (["generate", "x", "-m", "./none"], b"", 1, NO_FOLDER),
        (["info", "nobody/never-downloaded"], b"", 1, NO_DOWNLOAD),
    ],
)
def test_mistakes_are_one_sentence(arguments, data, code, message):
    done = run(*arguments, data=data)
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1] == f"Error: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "[1",
            "is not JSON (Expecting ',' delimiter: line 1 column 3 (char 2)); give a list of function declarations.",
        ),
        ('{"a": 1}', "holds dict; give a list of function declarations."),
        (
            '[{"name": "x"}]',
            "has no function declaration at position 0; each should be "
            '{"type": "function", "function": {"name": ..., "parameters": {...}}}.',
        ),
    ],
)
def test_broken_tools_are_one_sentence(tmp_path, content, message):
    path = tmp_path / "tools.json"
    path.write_text(content)
    done = run("generate", "x", "--tools", path)
    assert (done.exit_code, done.stderr) == (1, f"Error: {path} {message}\n")


def test_no_prompt_on_a_terminal_is_wrong_usage():
    master, slave = pty.openpty()
    try:
        done = python("-m", "mlx_dgemma", "generate", stdin=slave)
    finally:
        os.close(master)
        os.close(slave)
    assert done.returncode == 2
    message = "Error: There is no prompt: give it as an argument, with --file, or on stdin."
    assert done.stderr.splitlines()[-1] == message
