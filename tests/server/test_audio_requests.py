"""Audio in requests: transcribed in its place, told in the statistics, refused with a sentence without the extra."""

import base64

import pytest
from hearing import tone
from serving import CHAT, MODEL, Script, post

from mlx_dgemma.installation import add_extra
from mlx_dgemma.prompt.audio import transcripts as audio
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import Settings

SAID = "440 hertz, 1.00 seconds, peak 0.50, by mlx-community/whisper-large-v3-turbo"
FEW = {"seed": 0, "max_denoising_steps": 1}


def part(path, **changes):
    data = base64.b64encode(tone(path).read_bytes()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav", **changes}}


def asked(parts, role="user", **more):
    return {"messages": [{"role": role, "content": parts, **more}]}


def refused(body, path=CHAT):
    status, answer = post(create_app(Script(), Settings()), path, body)
    assert status == 400
    return answer["error"]["param"], answer["error"]["message"]


def test_audio_is_transcribed_in_its_place(whisper, client, tmp_path):
    sound, text = part(tmp_path / "a.wav"), {"type": "text", "text": "Sum it up."}
    more = {"extra_body": {"max_denoising_steps": 1, "max_tokens": 16}, "model": MODEL}
    heard = client.chat.completions.create(messages=[{"role": "user", "content": [sound, text]}], seed=0, n=2, **more)
    typed = f"{SAID}\n\nSum it up."
    read = client.chat.completions.create(messages=[{"role": "user", "content": typed}], seed=0, n=2, **more)
    assert [one.message.content for one in heard.choices] == [one.message.content for one in read.choices]
    assert heard.usage.prompt_tokens == read.usage.prompt_tokens
    assert [one["transcripts"] for one in heard.stats] == [[SAID], [SAID]]
    assert [one["transcripts"] for one in read.stats] == [[], []]
    items = [{"role": "user", "content": [sound, {"type": "input_text", "text": "Sum it up."}]}]
    more["extra_body"] = {**FEW, "max_output_tokens": 16}
    answer = client.responses.create(input=items, **more)
    assert answer.output_text == read.choices[0].message.content
    assert answer.stats["transcripts"] == [SAID]


def test_without_the_extra_a_sentence_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "find_spec", lambda name: None)
    assert refused(asked([part(tmp_path / "a.wav")])) == ("messages", audio.MISSING.format(add_extra("audio")))
    assert refused({"input": [{"role": "user", "content": [part(tmp_path / "a.wav")]}]}, "/v1/responses") == (
        "input",
        audio.MISSING.format(add_extra("audio")),
    )


@pytest.mark.parametrize(
    ("changes", "param", "message"),
    [
        ({"data": "!!"}, "input_audio.data", "'!!'; it should be a file's bytes in base64."),
        ({"format": "flac"}, "input_audio.format", '\'flac\'; it should be "wav" or "mp3".'),
        ({"url": "x"}, "input_audio.url", "not supported here; leave it out."),
    ],
)
def test_what_is_wrong_with_audio_is_named(tmp_path, changes, param, message):
    place = f"messages[0].content[0].{param}"
    assert refused(asked([part(tmp_path / "a.wav", **changes)])) == (place, f"{place} is {message}")


def test_audio_is_counted_and_stands_in_user_messages(whisper, tmp_path):
    sound = part(tmp_path / "a.wav")
    assert refused(asked([sound] * 17)) == ("messages", "There are more than 16 pieces of audio; send fewer.")
    assert refused({"input": [{"role": "assistant", "content": [sound]}]}, "/v1/responses") == (
        "input",
        "Audio stands in another message than a user's; send it in a user's.",
    )
    place = "messages[0].content[0].type"
    told = f"{place} is 'input_audio'; it should be \"text\"."
    assert refused(asked([sound], role="system")) == (place, told)
