"""A plain `generate` is read without click, and is asked for and told exactly as click's command does."""

import errno
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from mlx_dgemma.cli import local, main
from mlx_dgemma.cli.calls import start, words
from mlx_dgemma.cli.commands.generate import generate
from mlx_dgemma.distributed import VARIABLES, launched
from mlx_dgemma.errors import OptionError, RangeError

STATS = dict.fromkeys("blocks denoising_steps generated_tokens prompt_tokens reused_tokens images seed".split(), 1) | {
    "mode": "diffusion", "drafted_tokens": 0, "tokens_per_second": 2.5, "time_to_first_block": 0.5, "images_encoded": 0,
    "peak_memory_bytes": 10, "mode_reason": None, "frame_seconds": (), "causal_passes": 0,
}  # fmt: skip
READ = [  # words that are read without click
    ["Hi.", "--seed", "7", "--max-tokens=20"],
    ["--stop", "a", "--stop=b c", "--stop=", "--", "-5"],
    ["-f", "a.txt", "-f", "b.txt", "Sum it up.", "--system", "Be brief.", "-v"],
    [
        "-m",
        "some/model",
        "--adapter",
        "ad",
        "--dtype",
        "float16",
        "--compute-dtype",
        "float16",
        "--kv-bits",
        "8",
        "Hi.",
    ],
    ["Hi.", "--thinking", "--thinking", "--no-thinking", "--json", "--seed", "1", "--seed", "007"],
    ["Hi.", "--fast", "--effort", "low", "--mode", "auto", "--low-memory", "--ignore-memory", "--regex", "[ab]{3}"],
    ["Hi.", "--t-min", "1e-1", "--t-max", "1", "--top-p", ".5", "--patience", "0", "--system", "ünï \N{DUCK}"],
    [],
    ["-"],
    ["-f", "-", "Beside it."],
]
LEFT = [  # words that are left to click: rare ones, and what is wrong
    ["Hi.", "--image", "a.txt"],
    ["Hi.", "--copy", "--output", "x"],
    ["Hi.", "--canvas", "full"],
    ["Hi", "you"],
    ["-mdemo", "Hi."],
    ["Hi.", "--seed"],
    ["Hi.", "--seed", "-1"],
    ["Hi.", "--seed", "1_0"],
    ["Hi.", "--seed", "1.5"],
    ["Hi.", "--max-tokens", "0"],
    ["Hi.", "--t-min", "nan"],
    ["Hi.", "--t-min", "1e999"],
    ["Hi.", "--json=1"],
    ["Hi.", "--stop", "--json"],
    ["Hi.", "--dtype", "int8"],
    ["Hi.", "--no-server"],
    ["Hi.", "--sed", "1"],
    ["-f", "none.txt"],
    ["-f", "."],
    ["-", "-f", "-"],
    ["a\udce9"],
    ["-h"],
]


class Server(local.Remote):
    """Answers without a model, and notes what it is asked."""

    def __init__(self, fails=None):
        super().__init__("", ["A note."])
        self.asked, self.fails = [], fails

    def task(self, name, arguments, keywords, drafts):
        self.asked.append((name, arguments, keywords, drafts))
        if isinstance(self.fails, OptionError):
            raise self.fails
        self.accepted()
        self.options = {"seed": 1}
        yield local.SeenBlock("An answer", "")
        if self.fails:
            raise self.fails
        stats = SimpleNamespace(**STATS)
        result = SimpleNamespace(stats=stats, notes=["Mind it."], tool_calls=[], finish_reason="stop", tokens=[1])
        yield local.SeenEnd(result)


@pytest.fixture
def done(monkeypatch, tmp_path):
    """What a command line does by a program: exit code, output, the model that is looked for, what a server is asked.

    `finds` are the modules that find the server: `start` finds it without click, `local` with it.
    """
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("first\n")
    Path("b.txt").write_bytes(b"\xef\xbb\xbfsecond")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def done(program, given, data=b"", fails=None, finds=(start, local)):
        server, wanted = Server(fails), []
        with monkeypatch.context() as patched:
            for module in (start, local):
                found = server if module in finds else None
                patched.setattr(module, "find_server", lambda what, _, found=found: wanted.append(what) or found)
            patched.setattr(generate, "callback", generate.callback)  # a start that fails replaces it
            patched.setattr("sys.argv", ["mlx-dgemma", "generate", *given])
            told = CliRunner().invoke(click.Command("x", callback=lambda: program()), [], input=data)
        return told.exit_code, told.stdout, told.stderr, wanted, server.asked

    return done


@pytest.mark.parametrize("given", READ, ids=" ".join)
def test_what_is_read_without_click_is_asked_for_as_with_it(done, monkeypatch, given):
    there = done(main.main, given, b"from stdin\n")
    monkeypatch.setattr(start, "_run_click", None)  # calling it would fail
    assert there[0] == 0 and there[4]
    assert done(start.main, given, b"from stdin\n") == there


@pytest.mark.parametrize("given", LEFT, ids=ascii)
def test_what_is_rare_or_wrong_is_left_to_click(monkeypatch, tmp_path, given):
    monkeypatch.chdir(tmp_path)
    assert words.read_words(["generate", *given], {}) is None


def test_only_a_plain_generate_is_read():
    assert words.read_words(["chat"], {}) is None
    assert words.read_words([], {}) is None
    assert words.read_words(["generate", "Hi."], {"MLX_DGEMMA_MODEL": "a"}).model == "a"
    for variable in words.ELSEWHERE:
        assert words.read_words(["generate", "Hi."], {variable: "0"}) is None
    looked = []
    launched.place_of(type("Environment", (dict,), {"get": lambda self, name, _: looked.append(name) or ""})())
    assert {*looked, "MLX_RANK", launched.CHILD} == set(VARIABLES)


def test_without_a_server_click_goes_on_with_the_text_that_was_read(done):
    *there, _ = done(main.main, ["Sum it up."], b"from stdin\n", finds=(local,))
    code, out, err, wanted, asked = done(start.main, ["Sum it up."], b"from stdin\n", finds=(local,))
    assert [code, out, err, wanted[1:]] == there and wanted[0] == wanted[1]
    assert asked[0][1][0][-1]["content"] == "from stdin\n\nSum it up."


def test_the_table_is_that_of_click():
    def kind(option):
        bounds = isinstance(option.type, (click.IntRange, click.FloatRange))
        if bounds:
            return option.type.min
        if isinstance(option.type, click.Choice):
            return tuple(option.type.choices)
        if option.is_flag:
            return True
        path = isinstance(option.type, click.Path)
        return ("files" if path else "texts") if option.multiple else "text"

    options = {flag: one for one in generate.params for flag in one.opts if isinstance(one, click.Option)}
    left = {flag for flag, one in options.items() if set(one.opts) & set(words.FOR_CLICK)}
    table = {flag: (one.name, kind(one)) for flag, one in options.items() if flag not in left}
    assert table | {"--no-thinking": ("thinking", False)} == words.OPTIONS
    assert {flag: type(one[1]) for flag, one in table.items()} == {
        flag: type(one[1]) for flag, one in words.OPTIONS.items() if flag != "--no-thinking"
    }


@pytest.mark.parametrize(
    ("fails", "code", "said"),
    [
        (OptionError("t_min is 2 and t_max is 1; t_min should be lower."), 2, "Error: --t-min is 2 and --t-max is 1;"),
        (RangeError("Numbers left the range."), 1, "Error: Numbers left the range.\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=repr,
)
def test_what_fails_is_told_as_by_click(done, fails, code, said):
    there = done(main.main, ["Hi.", "--seed", "1"], fails=fails)
    assert there[0] == code and said in there[2]
    assert done(start.main, ["Hi.", "--seed", "1"], fails=fails) == there


@pytest.mark.parametrize(
    ("given", "data", "code", "said"),
    [
        ([], b"", 2, "Error: There is no prompt: give it as an argument, with --file, or on stdin.\n"),
        ([" "], b"", 1, "Error: The prompt is empty; say what you want.\n"),
        ([], b"a\xff", 1, "Error: stdin is not UTF-8: byte 1 is 0xff; convert it, for example with iconv.\n"),
    ],
)
def test_a_missing_prompt_is_told_before_a_server_is_woken(done, given, data, code, said):
    told = done(start.main, given, data)
    assert told[0] == code and told[2].endswith(said)
    assert told[3:] == ([], [])
    assert done(main.main, given, data) == told
