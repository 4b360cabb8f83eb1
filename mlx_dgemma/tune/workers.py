"""A batch's gradients on all cores: MLX's CPU backend computes on a single one, so each has a process of its own.

Threads would not do: MLX bounds the tasks in flight of all streams together, and one starves the other. Nor would
multiprocessing, which runs a caller's script again in every process unless that guards its main part.
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
from .objective import Batch, Noise, Objective, Part, loss

MODEL = 2**28  # bytes of weights; larger models are not copied into other processes
POSITIONS = 512  # of a batch's prefixes and canvases; less is not worth the way to another process


class Workers:
    """Processes with a copy of a model each, started when they are needed; they end with `close` or this process.

    Args:
        model: what is trained of it goes with every part, the rest stays as it is.
        objective: what is minimised.
    """

    def __init__(self, model: DiffusionGemma, objective: Objective):
        self._model, self._objective = model, objective
        self._processes: list[subprocess.Popen] = []
        self.peak_bytes = 0  # that all of them together held at most

    def _start(self) -> None:
        # A BLAS with threads of its own would fight for the cores.
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
        # This package, not one that happens to lie in the working directory.
        run = f"import sys; sys.path = [*filter(None, sys.path)]; from {__name__} import serve; serve()"
        command, pipe = [sys.executable, "-c", run], subprocess.PIPE
        # A session of their own: Ctrl-C stops this process, which finishes its step first.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, start_new_session=True)
        self._processes.append(process)
        _send((self._model, self._objective), process.stdin)

    def gradients(self, weights: Any, parts: Sequence[Part]) -> tuple[tuple[mx.array, ...], Any]:
        """Losses and gradients of a batch, a process a part.

        Raises:
            MemoryLimitError: a process was ended from outside.
            PromptError: as `loss`.
        """
        try:
            while len(self._processes) < len(parts):
                self._start()
            used = self._processes[: len(parts)]
            for process, part in zip(used, parts):
                _send((weights, part), process.stdin)
            found: list[Any] = [_receive(process.stdout) for process in used]
        except (EOFError, BrokenPipeError):
            self.close()
            raise MemoryLimitError(
                "A process that computed gradients has ended, as happens where memory runs out; "
                "lower --batch-size, and go on with --resume."
            ) from None
        for one in found:
            if isinstance(one, DgemmaError):
                raise one
        self.peak_bytes = max(self.peak_bytes, sum(peak for _, peak in found))
        total = found[0][0]
        for one, _ in found[1:]:
            total = tree_map(lambda a, b: a + b, total, one)
        return total

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.communicate()
        self._processes = []


def differentiate(
    model: DiffusionGemma, objective: Objective, batch: Batch, noise: Noise, shares: tuple[float, float] = (1.0, 1.0)
) -> tuple[tuple[mx.array, ...], Any]:
    """Losses and the gradients of what is trained, see `objective.loss`; lazy."""
    return nn.value_and_grad(model, lambda: tuple(loss(model, batch, noise, objective, shares)))()


def _send(what: Any, pipe: Any) -> None:
    pickle.dump(what, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _receive(pipe: Any) -> Any:
    return pickle.load(pipe)


def serve() -> None:
    """Answer on stdout what comes on stdin: a model and an objective, then weights and parts."""
    mx.set_default_device(mx.cpu)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes elsewhere
    model, objective = pickle.load(source)
    while True:
        try:
            weights, part = pickle.load(source)
        except EOFError:
            return
        model.update(weights)
        found: Any
        try:
            found = differentiate(model, objective, *part)
            mx.eval(found)
            found = found, mx.get_peak_memory()
        except DgemmaError as error:
            found = error
        _send(found, sink)
