"""What a call of `mlx-dgemma generate` costs beside the generation, with a running server and without.

The overhead is the time of the whole process less the time of its requests at the server, which the server's log has:
start of Python, imports, options, the socket, and printing. On a machine with other work the process waits for a
processor, too; its own processor time tells how much that was.

    python bench/calls.py                  # 100 calls, the bundled demo
    python bench/calls.py --calls 20 --model FOLDER
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

PROMPT = "Spell the word cat."
ALONE = 3  # calls that load the model themselves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--model")
    given = parser.parse_args()
    model = ["--model", given.model] if given.model else []
    with TemporaryDirectory(dir="/tmp") as folder:
        environment = {**os.environ, "MLX_DGEMMA_RUNTIME_DIR": f"{folder}/run"}
        log = Path(folder) / "serve.log"
        serve = [*command(), "serve", "--socket-only", "--log-file", str(log), *model]
        with subprocess.Popen(serve, env=environment, stderr=subprocess.PIPE, text=True) as server:
            try:
                next(line for line in server.stderr if line.startswith("Listening"))
                timed(model, environment)  # fills the caches of both
                took = [timed(model, environment, log) for _ in range(given.calls)]
            finally:
                server.terminate()
                server.wait()
        alone = [timed(model, environment)[0] for _ in range(ALONE)]
    whole, overhead, processor = zip(*took)
    bare = [run([sys.executable, "-c", "pass"], environment)[0] for _ in range(20)]
    for name, values in (
        ("with a server, whole process", whole),
        ("with a server, less its own time", overhead),
        ("with a server, processor time", processor),
        ("without a server, whole process", alone),
        ("python -c pass", bare),
    ):
        shown = [1e3 * value for value in (min(values), statistics.median(values), max(values))]
        print(f"{name:34} {len(values):4} calls   ms: least {shown[0]:.0f}, median {shown[1]:.0f}, most {shown[2]:.0f}")


def command() -> list[str]:
    """The installed script, or the module where it is not installed."""
    script = Path(sys.executable).with_name("mlx-dgemma")
    return [str(script)] if script.exists() else [sys.executable, "-m", "mlx_dgemma"]


def timed(model: list[str], environment: dict[str, str], log: Path | None = None) -> tuple[float, float, float]:
    """Seconds of one call, those without what the server's log counts, and those of its processor."""
    before = log.stat().st_size if log else 0
    options = ("--seed", "0", "--max-denoising-steps", "1")
    whole, processor = run([*command(), "generate", PROMPT, *options, *model], environment)
    if log is None:
        return whole, whole, processor
    lines = log.read_text()[before:].splitlines()
    asked = [line.split() for line in lines]
    assert [one[3:5] for one in asked] == [["GET", "/local"], ["POST", "/local/generate"]], lines
    return whole, whole - sum(float(one[-2]) for one in asked), processor


def run(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of a process, and those of its processor."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    whole, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return whole, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
