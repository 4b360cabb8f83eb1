"""Audio for tests: tones in WAV files, and a package in mlx-whisper's place that tells what it was given."""

import wave

import numpy as np

STAND_IN = """
import numpy as np

def transcribe(audio, *, path_or_hf_repo="mlx-community/whisper-tiny", verbose=None, **options):
    assert audio.dtype == np.float32 and audio.ndim == 1
    print("a library's own words")
    if path_or_hf_repo == "nobody/none":
        raise OSError("no such model\\nsecond line")
    if path_or_hf_repo == "crash":
        import os
        os._exit(7)
    if path_or_hf_repo == "sleep":
        import time
        time.sleep(60)
    peak, rising = np.abs(audio).max(), np.sum((audio[:-1] < 0) & (audio[1:] >= 0))
    seconds = len(audio) / 16000
    text = f" {rising / seconds:.0f} hertz, {seconds:.2f} seconds, peak {peak:.2f}, by {path_or_hf_repo}"
    return {"text": text if peak > 0.01 else " ", "segments": [], "language": "en"}
"""


def tone(path, hertz=440, seconds=1.0, rate=16_000, channels=1, width=2):
    """A WAV file of half the full loudness, with samples of 1, 2 or 3 bytes."""
    wave_form = 0.5 * np.cos(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate) * bool(hertz)
    samples = np.round(wave_form * (2 ** (8 * width - 1) - 1)).astype("<i4")
    data = (samples + 128 if width == 1 else samples).view(np.uint8).reshape(-1, 4)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(np.repeat(data[:, None], channels, axis=1).tobytes())
    return path
