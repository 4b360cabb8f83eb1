"""`mlx-dgemma generate`: what lands on stdout and stderr, and what reaches the engine."""

import json
import sys
import warnings

import pytest
from commands import python, run, shell
from PIL import Image
from support import engine_of

from mlx_dgemma import engine
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli.calls import answers
from mlx_dgemma.decoding.events import Stats
from mlx_dgemma.tasks import answer

JSON_PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."
COUNT = "Count from 1 to 60."
TWO_BLOCKS = ("--max-tokens", 100)
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


def test_a_pipe_gets_the_text_alone():
    done = python("-m", "mlx_dgemma", "generate", JSON_PROMPT, "--seed", "0")
    assert done.returncode == 0
    assert done.stdout == '{"name": "Anna", "age": 31, "city": "Oslo"}\n'
    assert done.stderr == answers.DEMO_NOTICE + "\n"


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
    assert list(told["stats"]) == list(Stats.__dataclass_fields__)
    assert list(told["stats"]["seconds"]) == ["load", "prefill", "denoise", "total"]


@pytest.fixture
def asked(monkeypatch):
    """Messages and options of the request; the answer is `Spell the word cat.`'s text."""
    heard = []
    real = answer.answer

    def ask(builder, messages, **options):
        heard.append((messages, options))
        return real(builder, "Spell the word cat.", seed=0, max_denoising_steps=1)

    monkeypatch.setattr(answer, "answer", ask)
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
    given = {name: value for name, value in options.items() if value is not None}
    assert given == {"stop": ("a", "b"), "t_min": 0.0, "thinking": True}


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


def test_a_warning_about_a_picture_is_one_line(tmp_path, red):
    Image.open(red).save(tmp_path / "two.gif", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    done = run("generate", "What color is the shape?", "--seed", 0, "-m", DEMO, "--image", tmp_path / "two.gif")
    assert done.stderr == f"Warning: {tmp_path / 'two.gif'} holds several frames; only the first is taken.\n"
    assert done.exit_code == 0


def test_warnings_are_one_line(monkeypatch):
    real = engine.Engine.run

    def run_(self, *arguments, **options):
        for event in real(self, *arguments, **options):
            warnings.warn("The tool call 'x' is broken; it was kept as text.", stacklevel=1)
            yield event

    monkeypatch.setattr(engine.Engine, "run", run_)
    done = run("generate", "Spell the word cat.", "--seed", 0, "-m", DEMO)
    assert (done.stdout, done.stderr) == ("c a t\n", "Warning: The tool call 'x' is broken; it was kept as text.\n")


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
