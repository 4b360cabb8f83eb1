"""`mlx-dgemma chat`: turns, commands, pictures and interrupts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import run
from support import engine_of

from mlx_dgemma import engine
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.cli.commands import chat
from mlx_dgemma.decoding.events import Block, Draft

COUNT = "Count from 1 to 60."
TWO_BLOCKS = ("--max-tokens", 100)


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
    lines = iter([COUNT, "Go on.", "/exit"])
    said = []
    real = engine.Engine.stream

    def stream(self, messages, **options):
        said.append([one["content"] for one in messages])
        return real(self, messages, **options)

    monkeypatch.setattr(engine.Engine, "stream", stream)
    typed = SimpleNamespace(interactive=True, discarded=False, read=lambda: next(lines))
    monkeypatch.setattr(chat, "chat_input", lambda _: typed)
    done = run("chat", "--seed", 0, *TWO_BLOCKS)
    assert done.exit_code == 0
    assert said[1][0] == COUNT and said[1][1].startswith("1, 2, 3") and said[1][2] == "Go on."


def test_a_picture_in_a_chat(red):
    done = run("chat", "--seed", 0, "--exact", data=f"/image {red}\nWhat color is the shape?\n".encode())
    assert (done.exit_code, done.stdout) == (0, "The square is red.\n")
    done = run("chat", "--seed", 0, "-m", DEMO, data=b"/image none.png\nWhat color is the shape?\n")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"Error: {Path('none.png').absolute()} does not exist.\n"


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
