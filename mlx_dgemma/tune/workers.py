"""Compute the gradients of a batch on all cores, with one process per core.

MLX's CPU backend uses a single core per stream. Threads do not help, because MLX limits the number of tasks in flight
over all streams, so that one stream blocks the others. `multiprocessing` is not used, because it runs the caller's
script again in every process unless the script guards its main part.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from ..errors import DgemmaError, MemoryLimitError
from ..model.diffusion_gemma import DiffusionGemma
from .objective import BatchPart, Trainable

MAX_MODEL_BYTES = 2**28  # larger models are not copied to other processes
MIN_POSITIONS = 512  # prefix and canvas positions of a batch; for fewer, the transfer costs more than it gains


class GradientWorkers:
    """Processes with a copy of the model each. They start when they are needed and end with `close` or this process.

    Args:
        model: its trainable weights are sent with every batch; the others must not change.
        objective: the loss to differentiate.

    Attributes:
        peak_bytes: largest sum of the processes' peak memory.
    """

    def __init__(self, model: DiffusionGemma, objective: Trainable):
        self._model, self._objective = model, objective
        self._processes: list[subprocess.Popen] = []
        self.peak_bytes = 0

    def _start(self) -> None:
        # A multi-threaded BLAS would compete for the cores.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        # Without the empty path, another package of this name in the working directory is not imported.
        run = f"import sys; sys.path = [*filter(None, sys.path)]; from {__name__} import worker; worker()"
        command, pipe = [sys.executable, "-c", run], subprocess.PIPE
        # In a session of its own the process does not receive Ctrl-C, so the current step can be completed.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True)
        self._processes.append(process)
        _send((self._model, self._objective), process.stdin)

    def gradients(self, weights: Any, parts: Sequence[BatchPart]) -> tuple[tuple[mx.array, ...], Any]:
        """Losses and gradients of a batch, with one process per part.

        Args:
            weights: the trainable weights.
            parts: from `Trainable.split`.

        Raises:
            MemoryLimitError: a process died.
            PromptError: see `Trainable.loss`.
        """
        try:
            while len(self._processes) < len(parts):
                self._start()
            processes = self._processes[: len(parts)]
            for process, part in zip(processes, parts):
                _send((weights, part), process.stdin)
            replies: list[Any] = [pickle.load(process.stdout) for process in processes]  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError):
            self.close()
            raise MemoryLimitError(
                "A gradient process died, probably because memory ran out; "
                "lower --batch-size and continue with --resume."
            ) from None
        for reply in replies:
            if isinstance(reply, DgemmaError):
                raise reply
        self.peak_bytes = max(self.peak_bytes, sum(peak for _, peak in replies))
        total = replies[0][0]
        for result, _ in replies[1:]:
            total = tree_map(lambda a, b: a + b, total, result)
        return total

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []


def loss_and_gradients(
    model: DiffusionGemma, objective: Trainable, batch: Any, noise: Any, weights: tuple[float, float] = (1.0, 1.0)
) -> tuple[tuple[mx.array, ...], Any]:
    """The losses, see `Trainable.loss`, and the gradients of the trainable weights; lazy."""
    return nn.value_and_grad(model, lambda: tuple(objective.loss(model, batch, noise, weights)))()


def _send(message: Any, pipe: Any) -> None:
    pickle.dump(message, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def worker() -> None:
    """Main function of a process. It reads a model and an objective from stdin, then weights and batch parts.

    For each part it writes (losses and gradients, peak memory in bytes) or a DgemmaError to stdout.
    """
    mx.set_default_device(mx.cpu)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text goes to stderr, not into the pipe
    model, objective = pickle.load(source)
    while True:
        try:
            weights, part = pickle.load(source)
        except EOFError:
            return
        model.update(weights)
        reply: Any
        try:
            result = loss_and_gradients(model, objective, *part)
            mx.eval(result)
            reply = result, mx.get_peak_memory()
        except DgemmaError as error:
            reply = error
        _send(reply, sink)
