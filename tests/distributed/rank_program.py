"""What `test_processes.py` runs as real ranks: python rank_program.py OUT MODEL; rank 0 writes what it found."""

import json
import os
import sys
from pathlib import Path

out, model = Path(sys.argv[1]), sys.argv[2]
os.environ["XDG_CACHE_HOME"] = f"{out}-rank-{os.environ['MLX_RANK']}"  # as on machines of their own
if os.environ["MLX_RANK"] != "0":
    model = f"{model}-of-another-machine"

from answers import few_answers  # noqa: E402

import mlx_dgemma  # noqa: E402
from mlx_dgemma.distributed import group as groups  # noqa: E402
from mlx_dgemma.errors import DgemmaError  # noqa: E402

group = groups.init()
shared = group.share({"text": "é" * 5000} if group.rank == 0 else None)
found = {
    "ranks": group.gather_values([group.rank, "x" * group.rank]),
    "shared": group.gather_values(len(shared["text"])),
    "seeds": group.gather_values([group.draw_seed(), group.draw_seed()]),
}
try:
    engine = mlx_dgemma.load(model, dtype="float32", group=group)
    found["answers"] = group.gather_values(few_answers(engine))
    found["notes"] = group.gather_values(engine.notes)
    found["unseeded"] = group.gather_values(engine.generate("Hi", max_tokens=4, max_denoising_steps=1).stats.seed)
    engine = mlx_dgemma.load(model, dtype="float32", group=group)  # what was received is found again
    found["again"] = group.gather_values(engine.notes)
    if group.rank:
        kept = engine.checkpoint.path / "generation_config.json"
        kept.write_text(kept.read_text() + " ")
    mlx_dgemma.load(model, dtype="float32", group=group)
except DgemmaError as error:
    found["error"] = group.gather_values(f"{type(error).__name__} {error}")
if group.rank == 0:
    out.write_text(json.dumps(found))
