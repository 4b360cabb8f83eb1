"""How long and how much memory a conversion takes, beside mlx-vlm's.

    python bench/convert.py                              # ours
    python bench/convert.py --peer-python PATH           # mlx-vlm's, too, run by that Python

Makes a checkpoint of random weights in the release's layout and sizes, cut to a few layers, in a temporary
folder; converts it with `-q` in a process of its own. Prints a table and a last line of JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_dgemma.checkpoint import DEMO
from mlx_dgemma.config import ModelConfig
from mlx_dgemma.convert.writer import ITEM, Entry, Writer, write_json
from mlx_dgemma.model import DiffusionGemma

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "processor_config.json")
BLOCK = 16 * 2**20  # elements written at a time
MAX_RSS = 2.5e9


def release_config(layers: int) -> dict:
    """The release's config.json with fewer layers: every second one is a full layer, and the tower has one."""
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    rope = {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    text = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 262144,
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "sliding_window": 1024,
        "num_global_key_value_heads": 2,
        "global_head_dim": 512,
        "layer_types": kinds,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
        "rope_parameters": rope,
        "use_bidirectional_attention": "vision",
        "dtype": "bfloat16",
    }
    vision = {
        "model_type": "gemma4_vision",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
        "standardize": True,
    }
    return {
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "dtype": "bfloat16",
        "text_config": text,
        "vision_config": vision,
    }


def make_checkpoint(folder: Path, layers: int) -> int:
    """Write random bfloat16 weights in Hugging Face's layout; returns their bytes."""
    config = release_config(layers)
    write_json(folder / "config.json", config)
    for name in CARRIED:
        shutil.copy(DEMO / name, folder)
    entries = []
    for name, array in tree_flatten(DiffusionGemma(ModelConfig.from_dict(config)).parameters()):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of 1.6 GB each, beside 1.5 GB of embedding")
    parser.add_argument("--runs", type=int, default=1, help="take the fastest of so many, in turn")
    parser.add_argument("--peer-python", help="a Python that can import mlx_vlm")
    parser.add_argument("--folder", help="where the temporary folder lies")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        source, target = Path(temporary, "source"), Path(temporary, "target")
        source.mkdir()
        nbytes = make_checkpoint(source, args.layers)
        flags = ["--hf-path", str(source), "--mlx-path", str(target), "-q"]
        commands = {"mlx-dgemma": [sys.executable, "-m", "mlx_dgemma.convert", *flags]}
        if args.peer_python:
            commands["mlx-vlm"] = [args.peer_python, "-m", "mlx_vlm", "convert", *flags]
        rows: dict[str, dict] = {}
        for _ in range(args.runs):
            for name, command in commands.items():
                row = measure(command, target)
                best = rows.setdefault(name, row)
                best["seconds"] = min(best["seconds"], row["seconds"])
                best["peak_rss"] = max(best["peak_rss"], row["peak_rss"])
    print(f"{nbytes / 1e9:.2f} GB of bfloat16, {args.layers} layers, -q, mlx {version('mlx')}")
    print(f"{'':12} {'seconds':>8} {'MB/s':>7} {'peak RSS, GB':>13} {'result, GB':>11}")
    for name, row in rows.items():
        rate, rss, size = nbytes / row["seconds"] / 1e6, row["peak_rss"] / 1e9, row["nbytes"] / 1e9
        print(f"{name:12} {row['seconds']:8.1f} {rate:7.0f} {rss:13.2f} {size:11.2f}")
    ours = rows["mlx-dgemma"]
    bars = {"memory": ours["peak_rss"] < MAX_RSS}
    if "mlx-vlm" in rows:
        bars["time"] = ours["seconds"] <= rows["mlx-vlm"]["seconds"]
    print(json.dumps({"source_bytes": nbytes, "rows": rows, "bars": bars}))


if __name__ == "__main__":
    main()
