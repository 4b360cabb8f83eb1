"""How long and how much memory a conversion takes, beside mlx-vlm's.

    python bench/convert.py                              # ours
    python bench/convert.py --peer-python PATH           # mlx-vlm's, too, run by that Python
    python bench/convert.py --format modelopt-nvfp4      # a source of 4 GB in another program's format
    python bench/convert.py --format gguf-q4_k

Makes a checkpoint of random weights in the release's layout and sizes, cut to a few layers, in a temporary
folder; converts it with `-q` in a process of its own, in turn with the peer's. The ceiling is the time that
the bytes read and written take at the rate of a plain copy of the source, in the same folder just before.
Prints a table and a last line of JSON.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from foreign import FORMATS, make_foreign, make_gguf
from report import finish, machine, ratio, show, spread, table
from shapes import TOWER

from mlx_dgemma.check.shapes import raw_config
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.convert.recipes import DEFAULT, RECIPES
from mlx_dgemma.convert.writer import ITEM, Entry, Writer, write_json
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json")
BLOCK = 16 * 2**20  # elements written at a time
MAX_RSS = 2.5e9


def release_config(layers: int) -> dict:
    """The release's config.json with fewer layers: every second one is a full layer, and the tower has one."""
    raw = raw_config("26b", layers)
    raw["text_config"]["layer_types"] = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    tower = {**TOWER, "num_hidden_layers": 1}
    return {"architectures": ["DiffusionGemmaForBlockDiffusion"], "dtype": "bfloat16", **raw, "vision_config": tower}


def release_model(layers: int) -> DiffusionGemma:
    """That model; nothing of it is computed, so it takes no memory."""
    return DiffusionGemma(ModelConfig.from_dict(release_config(layers)))


GGUF = "gguf-q4_k"
LAYERS = {"bfloat16": 2, "modelopt-nvfp4": 6, "compressed-fp8": 3, GGUF: 7}  # that make about 4 GB


def make_source(folder: Path, layers: int, form: str) -> tuple[Path, int]:
    """Write a source in a format; returns its path and bytes."""
    folder.mkdir()
    write_json(folder / "config.json", release_config(layers))
    if form == GGUF:
        sys.path.insert(0, str(ROOT / "tests" / "convert"))
        file = folder / "model.gguf"
        return file, make_gguf(file, release_config(layers), release_model(layers), DEMO)
    for name in CARRIED:
        shutil.copy(DEMO / name, folder)
    if form in FORMATS:
        return folder, make_foreign(folder, form, release_model(layers))
    return folder, make_checkpoint(folder, release_model(layers))


def make_checkpoint(folder: Path, model: DiffusionGemma) -> int:
    """Write random bfloat16 weights in Hugging Face's layout; returns their bytes."""
    entries = []
    for name, array in tree_flatten(model.parameters()):
        release = name.removesuffix(".weight") if ".experts." in name else name
        entries.append(Entry(release, "BF16", array.shape))
    noise = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(np.float32).view(np.uint32)
    block = (noise >> 16).astype(np.uint16)  # bfloat16 is float32's upper half
    writer = Writer(folder, [[entry] for entry in entries])
    for entry in entries:
        for start in range(0, entry.nbytes, block.nbytes):
            writer.write(entry.name, start, block[: (entry.nbytes - start) // ITEM["BF16"]])
    writer.finish()
    return sum(entry.nbytes for entry in entries)


def measure(command: list[str], folder: Path) -> dict:
    """Run a command; its wall time and its peak resident memory."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    shutil.rmtree(folder)
    return {
        "seconds": seconds,
        "peak_rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "nbytes": nbytes,
    }


def copy_rate(source: Path, folder: Path) -> float:
    """Bytes read and written in a second by a plain copy of the weights; the page cache is as warm as later."""
    folder.mkdir()
    files = [source] if source.is_file() else list(source.glob("*.safetensors"))
    started = time.perf_counter()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return 2 * sum(file.stat().st_size for file in files) / seconds


def ceiling(source: Path, folder: Path, layers: int, nbytes: int) -> dict:
    """Print and return the bytes that a conversion moves, and how long they take."""
    shapes = {name: a.shape for name, a in tree_flatten(release_model(layers).parameters())}
    written, rate = RECIPES[DEFAULT].nbytes(shapes), copy_rate(source, folder)
    floor = (nbytes + written) / rate
    print(
        f"ceiling: {nbytes / 1e9:.2f} GB read, {written / 1e9:.2f} GB written, "
        f"{floor:.2f} s at a copy's {rate / 1e9:.2f} GB/s"
    )
    return {"read": nbytes, "written": written, "copy_bytes_per_second": rate, "floor_s": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="bfloat16", choices=list(LAYERS), help="of the source")
    parser.add_argument("--layers", type=int, help="in bfloat16 1.6 GB each, beside 1.5 GB of embedding")
    parser.add_argument("--runs", type=int, default=2, help="conversions by each, in alternating order")
    parser.add_argument("--peer-python", help="a Python that can import mlx_vlm")
    parser.add_argument("--folder", help="where the temporary folder lies")
    args = parser.parse_args()
    layers = args.layers or LAYERS[args.format]
    found = machine()
    if args.peer_python:
        say = "from importlib.metadata import version; print(version('mlx-vlm'))"
        run = subprocess.run([args.peer_python, "-c", say], capture_output=True, text=True, check=True)
        found["versions"]["mlx-vlm"] = run.stdout.strip()
        print(f"mlx-vlm {run.stdout.strip()}")
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        target = Path(temporary, "target")
        source, nbytes = make_source(Path(temporary, "source"), layers, args.format)
        limit = ceiling(source, target, layers, nbytes)
        flags = ["--hf-path", str(source), "--mlx-path", str(target), "-q"]
        commands = {"mlx-dgemma": [sys.executable, "-m", "mlx_dgemma.convert", *flags]}
        if args.peer_python:
            commands["mlx-vlm"] = [args.peer_python, "-m", "mlx_vlm", "convert", *flags]
        runs: dict[str, list[dict]] = {name: [] for name in commands}
        for i in range(args.runs):
            for name in list(commands)[:: 1 if i % 2 == 0 else -1]:
                runs[name].append(measure(commands[name], target))
    rows = {
        name: {
            "seconds": spread([run["seconds"] for run in some]),
            "peak_rss": max(run["peak_rss"] for run in some),
            "nbytes": some[0]["nbytes"],
        }
        for name, some in runs.items()
    }
    print(f"{nbytes / 1e9:.2f} GB of {args.format}, {layers} layers, -q, whole processes")
    table(
        ["", "seconds: median (min-max)", "MB/s of source", "peak RSS, GB", "result, GB"],
        [
            [name, show(row["seconds"], 2), round(nbytes / row["seconds"]["median"] / 1e6),
             row["peak_rss"] / 1e9, row["nbytes"] / 1e9]
            for name, row in rows.items()
        ],
    )  # fmt: skip
    ours, ratios = rows["mlx-dgemma"], {}
    bars = {"memory": ours["peak_rss"] < MAX_RSS}
    print(f"ours takes {ours['seconds']['median'] / limit['floor_s']:.1f} times the floor")
    if peer := rows.get("mlx-vlm"):
        ratios = {
            "seconds": ratio(ours["seconds"]["median"], peer["seconds"]["median"]),
            "peak_rss": ratio(ours["peak_rss"], peer["peak_rss"]),
        }
        bars["time"] = ratios["seconds"] <= 1
        print(f"ours/mlx-vlm: seconds {ratios['seconds']}, peak RSS {ratios['peak_rss']}")
    finish("convert", **found, ceiling=limit, rows=rows, ratios=ratios, bars=bars)


if __name__ == "__main__":
    main()
