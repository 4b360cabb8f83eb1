"""kill -9 of convert, fuse, tune and the prefix cache: what was there before is whole, and a rerun leaves nothing else.

    python bench/kills.py                     # 20 instants of each
    python bench/kills.py --points 3 cache    # fewer, of one

An instant is one operation on files: opening for writing, a write at an offset, a flush, a rename, making or removing.
A child counts them and kills itself with SIGKILL before the chosen one; a write is then done by half. The instants are
drawn with a seed from all operations of an undisturbed run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
WORDS = ("cat", "dog", "fox")


class Killer:
    """Counts the operations below a folder, and kills the process at one of them (-1 for none)."""

    def __init__(self, folder: Path, at: int):
        import mlx.core as mx

        self.folder, self.at, self.count = folder.resolve(), at, 0
        pwrite, fsync, save = os.pwrite, os.fsync, mx.save_safetensors

        def half_pwrite(handle, data, offset):
            self.step(lambda: pwrite(handle, data[: len(data) // 2], offset))
            return pwrite(handle, data, offset)

        def half_save(path, *rest):
            def half():
                save(path, *rest)
                os.truncate(path, os.path.getsize(path) // 2)

            self.step(half)
            save(path, *rest)

        def stepped_fsync(handle):
            self.step()
            fsync(handle)

        os.pwrite, os.fsync, mx.save_safetensors = half_pwrite, stepped_fsync, half_save
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        writes = event == "open" and (
            any(sign in (arguments[1] or "") for sign in "wax+") or (arguments[2] or 0) & (os.O_WRONLY | os.O_CREAT)
        )
        paths = [one for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
        inside = any(Path(os.fsdecode(path)).absolute().is_relative_to(self.folder) for path in paths)
        if (writes or event in CHANGES) and inside:
            self.step()

    def step(self, half=lambda: None):
        """Count an operation; `half` is what a kill leaves of it."""
        self.count += 1
        if self.count == self.at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


def convert(folder: Path) -> None:
    from mlx_dgemma.checkpoint.find import DEMO
    from mlx_dgemma.convert import convert

    if not (folder / "out").exists():
        convert(DEMO, folder / "out", "8bit")


def fuse(folder: Path) -> None:
    from mlx_dgemma.adapters import deltas, peft
    from mlx_dgemma.adapters.fuse import fuse
    from mlx_dgemma.checkpoint.find import DEMO

    adapter = folder.parent / "adapter"
    if not adapter.exists():
        write_adapter(adapter, deltas, peft)
    if not (folder / "out").exists():
        fuse(adapter, folder / "out", DEMO)


def write_adapter(adapter: Path, deltas, peft) -> None:
    import mlx.core as mx

    path = "model.decoder.layers.0.self_attn.q_proj"
    change = deltas.Delta(mx.random.normal((2, 192)), mx.random.normal((192, 2)), 0.5, None)
    peft.write(deltas.Adapter({path: change}, {path: change}), adapter, "demo")


def tune(folder: Path, kind: str = "lora") -> None:
    import mlx_dgemma
    from mlx_dgemma.tune.config import RunConfig, TrainerConfig
    from mlx_dgemma.tune.run import tune

    (folder.parent / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"Say {word}.", "completion": word}) for word in WORDS)
    )
    output = folder / "out"
    size = {"rank": 2} if kind == "lora" else {}
    tuner = TrainerConfig(kind=kind, steps=3, layers=1, learning_rate=0.01, **size)
    config = RunConfig(
        str(folder.parent / "train.jsonl"), output, batch_size=1, encoder_weight=0.0, fill=0, save_every=1
    )
    engine = mlx_dgemma.load(dtype="float32")
    list(tune(engine, tuner, config, resume=(output / "state.safetensors").exists()))


def tune_all_weights(folder: Path) -> None:
    tune(folder, "full")


def cache(folder: Path) -> None:
    """A conversation of three turns, each of which supersedes the file of the one before."""
    import mlx_dgemma
    from mlx_dgemma.serving.prefix_cache import PrefixCache

    engine = mlx_dgemma.load(dtype="float32")
    kept = PrefixCache(engine, 2**30, folder / "out")
    messages = [{"role": "user", "content": "Once there was a cat named Leo. " * 12 + "Spell the word frog."}]
    for _ in range(3):
        session = engine.session()
        answer = engine.generate(messages, session=session, max_tokens=32, max_denoising_steps=2, seed=0)
        kept.put(session)
        while kept.save_one():
            pass
        messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": "And the word cat."}]


JOBS = {one.__name__: one for one in (convert, fuse, tune, tune_all_weights, cache)}


def contents(folder: Path) -> dict[str, bytes]:
    """What a job leaves. README.md and log.csv tell times, curves.png draws nothing else than the log."""
    left_out = ("README.md", "log.csv", "curves.png", "owner.json", "lock")
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): b"" if file.name in left_out else file.read_bytes() for file in files}


def whole(job: str, found: dict[str, bytes], final: dict[str, bytes]) -> str:
    """What is wrong with the files after a kill; "" for nothing. Drafts are hidden."""
    seen = {name: data for name, data in found.items() if not any(part.startswith(".") for part in Path(name).parts)}
    if job in ("convert", "fuse"):
        return "" if not seen or same(seen, final) else "out is there and not whole"
    if job == "tune_all_weights":
        model = {name for name in final if name.startswith("out/model/")}
        if {name for name in seen if name.startswith("out/model/")} not in (set(), model):
            return "out/model is there and not whole"
    return "; ".join(f"{name} is cut" for name, data in seen.items() if name.endswith(".safetensors") and cut(data))


def same(found: dict[str, bytes], final: dict[str, bytes]) -> bool:
    """Whether files are equal; tensors may stand in another order."""
    return found.keys() == final.keys() and all(
        found[name] == data or (name.endswith(".safetensors") and tensors(found[name]) == tensors(data))
        for name, data in final.items()
    )


def tensors(data: bytes) -> dict:
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    told = header.pop("__metadata__", {})
    spans = {name: (start + one["data_offsets"][0], start + one["data_offsets"][1]) for name, one in header.items()}
    return {"": told, **{name: (header[name]["shape"], data[a:b]) for name, (a, b) in spans.items()}}


def cut(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        return True
    header = json.loads(data[8 : 8 + length])
    return len(data) != 8 + length + max(one["data_offsets"][1] for k, one in header.items() if k != "__metadata__")


def run(job: str, folder: Path, at: int) -> subprocess.CompletedProcess:
    command = [sys.executable, __file__, "--child", str(folder), "--at", str(at), job]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def measure(job: str, points: int, seed: int, top: Path) -> dict:
    reference = top / "reference"
    for folder in (top / "first", reference):  # the first one makes what all of them read
        folder.mkdir(parents=True)
        done = run(job, folder, -1)
    if done.returncode:
        raise SystemExit(done.stderr)
    operations, final, faults = int(done.stdout), contents(reference), []
    drawn = sorted(random.Random(seed).sample(range(1, operations + 1), min(points, operations)))
    leftovers = 0
    for at in drawn:
        folder = top / "killed"
        folder.mkdir()
        killed = run(job, folder, at)
        if killed.returncode != -signal.SIGKILL:
            faults.append(f"{at}: not killed ({killed.returncode}) {killed.stderr[-500:]}")
        found = contents(folder)
        leftovers += any(part.startswith(".") for name in found for part in Path(name).parts)
        if wrong := whole(job, found, final):
            faults.append(f"{at}: {wrong}")
        again = run(job, folder, -1)
        after = contents(folder)
        if again.returncode:
            faults.append(f"{at}: the rerun failed: {again.stderr[-500:]}")
        elif not same(after, final):
            differing = sorted(name for name in {*after, *final} if after.get(name) != final.get(name))
            faults.append(f"{at}: after the rerun these differ: {', '.join(differing)}")
        shutil.rmtree(folder)
    return {"operations": operations, "kills": len(drawn), "with_drafts": leftovers, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", default=[*JOBS])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--at", type=int, default=-1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        killer = Killer(args.child, args.at)
        JOBS[args.jobs[0]](args.child)
        print(killer.count)
        return
    results = {}
    with tempfile.TemporaryDirectory() as top:
        for job in args.jobs:
            start = time.perf_counter()
            results[job] = measure(job, args.points, args.seed, Path(top) / job)
            one = results[job]
            print(
                f"{job}: killed at {one['kills']} of {one['operations']} operations, "
                f"{one['with_drafts']} left a draft, "
                f"{len(one['faults'])} faults, {time.perf_counter() - start:.0f} s",
                *one["faults"],
                sep="\n  ",
                flush=True,
            )
    print(json.dumps(results))
    if any(one["faults"] for one in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
