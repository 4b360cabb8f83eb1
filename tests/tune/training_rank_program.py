"""What a rank of `test_tune_ranks.py` does; it writes what it found to a file of its own."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from support import refusal
from training import batch_of, trainer, weights

import mlx_dgemma
from mlx_dgemma.distributed.agreement import check_equal, is_any, together
from mlx_dgemma.distributed.group import init
from mlx_dgemma.errors import CircumstanceError, DataError, OptionError
from mlx_dgemma.tune.config import RunConfig, TrainerConfig
from mlx_dgemma.tune.run import tune

STEPS, SAVED, ROWS = 8, 5, 4
SETTINGS = {"steps": STEPS, "clip": 0.5}


def batches():
    """The joined batches; rows have different numbers of tokens that count."""
    for step in range(STEPS):
        batch = batch_of(step, ROWS)
        batch.supervised[step % ROWS, 1:] = False
        yield batch


def digest(model):
    return hashlib.sha256(b"".join(array.tobytes() for array in weights(model).values())).hexdigest()


def train(group, folder):
    """The losses of all steps; a second trainer goes on from the saved state."""
    run, losses, rest = {"ranks": group.size}, [], []
    one, again = trainer(group, **SETTINGS), trainer(group, **SETTINGS)
    for step, batch in enumerate(batches()):
        losses.append(one.update([batch]).total)
        if step == SAVED - 1:
            one.share_state()
            if group.rank == 0:
                one.save(folder, run)
    if group.rank == 0:
        again.resume(folder, run)
    again.share_state()
    for batch in list(batches())[SAVED:]:
        rest.append(again.update([batch]).total)
    valid = [one.validation_loss(batch_of(7, rows), 0)[0].item() for rows in (4, 3, 1)]
    if group.rank == 0:
        np.savez(folder / "weights.npz", **weights(one.model))
    twice = trainer(group, accumulate=2)
    twice = [twice.update([batch_of(step, 2), batch_of(step + 50, 2)]).total for step in range(1)]
    same = digest(one.model) == digest(again.model)
    return {"losses": losses, "rest": rest, "valid": valid, "twice": twice, "same": same, "digest": digest(one.model)}


def run(group, folder):
    """Two steps of a whole run, and a resumption, as the command does it; rank 0 alone has the folder."""
    output = folder / f"out{group.rank}"
    method = TrainerConfig(rank=2, steps=2, learning_rate=0.01, layers=1)

    def go(data, size=2, resume=False):
        engine = mlx_dgemma.load(dtype="float32")
        config = RunConfig(
            str(folder / data), output, batch_size=size, fill=0, encoder_weight=0.0, self_conditioning=0.0
        )
        said = []
        steps = [
            one.step for one in tune(engine, method, config, resume, lambda: group.rank == 1, said.append, group=group)
        ]
        return [steps, said, digest(engine.model)]

    first = go("data", resume=False)
    second = go("data", resume=True)
    return {
        "first": first,
        "second": second,
        "files": sorted(one.name for one in output.iterdir()) if output.exists() else [],
        "odd": refusal(OptionError, lambda: go("data", size=3)),
        "unequal": refusal(CircumstanceError, lambda: go(f"data{group.rank}", resume=True)),
    }


def agree(group):
    def fail(on):
        if group.rank == on:
            raise DataError("It is so.")

    return {
        "failed": refusal(DataError, lambda: together(group, lambda: fail(1))),
        "any": [is_any(group, group.rank == 1), is_any(group, False)],
        "equal": refusal(CircumstanceError, lambda: check_equal(group, {"version": "1", "data": group.rank})),
        "dropout": refusal(OptionError, lambda: trainer(group, dropout=0.1, recompute=False)),
    }


if __name__ == "__main__":
    folder, group = Path(sys.argv[1]), init()
    told = {**agree(group), **train(group, folder), "run": run(group, folder)}
    (folder / f"rank{group.rank}.json").write_text(json.dumps(told))
