"""A killed run can be resumed: nothing that was there is lost, and the rest is trained again.

`bench/kills.py` kills real processes at more instants.
"""

import json

import numpy as np
from kills import contents, drawn, instants

import mlx_dgemma
from mlx_dgemma.tune.config import RunConfig, TrainerConfig
from mlx_dgemma.tune.run import tune


def test_a_killed_run_can_be_resumed_from_any_instant(tmp_path):
    """With the same adapter at its end, and a log with a row for each step."""
    lines = [json.dumps({"prompt": f"Say {word}.", "completion": word}) for word in ("cat", "dog")]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    method = TrainerConfig(rank=2, steps=2, layers=1, learning_rate=0.01)

    def train(output, resume=False):
        engine = mlx_dgemma.load(dtype="float32")
        plan = RunConfig(
            str(tmp_path), output, batch_size=1, encoder_weight=0.0, fill=0, save_every=1, validate_every=0
        )
        return list(tune(engine, method, plan, resume=resume))

    place = tmp_path / "place"
    place.mkdir()
    left = instants(place, tmp_path / "seen", lambda: train(place / "out"))
    whole = contents(place / "out")
    for folder in [left[number] for number in sorted(drawn(len(left) - 1, 4))]:
        train(folder / "out", resume=(folder / "out" / "state.safetensors").exists())
        found = contents(folder / "out")
        assert found["adapter_model.safetensors"] == whole["adapter_model.safetensors"]
        assert sorted(found) == sorted(whole)
        rows = np.loadtxt(folder / "out" / "log.csv", delimiter=",", skiprows=1, usecols=0)
        assert rows.tolist() == [1, 2]
