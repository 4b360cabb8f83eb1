"""The command line: what lands on stdout and stderr, and exit codes."""

import json
import os
import pty
import re
import subprocess
import sys
import time
import warnings

import pytest
from click.testing import CliRunner
from PIL import Image, ImageDraw
from support import engine_of

from mlx_dgemma import engine, errors
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.cli import info, main
from mlx_dgemma.decoding.events import Block, Draft
from mlx_dgemma.model import device

COMMANDS = "generate chat infill edit choose serve tune evaluate fuse info convert".split()
JSON_PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."
COUNT = "Count from 1 to 60."
TWO_BLOCKS = ("--max-tokens", 100)
BIG_SEED = f"seed is {2**64}; it should be a whole number from 0 to 2**64 - 1."
NO_FOLDER = "./none does not exist; give a folder or a Hub id such as google/diffusiongemma-26B-A4B-it."
NO_DOWNLOAD = (
    "nobody/never-downloaded is not on this machine; run `hf download nobody/never-downloaded` first, or give a folder."
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


@pytest.fixture(autouse=True)
def no_model_named(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)


def run(*arguments, data=b""):
    return CliRunner().invoke(main.main, [str(one) for one in arguments], input=data, prog_name="mlx-dgemma")


def python(*arguments, **options):
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 60} | options
    return subprocess.run([sys.executable, *arguments], check=False, **options)


def shell(command):
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)


# The group


def test_help_imports_nothing_heavy_and_is_fast():
    code = (
        "import sys\nfrom mlx_dgemma.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]"
    assert re.findall(r"^  (\w+)  ", done.stdout, re.MULTILINE) == COMMANDS
    started = time.perf_counter()
    assert python("-m", "mlx_dgemma", "-h").returncode == 0
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = run(command, "-h")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: mlx-dgemma {command} ")


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
        (["generate", "x", "--seed", 2**64], b"", 1, BIG_SEED),
        (["generate", "x", "--max-tokens", 0], b"", 2, "Invalid value for '--max-tokens': 0 is not in the range x>=1."),
        (["generate", "-f", "none"], b"", 2, "Invalid value for '-f' / '--file': File 'none' does not exist."),
        (["info", "--context", 5000], b"", 1, "context is 5000; it should be from 1 to 4096, this model's longest."),
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


# generate


def test_a_pipe_gets_the_text_alone():
    done = python("-m", "mlx_dgemma", "generate", JSON_PROMPT, "--seed", "0")
    assert done.returncode == 0
    assert done.stdout == '{"name": "Anna", "age": 31, "city": "Oslo"}\n'
    assert done.stderr == main.DEMO_NOTICE + "\n"


def test_a_named_model_needs_no_notice(monkeypatch):
    assert run("generate", JSON_PROMPT, "--seed", 0, "--model", DEMO).stderr == ""
    monkeypatch.setenv("MLX_DGEMMA_MODEL", str(DEMO))
    assert run("generate", JSON_PROMPT, "--seed", 0).stderr == ""


def test_seed_repeats_and_equals_the_engine():
    arguments = ("generate", COUNT, "--seed", 7, "--max-tokens", 100, "--entropy-bound", 0.3, "--json")
    one, two = (json.loads(run(*arguments).stdout) for _ in range(2))
    same = engine_of(DEMO).generate(COUNT, seed=7, max_tokens=100, entropy_bound=0.3)
    assert one["text"] == two["text"] == same.text
    assert one["stats"]["denoising_steps"] == same.stats.denoising_steps
    assert (one["finish_reason"], one["stats"]["seed"], one["stats"]["generated_tokens"]) == ("length", 7, 100)


def test_json_has_the_shape_of_a_result():
    done = run("generate", JSON_PROMPT, "--json")
    assert done.stdout.count("\n") == 1
    told = json.loads(done.stdout)
    assert list(told) == ["text", "thinking", "tool_calls", "finish_reason", "stats"]
    assert list(told["stats"]) == list(engine.Stats.__dataclass_fields__)
    assert list(told["stats"]["seconds"]) == ["load", "prefill", "denoise", "total"]


@pytest.fixture
def asked(monkeypatch):
    """Messages and options that reach the engine; it answers with `Spell the word cat.`'s text."""
    heard = []
    real = engine.Engine.stream

    def stream(self, messages, **options):
        heard.append((messages, options))
        return real(self, "Spell the word cat.", seed=0, max_denoising_steps=1)

    monkeypatch.setattr(engine.Engine, "stream", stream)
    return heard


def test_data_comes_before_the_question(asked, tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"\xef\xbb\xbffrom a file\n\n")
    for arguments, data, prompt in (
        (["What failed?"], b"a log\n", "a log\n\nWhat failed?"),
        (["What failed?"], b"", "What failed?"),
        ([], "naïve\n".encode(), "naïve"),
        (["-f", path, "Why?"], b"ignored", "from a file\n\nWhy?"),
        (["-f", path, "-f", "-", "Why?"], b"stdin", "from a file\n\nstdin\n\nWhy?"),
    ):
        assert run("generate", *arguments, data=data).exit_code == 0
        assert asked.pop()[0] == [{"role": "user", "content": prompt}]


def test_only_what_was_given_reaches_the_engine(asked):
    run("generate", "x", "--system", "Be brief.", "--stop", "a", "--stop", "b", "--t-min", 0, "--thinking")
    messages, options = asked.pop()
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert options == {"stop": ("a", "b"), "t_min": 0.0, "thinking": True, "tools": None, "drafts": False}


def test_tool_calls_are_printed_one_a_line(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([WEATHER]))
    arguments = ("generate", "What is the weather in Oslo?", "--tools", path, "--seed", 1)
    assert run(*arguments).stdout == '{"name": "get_weather", "arguments": {"city": "Oslo"}}\n'
    told = json.loads(run(*arguments, "--json").stdout)
    assert (told["finish_reason"], told["tool_calls"][0]["function"]["name"]) == ("tool_calls", "get_weather")


def test_thinking_stays_off_stdout():
    arguments = ("generate", "What is 23 + 45?", "--thinking", "--seed", 1)
    assert run(*arguments).stdout == "23 + 45 = 68.\n"
    assert json.loads(run(*arguments, "--json").stdout)["thinking"].startswith("Ones: 3 + 5 = 8.")


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "red.png"
    picture = Image.new("RGB", (160, 160), (250, 250, 250))
    ImageDraw.Draw(picture).rectangle((45, 45, 115, 115), fill=(220, 40, 40))
    picture.save(path)
    return path


def test_pictures_and_video(red):
    question = "What color is the shape?"
    arguments = (question, "--seed", 0, "--exact", "--json", "--image-tokens", 70)
    told = json.loads(run("generate", "--image", red, *arguments).stdout)
    assert told["text"] == "The square is red."
    assert 49 < told["stats"]["prompt_tokens"] < 100  # 7 x 7 soft tokens and the text
    told = json.loads(run("generate", "--video", red.parent, *arguments, "--max-denoising-steps", 1).stdout)
    same = engine_of(DEMO).generate(
        question, video=red.parent, seed=0, image_tokens=70, max_denoising_steps=1, exact=True
    )
    assert (told["text"], told["stats"]["prompt_tokens"]) == (same.text, same.stats.prompt_tokens)


def test_a_picture_in_a_chat(red):
    done = run("chat", "--seed", 0, "--exact", data=f"/image {red}\nWhat color is the shape?\n".encode())
    assert (done.exit_code, done.stdout) == (0, "The square is red.\n")
    done = run("chat", "--seed", 0, "-m", DEMO, data=b"/image none.png\nWhat color is the shape?\n")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: none.png does not exist.\n")


def test_a_chat_begins_with_the_pictures_named(red):
    done = run("chat", "--seed", 0, "--exact", "--image", red, data=b"What color is the shape?\n")
    assert (done.exit_code, done.stdout) == (0, "The square is red.\n")
    done = run("chat", "--image", "-", data=b"What color is the shape?\n")
    assert done.exit_code == 2
    assert "- is stdin, which holds the conversation; name the picture's file." in done.stderr


def test_verbose_tells_what_was_chosen(red):
    few = ("--seed", 0, "-v", "-m", DEMO, "--max-denoising-steps", 1, "--max-frames", 2)
    done = run("generate", "--video", red.parent, "What color is the shape?", *few)
    told = done.stderr.splitlines()
    assert told[1].startswith("options: max-tokens 256, stop (), max-denoising-steps 1, entropy-bound 0.1")
    assert told[2].endswith("prompt tokens, 0 reused; 1 picture, 1 encoded")
    assert told[3] == "frames at 0.00 s"
    assert told[4].endswith("seed 0")
    by_command = run("chat", *few, data=f"/video {red.parent}\nWhat color is the shape?\n".encode())
    assert by_command.stdout == done.stdout
    assert by_command.stderr.splitlines()[1:4] == told[1:4]


def test_a_warning_about_a_picture_is_one_line(tmp_path, red):
    Image.open(red).save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    done = run("generate", "What color is the shape?", "--seed", 0, "-m", DEMO, "--image", tmp_path / "two.gif")
    assert done.stderr == f"Warning: {tmp_path / 'two.gif'} holds several frames; only the first is taken.\n"
    assert done.exit_code == 0


def test_warnings_are_one_line(monkeypatch):
    real = engine.Engine.stream

    def stream(self, *arguments, **options):
        for event in real(self, *arguments, **options):
            warnings.warn("The tool call 'x' is broken; it was kept as text.", stacklevel=1)
            yield event

    monkeypatch.setattr(engine.Engine, "stream", stream)
    done = run("generate", "Spell the word cat.", "--seed", 0, "-m", DEMO)
    assert (done.stdout, done.stderr) == ("c a t\n", "Warning: The tool call 'x' is broken; it was kept as text.\n")


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C as soon as a first block is finished; the whole answer to COUNT."""
    whole = engine_of(DEMO).generate(COUNT, seed=0, max_tokens=100).text
    real = engine.Engine.stream

    def stream(self, *arguments, **options):
        for event in real(self, *arguments, **options):
            yield event
            if isinstance(event, Block):
                raise KeyboardInterrupt

    monkeypatch.setattr(engine.Engine, "stream", stream)
    return whole


def test_ctrl_c_keeps_finished_blocks(interrupted):
    done = run("generate", COUNT, "--seed", 0, *TWO_BLOCKS)
    assert done.exit_code == 130
    text = done.stdout.removesuffix("\n")
    assert interrupted.startswith(text) and 0 < len(text) < len(interrupted)
    done = run("generate", COUNT, "--seed", 0, *TWO_BLOCKS, "--json")
    assert done.exit_code == 130
    assert json.loads(done.stdout) == {
        "text": text,
        "thinking": "",
        "tool_calls": [],
        "finish_reason": "interrupted",
        "stats": None,
    }


def test_ctrl_c_while_loading(monkeypatch):
    def load(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "load", load)
    done = run("generate", "x", "-m", DEMO)
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "")


def test_a_reader_that_leaves_is_no_error():
    command = f'"{sys.executable}" -m mlx_dgemma generate "{COUNT}" --seed 0 --max-tokens 70 -m "{DEMO}"'
    done = shell(command + " </dev/null | head -c 5")
    assert (done.stdout, done.stderr) == ("1, 2,", "")


def test_closed_streams_do_no_harm():
    done = shell(f'"{sys.executable}" -m mlx_dgemma generate "Spell the word cat." --seed 0 <&- 2>&-')
    assert (done.returncode, done.stdout) == (0, "c a t\n")


# chat


@pytest.fixture
def turns(monkeypatch):
    """The messages, system and result of every turn."""
    heard = []
    real = engine.Engine.stream

    def stream(self, messages, **options):
        said = [dict(one) for one in messages]
        for event in real(self, messages, **options):
            if not isinstance(event, (Draft, Block)):
                heard.append((said, options.get("system"), event.result))
            yield event

    monkeypatch.setattr(engine.Engine, "stream", stream)
    return heard


def test_chat_reuses_what_is_encoded(turns):
    done = run(
        "chat",
        "--seed",
        1,
        "--max-denoising-steps",
        4,
        "--max-tokens",
        64,
        data=b"Spell the word cat.\n\nSpell the word dog.",
    )
    assert done.exit_code == 0
    assert done.stdout.startswith("c a t\n")
    (_, _, first), (said, _, second) = turns
    assert [one["content"] for one in said] == ["Spell the word cat.", "c a t", "Spell the word dog."]
    assert first.stats.reused_tokens == 0
    assert second.stats.reused_tokens >= first.stats.prompt_tokens
    same = engine_of(DEMO).generate(said, seed=1, max_tokens=64, max_denoising_steps=4)
    assert second.tokens == same.tokens


def test_chat_commands(turns):
    lines = ["Spell the word \\", "cat.", "/system Be brief.", "Spell the word cat.", "/nonsense", "/reset", "/system"]
    lines += ["Hello.", "/exit", "not said"]
    done = run(
        "chat", "--seed", 1, "--max-denoising-steps", 1, "--max-tokens", 8, "-m", DEMO, data="\n".join(lines).encode()
    )
    assert done.exit_code == 0
    assert done.stderr == "There is no command /nonsense; /help lists them.\n"
    assert [(len(said), said[-1]["content"], system) for said, system, _ in turns] == [
        (1, "Spell the word \ncat.", None),
        (3, "Spell the word cat.", "Be brief."),
        (1, "Hello.", None),
    ]


def test_ctrl_c_in_a_piped_chat(interrupted):
    done = run("chat", "--seed", 0, *TWO_BLOCKS, data=f"{COUNT}\nSpell the word cat.\n".encode())
    assert done.exit_code == 130
    assert done.stdout.startswith("1, 2, 3") and done.stdout.count("\n") == 1


def test_ctrl_c_in_a_chat_keeps_what_is_finished(monkeypatch, interrupted):
    lines = iter([COUNT, "Go on.", None])
    said = []
    real = engine.Engine.stream

    def stream(self, messages, **options):
        said.append([one["content"] for one in messages])
        return real(self, messages, **options)

    monkeypatch.setattr(engine.Engine, "stream", stream)
    monkeypatch.setattr(main, "_read_turn", lambda _: next(lines))
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    done = run("chat", "--seed", 0, *TWO_BLOCKS)
    assert done.exit_code == 0
    assert said[1][0] == COUNT and said[1][1].startswith("1, 2, 3") and said[1][2] == "Go on."


# info


def test_info_tells_what_loading_would_do(monkeypatch):
    seen = []
    need = memory.need

    def recorded(*arguments):
        seen.append(need(*arguments))
        return seen[-1]

    monkeypatch.setattr(memory, "need", recorded)
    engine.load(DEMO)
    told = json.loads(run("info", DEMO, "--json").stdout)
    assert told["memory"]["total"] == seen[-1].total == seen[0].total
    assert told["memory"]["context"] == 4096
    assert told["parameters"]["total"] == 6_717_772
    assert told["bits_per_weight"] == pytest.approx(16, abs=0.01)
    assert list(told["recipes"]) == ["3bit", "4bit", "6bit", "8bit", "mxfp4", "mxfp8", "nvfp4"]


def test_convert_then_info(tmp_path, monkeypatch):
    small = tmp_path / "small"
    done = run("convert", DEMO, "-q", "--mlx-path", small)
    assert done.exit_code == 0, done.stderr
    seen = []
    check = memory.check
    monkeypatch.setattr(memory, "check", lambda held, need, sizes: seen.append(need) or check(held, need, sizes))
    engine.load(small)
    told = json.loads(run("info", small, "--json").stdout)
    assert told["memory"]["total"] == seen[0].total
    assert told["quantization"]["bits"] == 4 and told["recipes"] is None
    assert told["bits_per_weight"] < 10


def test_info_for_people():
    done = run("info", "--context", 1024)
    assert done.stderr == main.DEMO_NOTICE + "\n"
    lines = done.stdout.splitlines()
    assert lines[0] == f"model         {DEMO}"
    assert "layers        6: 5 sliding (window 96), 1 full" in lines
    assert "experts       8, 2 a token" in lines
    assert "sampler       max-denoising-steps 48, entropy-bound 0.1, t-min 0.4, t-max 0.8" in lines
    assert [line.split()[0] for line in lines if line.endswith(" fits")][:2] == ["1024", "4096"]


def test_info_says_when_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(device, "available", lambda: 10_000_000)
    about = info.describe(Checkpoint.open(DEMO))
    assert not about["memory"]["fits"]
    missing = errors.human(about["memory"]["total"] - 10_000_000)
    assert f"{'':14}does not fit: {missing} are missing" in info.lines(about)
