"""What turns of a chat do: commands, attachments, files of conversations, and mistakes that keep all of it."""

import io
import json
import os
import shlex
import sys
from types import SimpleNamespace

import chat_program
import pytest
from hearing import tone
from PIL import Image
from support import refusal

from mlx_dgemma.cli.commands import chat as chat_command
from mlx_dgemma.cli.commands.chat import Talk, dropped
from mlx_dgemma.cli.history import KEPT, History
from mlx_dgemma.cli.terminal import Terminal
from mlx_dgemma.errors import DgemmaError, OptionError, PromptError


class Streams:
    """What a chat writes."""

    def __init__(self):
        self.out, self.err = io.StringIO(), io.StringIO()

    def told(self):
        """What came to stdout and stderr since the last time."""
        found = self.out.getvalue(), self.err.getvalue()
        for stream in (self.out, self.err):
            stream.seek(0)
            stream.truncate()
        return found


@pytest.fixture
def streams():
    return Streams()


@pytest.fixture
def talk(monkeypatch, tmp_path, streams):
    """A chat in a folder of its own, with someone who types."""
    monkeypatch.chdir(tmp_path)
    typed = SimpleNamespace(interactive=True, discarded=False, keys="", read=None)
    monkeypatch.setattr(chat_command, "chat_input", lambda terminal: typed)
    return Talk(chat_program.load(None, None), {}, None, Terminal(streams.out, streams.err))


def picture(path):
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_a_file_is_named_as_a_user_or_a_terminal_does(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = picture(tmp_path / "my pic.png")
    for name in ("my pic.png", '"my pic.png"', "my\\ pic.png", "~/my pic.png", "~/my\\ pic.png", path.as_uri()):
        talk.take(f"/image {name}")
    assert talk.conversation.parts == [{"type": "image", "image": str(path)}] * 6


def test_what_is_dropped_is_attached(talk, tmp_path):
    one, two = picture(tmp_path / "it's 1.png"), picture(tmp_path / "two.JPG".lower())
    line = f"{shlex.quote(str(one))} {two} "
    assert dropped(line) == [("image", str(one)), ("image", str(two))]
    talk.take(line)
    assert [part["image"] for part in talk.conversation.parts] == [str(one), str(two)]
    (tmp_path / "notes.txt").write_text("a")
    for other in (f"{one} what is it?", str(tmp_path / "notes.txt"), "two.jpg", "/none.png", "it's", "", " "):
        assert dropped(other) == []


def test_what_cannot_be_attached_is_told_at_once(talk, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    said = refusal(PromptError, talk.take, "/image a.png")
    assert said.startswith(f"{tmp_path / 'a.png'} is no picture that can be read; give a PNG, ")
    assert refusal(PromptError, talk.take, "/video none.mp4") == f"{tmp_path / 'none.mp4'} does not exist."
    for command in ("image", "video", "audio", "save", "load"):
        assert refusal(OptionError, talk.take, f"/{command}") == f"/{command} needs a file: /{command} FILE."
    assert talk.conversation.parts == []


def test_commands_and_a_question_may_come_in_one_paste(talk, tmp_path, streams):
    picture(tmp_path / "a.png")
    talk.take("/reset\n/image a.png\nWhat is it?\nAnd why?")
    assert streams.told()[0] == '# Turn 1: image text\n`"What is it?\\nAnd why?"`\n**no** system\n'
    talk.take("/system Be brief.\nBe kind.")
    assert talk.conversation.system == "Be brief.\nBe kind."
    talk.take("/nonsense\nnot sent")
    assert streams.told() == ("", "There is no command /nonsense; /help lists them.\n")
    talk.take("/etc/hosts is what?")
    assert len(talk.conversation.messages) == 4


def test_a_mistake_keeps_the_conversation_and_what_is_attached(talk, tmp_path, streams):
    talk.take("one")
    picture(tmp_path / "a.png")
    talk.take("/image a.png")
    before = list(talk.conversation.messages)
    assert refusal(PromptError, talk.take, "fail") == "The echo is told to fail."
    assert (talk.conversation.messages, len(talk.conversation.parts)) == (before, 1)
    talk.take("two")
    assert (len(talk.conversation.messages), talk.conversation.parts) == (4, [])


def test_the_mode_can_be_changed(talk):
    talk.take("/mode causal")
    assert (talk.conversation.mode, talk.conversation.options) == ("causal", {"mode": "causal"})
    said = refusal(OptionError, talk.take, "/mode fast")
    assert "'fast'" in said and "diffusion" in said
    talk.conversation.options["top_k"] = 5
    assert "top_k" in refusal(OptionError, talk.take, "/mode diffusion")
    assert talk.conversation.mode == "causal"


def test_what_is_saved_is_gone_on_with(talk, tmp_path, streams):
    picture(tmp_path / "a.png")
    talk.take("/system Be brief.\n")
    talk.take("/mode causal\n/image a.png\nWhat is it?")
    messages = list(talk.conversation.messages)
    talk.take("/save talk.json")
    talk.take("Go on.\n")
    talk.take("/save talk.json")  # over itself
    assert os.stat("talk.json").st_mode & 0o777 == 0o600
    talk.take("/system\n")
    talk.take("/mode diffusion\n/reset\n/load talk.json")
    assert (talk.conversation.system, talk.conversation.mode) == ("Be brief.", "causal")
    assert talk.conversation.messages[:2] == messages
    assert messages[0]["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}


def test_a_new_file_is_named_as_in_a_shell(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("'a b.json'", "c\\ d.json", '"~/e.json"', "it's.json", "f g.json"):
        talk.take(f"/save {name}")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a b.json", "c d.json", "e.json", "f g.json", "it's.json"]
    assert refusal(OptionError, talk.take, "/load 'no ne.json'") == f"{tmp_path}/no ne.json does not exist."


def test_files_of_others_are_left_alone(talk, tmp_path):
    talk.take("one")
    before = talk.conversation.messages
    for name, text in (("notes.md", "mine"), ("other.json", '{"messages": []}'), ("empty", "")):
        (tmp_path / name).write_text(text)
        path = tmp_path / name
        told = f"{path} exists and is no saved conversation; give another name."
        assert refusal(OptionError, talk.take, f"/save {name}") == told
        assert path.read_text() == text
        told = f"{path} is no saved conversation; give a file that /save wrote."
        assert refusal(OptionError, talk.take, f"/load {name}") == told
    assert refusal(OptionError, talk.take, "/load none") == f"{tmp_path / 'none'} does not exist."
    assert "No such file" in refusal(DgemmaError, talk.take, "/save none/talk.json")
    talk.take("/save a.json")
    held = json.loads((tmp_path / "a.json").read_text())
    for broken, told in (
        ({"messages": [{"role": "robot", "content": "x"}]}, "Message 0 has the role 'robot'; it should be one of "),
        ({"mode": "fast"}, "mode is 'fast'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/none.png"}]}]},
            "/none.png does not exist.",
        ),
    ):
        (tmp_path / "a.json").write_text(json.dumps({**held, **broken}))
        said = refusal(OptionError, talk.take, "/load a.json")
        assert said.startswith(f"{tmp_path / 'a.json'} cannot be gone on with: {told}")
    assert talk.conversation.messages is before


def test_a_turn_is_written_in_an_editor(talk, tmp_path, monkeypatch, streams):
    script = tmp_path / "editor.py"
    script.write_text("import sys; path = sys.argv[-1]; text = open(path).read(); open(path, 'w').write(text + 'two')")
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", shlex.join([sys.executable, str(script)]))
    talk.take("!edit one")
    assert '`"one\\ntwo"`' in streams.told()[0]
    monkeypatch.setenv("VISUAL", "true")
    talk.take("!edit not saved")
    assert streams.told()[0] == ""
    assert len(talk.conversation.messages) == 2


def test_audio_is_heard_at_once_and_goes_before_the_text(talk, tmp_path, whisper, streams):
    tone(tmp_path / "my talk.wav")
    talk.audio_model = "tiny"
    talk.take("/audio my\\ talk.wav")
    said = "440 hertz, 1.00 seconds, peak 0.50, by tiny"
    assert streams.told()[1] == f"my talk.wav says: {said}\n"
    talk.take("Sum it up.")
    part = {"type": "text", "text": f"{said}\n\nSum it up.", "transcripts": [said]}
    assert talk.conversation.messages[0]["content"] == [part]


def test_the_history_stays_bounded(tmp_path):
    path = tmp_path / "state" / "history"
    path.parent.mkdir()
    path.write_text("".join(f'"{i}"\n' for i in range(2 * KEPT + 1)))
    history = History(path)
    assert history.entries == [str(i) for i in range(KEPT + 1, 2 * KEPT + 1)]
    assert len(path.read_text().splitlines()) == KEPT
    history.add("new")
    history.add("new")
    assert History(path).entries[-2:] == [str(2 * KEPT), "new"]
    (tmp_path / "file").write_text("")
    History(tmp_path / "file" / "history").add("nowhere to write")
