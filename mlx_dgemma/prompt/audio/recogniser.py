"""The process that runs mlx-whisper for `audio`: samples come on its stdin, and it prints what is said as JSON.

A process of its own gives back all of its memory, which the model needs, and may be ended at any time.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import numpy as np

# Run with the Whisper model and sys.path as arguments.
COMMAND = "import sys; sys.path[:] = sys.argv[2:]; from mlx_dgemma.prompt.audio.recogniser import main; main()"


def main() -> None:
    """Print {"text", "language"}, or {"error"} with what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches this process, too, and the caller tells it
    answer, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    samples = np.frombuffer(sys.stdin.buffer.read(), np.int16)
    json.dump(recognised(samples, sys.argv[1]), answer)
    answer.flush()


def recognised(samples: np.ndarray, model: str) -> dict[str, Any]:
    """What mlx-whisper makes of samples [N], int16 at 16 kHz."""
    try:
        from mlx_whisper import transcribe

        found = transcribe(samples.astype(np.float32) / 32768, path_or_hf_repo=model)
        return {"text": found["text"], "language": found.get("language")}
    except Exception as error:  # of the Hub, of a model that is none, of memory
        return {"error": f"{type(error).__name__}: {error}"}
