"""Audio: a real file is decoded and resampled, and what a stand-in for Whisper hears takes its place in the prompt."""

import base64
import json

import pytest
from commands import run
from hearing import tone
from support import engine_of, prompt_of, refusal

import mlx_dgemma
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.errors import PromptError
from mlx_dgemma.installation import add_extra
from mlx_dgemma.prompt.audio import transcripts as audio
from mlx_dgemma.tasks import choose, fill, infill

MISSING = (
    "The model does not hear, and mlx-whisper, which writes down what is said, is not installed; run "
    f"`{add_extra('audio')}`."
)


def test_a_tone_keeps_pitch_length_and_loudness(whisper, tmp_path):
    for rate, channels, width in ((44_100, 2, 2), (16_000, 1, 1), (8_000, 1, 3)):
        heard = audio.transcribe(tone(tmp_path / "a.wav", 440, 1.5, rate, channels, width))
        assert heard.text == "440 hertz, 1.50 seconds, peak 0.50, by mlx-community/whisper-large-v3-turbo"
        assert (heard.seconds, heard.language) == (pytest.approx(1.5, abs=0.01), "en")


def test_the_model_is_named_by_argument_or_variable(whisper, tmp_path, monkeypatch):
    file = tone(tmp_path / "a.wav", seconds=0.5)
    monkeypatch.setenv("MLX_DGEMMA_WHISPER", "~/tiny")
    monkeypatch.setenv("HOME", "/home/anna")
    assert audio.transcribe(file).text.endswith("by /home/anna/tiny")
    assert audio.transcribe(file, "mlx-community/whisper-tiny").text.endswith("by mlx-community/whisper-tiny")


def test_the_same_audio_is_recognised_once(whisper, tmp_path, monkeypatch):
    file = tone(tmp_path / "a.wav", 300, 0.5)
    first = audio.transcribe(file)
    monkeypatch.setattr(audio, "_recognised", lambda *_: pytest.fail("Whisper was asked again"))
    assert audio.transcribe(file.read_bytes()) == first


def test_what_is_no_speech_is_refused(whisper, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("no sound " * 99)
    (tmp_path / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:1,\n{tone(tmp_path / 'a.wav', seconds=0.2)}\n")
    known = "give a WAV, MP3, M4A, AAC, FLAC, Ogg, AIFF, CAF or WebM file."
    for name in ("a.txt", "list.m3u8"):
        said = refusal(PromptError, audio.transcribe, tmp_path / name)
        assert said.startswith(f"{tmp_path / name} is no audio that can be read, or is damaged (Invalid ")
        assert said.endswith(f"); {known}")
    assert refusal(PromptError, audio.transcribe, tmp_path / "none.wav") == f"{tmp_path / 'none.wav'} does not exist."
    empty = tone(tmp_path / "empty.wav", seconds=0)
    assert refusal(PromptError, audio.transcribe, empty) == f"{empty} holds no sound: its length is 0 seconds."
    silent = tone(tmp_path / "silent.wav", hertz=0)
    said = f"Whisper heard nothing that is said in {silent}; give a recording of speech."
    assert refusal(PromptError, audio.transcribe, silent) == said
    monkeypatch.setattr(audio, "MAX_SECONDS", 60)
    long = tone(tmp_path / "long.wav", seconds=120, rate=8000, width=1)
    said = f"{long} has 2 minutes of sound; at most 1 are transcribed at once, so cut it into pieces."
    assert refusal(PromptError, audio.transcribe, long) == said
    monkeypatch.setattr(audio, "MAX_BYTES", 1000)
    said = f"{long} has 960.0 kB; at most 1.0 kB are read, so cut it into pieces."
    assert refusal(PromptError, audio.transcribe, long) == said


def test_what_fails_in_whisper_is_a_sentence(whisper, tmp_path, monkeypatch):
    file = tone(tmp_path / "a.wav", 500, 0.3)
    said = f"nobody/none could not write down {file} (OSError: no such model); is "
    said += "$MLX_DGEMMA_WHISPER a Whisper model for MLX?"
    assert refusal(PromptError, audio.transcribe, file, "nobody/none") == said
    said = f"crash ended with status 7 before {file} was written down."
    assert refusal(PromptError, audio.transcribe, file, "crash") == said
    monkeypatch.setattr(audio, "LOADING_SECONDS", 0.1)
    said = f"sleep was not done with {file} after 1 s; give a shorter piece."
    assert refusal(PromptError, audio.transcribe, file, "sleep") == said


def test_a_transcript_stands_where_the_audio_stood(whisper, tmp_path):
    data = tone(tmp_path / "a.wav", 440, 1.0).read_bytes()
    said = "440 hertz, 1.00 seconds, peak 0.50, by mlx-community/whisper-large-v3-turbo"
    parts = [
        {"type": "text", "text": "Before."},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}},
        {"type": "text", "text": "Behind."},
    ]
    heard = prompt_of(engine_of(DEMO), [{"role": "user", "content": parts}])
    typed = prompt_of(engine_of(DEMO), f"Before.\n\n{said}\n\nBehind.")
    assert heard.tokens == typed.tokens
    assert (heard.transcripts, typed.transcripts) == ([said], [])


def test_choices_and_holes_hear(whisper, tmp_path):
    builder, said = (
        engine_of(DEMO).builder,
        "440 hertz, 1.00 seconds, peak 0.50, by mlx-community/whisper-large-v3-turbo",
    )
    heard = [{"role": "user", "content": [{"type": "audio", "audio": tone(tmp_path / "a.wav", 440, 1.0)}]}]
    for ask in (
        lambda prompt: choose.ask(builder, prompt, ["a", "b"]).requests[0],
        lambda prompt: infill.infill(builder, "a ", "", prompt=prompt, seed=0),
        lambda prompt: fill.fill(builder, "It is {x}.", {"x": ["a", "b"]}, prompt=prompt, seed=0),
    ):
        assert ask(heard).prompt.tokens == ask(said).prompt.tokens
        assert ask(heard).prompt.transcripts == [said]


def test_generate_hears(whisper, tmp_path):
    file, few = tone(tmp_path / "what is it.wav"), ("--seed", 0, "--max-denoising-steps", 1, "--json")
    said = "440 hertz, 1.00 seconds, peak 0.50, by tiny"
    done = run("generate", "-m", DEMO, "--audio", file, "--audio-model", "tiny", "Sum it up.", *few)
    assert (done.exit_code, done.stderr) == (0, f"what is it.wav says: {said}\n")
    told = json.loads(done.stdout)
    typed = json.loads(run("generate", "-m", DEMO, f"{said}\n\nSum it up.", *few).stdout)
    assert (told["text"], told["stats"]["transcripts"]) == (typed["text"], [said])


def test_without_the_extra_a_sentence_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "find_spec", lambda name: None)
    file = tone(tmp_path / "a.wav", seconds=0.1)
    assert refusal(PromptError, audio.transcribe, file) == MISSING
    monkeypatch.setattr(mlx_dgemma.engine, "load", lambda *_, **__: pytest.fail("weights were read"))
    done = run("generate", "-m", DEMO, "--audio", file)
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", f"Error: {MISSING}\n")
