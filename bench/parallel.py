"""One model on several ranks: what a step, a token and a prefill gain, what is sent, and whether the tokens stay.

    python bench/parallel.py --prefix 128                           # a tiny shape over the ring, for a CPU
    python bench/parallel.py --shape 26b --backend nccl             # two GPUs of a host
    python bench/parallel.py --shape 26b --backend nccl --jobs bfloat16 equality --budget 600
    python bench/parallel.py --shape 26b --ranks 1                  # a group of one, on one GPU

One run starts every job with every number of ranks by itself, by `mlx.launch`, each in processes of its own, so that a
failure leaves the others' figures. Rank 0 prints each figure when it is there. Weights are random and the same for
every number of ranks; a rank holds its slices, and one parameter is whole at a time. Jobs: precisions and `equality`.

- A precision: a denoising step, a token of causal mode, a prefill, the peak of memory of each rank.
- communication: the messages of a step alone, one after the other, and the step with each message left out (its result
  is then wrong and its time right). What is sent is counted where a step is built.
- `demo`: the tokens of the bundled checkpoint's answers to forty prompts in every mode, in float32.
- `equality`: the tokens of ten prompts in float32 at a reduced depth, canvases and causal, against one rank's.

Two ranks on one CPU share its cores, so their ratio says nothing there.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

PROMPTS, PROMPT_TOKENS, EQUAL_STEPS, EQUAL_TOKENS = 10, 48, 6, 24
SHARP = 6.0  # weight of the final norm in `equality`: random logits would lie too close for any rounding
TINY = {"hidden": 128, "vocab": 1024, "canvas": 32}  # of the small shape
EQUALITY = ("equality", "demo")  # jobs that compare tokens
MODES = {
    "default": {}, "fast": {"fast": True}, "exact": {"exact": True}, "causal": {"mode": "causal", "temperature": 0.7},
    "speculative": {"mode": "speculative"},
}  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "small", "26b"], default="tiny")
    parser.add_argument("--layers", type=int, help="the shape's layers, replaced")
    parser.add_argument("--backend", choices=["ring", "nccl"], default="ring")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--jobs", nargs="+", metavar="JOB", help="dtypes, recipes, equality, demo "
                        "(default: bfloat16, on a ring float32; 4bit; equality)")  # fmt: skip
    parser.add_argument("--prefix", type=int, nargs="+", default=[1024, 8192], help="prompt tokens")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run; the first two are warm-up")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=12, help="tokens of causal mode; the first four are warm-up")
    parser.add_argument("--trace", choices=["off", "on"], nargs="+", help="time steps without layers' traces or with "
                        "them; the other figures are as the last (default: as the model is loaded)")  # fmt: skip
    parser.add_argument("--profile", action="store_true", help="count a step's kernels (CUDA, needs PyTorch)")
    parser.add_argument("--equal-layers", type=int, default=6, help="layers of the float32 model of `equality`")
    parser.add_argument("--timeout", type=int, default=420, help="seconds of one job with one number of ranks")
    parser.add_argument("--budget", type=int, default=1200, help="seconds after which no other job is started")
    parser.add_argument("--worker", nargs=2, metavar=("JOB", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.jobs = args.jobs or ["float32" if args.backend == "ring" else "bfloat16", "4bit", "equality"]
    return args


def raw_of(args: argparse.Namespace, layers: int | None) -> dict:
    """config.json of the shape."""
    from mlx_dgemma.check.shapes import raw_config

    return raw_config("small", layers, **TINY) if args.shape == "tiny" else raw_config(args.shape, layers)


# What a rank does.


def work(args: argparse.Namespace) -> None:
    """Do a job as one rank of the group that this process was started in."""
    from mlx_dgemma.distributed import group as groups

    group, job = groups.init(), args.worker[0]
    say(group, f"{group.size} ranks joined")
    found: dict = {"ranks": group.size, "job": job}
    if job in EQUALITY:
        (tokens if job == "equality" else answers)(args, group, found.setdefault("tokens", {}))
    else:
        time_job(args, group, job, found)
    save(args, group, found)


def say(group, text: str) -> None:
    if group.rank == 0:
        print(f"[{group.size} ranks, {time.strftime('%H:%M:%S')}] {text}", flush=True)


def save(args: argparse.Namespace, group, found: dict) -> None:
    """Write the figures so far, so that a run that is stopped keeps them."""
    if group.rank == 0:
        Path(args.worker[1]).write_text(json.dumps(found))


def time_job(args: argparse.Namespace, group, name: str, found: dict) -> None:
    """All figures of one precision; a failure is a row of its own."""
    import mlx.core as mx
    from report import GIB, attempt, on_cpu
    from step import nbytes

    from mlx_dgemma.check.shapes import sliced_model
    from mlx_dgemma.checkpoint.build import choose_kernels, suit_device

    recipe, began = None if name in DTYPES else name, time.perf_counter()
    dtype = ("float32" if on_cpu() else "bfloat16") if recipe else name
    raw = raw_of(args, args.layers)
    mx.reset_peak_memory()
    model = sliced_model(raw, getattr(mx, dtype), recipe, group)
    suit_device(model)
    mx.eval(model.parameters())
    weights = group.gather_values(nbytes(model))
    say(group, f"{name}: weights made in {time.perf_counter() - began:.0f} s, GiB a rank {shown(weights, GIB)}")
    began = time.perf_counter()
    choose_kernels(model)
    say(group, f"{name}: kernels {model.uses_kernels}, {time.perf_counter() - began:.0f} s")
    found.update(weights=weights, kernels=model.uses_kernels, rows=[])
    for length in args.prefix:
        row = {"prefix": length, **attempt(time_prefix, args, group, model, raw, length, name)}
        found["rows"].append(row)
        save(args, group, found)
        if "failure" in row:
            raise SystemExit(f"{name}, prefix {length}: {row['failure']}")  # other ranks wait in a message


def shown(values: list[int], unit: float) -> str:
    return ", ".join(f"{one / unit:.3f}" for one in values)


def time_prefix(args: argparse.Namespace, group, model, raw: dict, length: int, name: str) -> dict:
    """Step, token, prefill, memory and communication behind a prefix."""
    import mlx.core as mx
    import traces
    from meter import settle, summary
    from report import GIB, show
    from step import measure

    from mlx_dgemma.check.shapes import random_prompt

    prompt, began = random_prompt(raw, length), time.perf_counter()
    measure(model, prompt, 3)  # kernels, allocator
    say(group, f"{name}, prefix {length}: warm after {time.perf_counter() - began:.0f} s")
    row, by_trace = {}, {}
    for trace in args.trace or [None]:
        traces.use(model, trace)
        measure(model, prompt, 3)
        mx.reset_peak_memory()
        row = summary([measure(model, prompt, args.steps) for _ in range(args.runs)])
        peaks, how = group.gather_values(mx.get_peak_memory()), "" if trace is None else f" with traces {trace}"
        say(group, f"{name}, prefix {length}{how}: step {show(row['step_ms'], 2)} ms, "
                   f"prefill {show(row['prefill_ms'])} ms, peak GiB a rank {shown(peaks, GIB)}")  # fmt: skip
        by_trace[trace] = row["step_ms"]
        settle()
    if args.trace:
        row["by_trace"], row["passes"] = by_trace, traces.compare(model, prompt)
        say(group, f"{name}, prefix {length}: {traces.told(row['passes'])}")
    row["peak_bytes"] = peaks
    row["token_ms"] = causal(model, prompt, args.tokens)
    say(group, f"{name}, prefix {length}: a causal token {row['token_ms']['median']:.2f} ms")
    if group.size > 1:
        row["communication"] = communication(args, group, model, prompt)
        sent, layers = row["communication"], model.config.text.num_hidden_layers
        say(group, f"{name}, prefix {length}: {sent['messages']} messages a step, {sent['bytes'] / 1e6:.2f} MB in all, "
                   f"{sent['layer_bytes'] / 1e6:.3f} MB a layer of {layers}; alone {sent['alone_ms']:.2f} ms; "
                   f"the step without them {sent['without_ms']['median']:.2f} ms")  # fmt: skip
    if args.profile:
        import kernels

        seen = row["kernels"] = kernels.of_a_step(model, prompt)
        say(group, f"{name}, prefix {length}: {seen['launches']} launches a step on rank 0, {seen['busy_ms']} ms busy, "
                   f"of which messages {seen['messages_ms']}")  # fmt: skip
    return row


def causal(model, prompt, count: int) -> dict:
    """Milliseconds a token, where each pass is under way before the token before it is read."""
    import mlx.core as mx
    import numpy as np
    from report import spread

    from mlx_dgemma.decoding.prefill import prefill

    prefix = model.new_prefix(capacity=prompt.shape[1] + count + 1)
    prefill(model, prefix, np.asarray(prompt), None)
    drawn, ends = mx.zeros((1, 1), mx.int32), []
    for _ in range(count):
        before = drawn
        drawn = mx.argmax(model.logits(model.encode_ahead(drawn, [prefix])), axis=-1).astype(mx.int32)
        mx.async_eval(drawn, prefix.state)
        mx.eval(before)
        prefix.accept(1)
        ends.append(time.perf_counter())
    mx.eval(drawn)
    return spread((1e3 * np.diff(ends)[3:]).tolist(), 3)


def communication(args: argparse.Namespace, group, model, prompt) -> dict:
    """The messages of a step: how many, of how many bytes; their time alone, and the step's time without them."""
    import mlx.core as mx
    from report import spread
    from step import measure

    from mlx_dgemma.distributed.group import Group

    class Listener(Group):
        """Notes what is sent; silent: sends nothing, and takes this rank's own part for the others'."""

        def __init__(self, silent: bool = False):
            self._handle, self.rank, self.size = group._handle, group.rank, group.size
            self.silent, self.sent = silent, []

        def sum(self, x):
            self.sent.append(("sum", x.shape, x.dtype))
            return x if self.silent else group.sum(x)

        def gather(self, x, axis=0):
            self.sent.append(("gather", x.shape, x.dtype))
            return mx.concatenate([x] * self.size, axis=axis) if self.silent else group.gather(x, axis)

    listener = Listener()
    model.join(listener)
    canvas = model.config.canvas_length
    tokens_of = mx.zeros((1, canvas), mx.int32)
    prefix = model.new_prefix()
    state = mx.zeros((1, canvas, model.config.text.hidden_size), model.dtype)
    hidden = model.denoise(tokens_of, prefix, state)
    made = model.head.predict(hidden, 0.6, mx.random.key(1)[None], expected_embedding=True)
    mx.eval(made.condition(model.head, 0), made.carried)
    sent, listener.sent = listener.sent, []
    numbers = {kind: [mx.ones(shape, dtype) for k, shape, dtype in sent if k == kind] for kind in ("sum", "gather")}
    mx.eval(numbers)
    alone = []
    for _ in range(6):
        group.barrier()
        began, last = time.perf_counter(), None
        parts = {kind: iter(arrays) for kind, arrays in numbers.items()}
        for kind, _, _ in sent:
            x = next(parts[kind])
            x = x if last is None else mx.depends(x, [last])
            last = group.sum(x + 0) if kind == "sum" else group.gather(x + 0)
        mx.eval(last)
        alone.append(1e3 * (time.perf_counter() - began))
    silent = Listener(silent=True)
    model.join(silent)
    steps = measure(model, prompt, args.steps)["steps"]
    model.join(group)
    sizes = [one.nbytes for arrays in numbers.values() for one in arrays]
    hidden_bytes = state.nbytes
    return {
        "messages": len(sent),
        "bytes": sum(sizes),
        "layer_bytes": 3 * hidden_bytes,  # of attention, and of the dense branch and the experts together
        "alone_ms": round(sorted(alone[1:])[2], 3),
        "without_ms": spread([1e3 * one for one in steps], 3),
    }


def tokens(args: argparse.Namespace, group, found: dict) -> None:
    """Tokens of ten prompts in float32: what canvases hold after some steps, and greedy causal text."""
    import mlx.core as mx
    import numpy as np

    from mlx_dgemma.check.shapes import sliced_model
    from mlx_dgemma.checkpoint.build import choose_kernels, suit_device
    from mlx_dgemma.decoding.lookahead import denoise_block
    from mlx_dgemma.decoding.options import GenerationOptions
    from mlx_dgemma.decoding.prefill import prefill

    model = sliced_model(raw_of(args, args.equal_layers), mx.float32, None, group)
    model.model.decoder.norm.weight = model.model.decoder.norm.weight * SHARP
    suit_device(model)
    mx.eval(model.parameters())
    choose_kernels(model)
    options = GenerationOptions(max_denoising_steps=EQUAL_STEPS, confidence_threshold=0.0, certainty_threshold=0.0,
                                patience=0, canvas="full")  # fmt: skip
    found |= {"diffusion": [], "causal": [], "layers": args.equal_layers, "kernels": model.uses_kernels}
    vocab = min(model.config.text.vocab_size, 255_000)
    for i in range(PROMPTS):
        prompt = mx.random.randint(0, vocab, (1, PROMPT_TOKENS), key=mx.random.key(100 + i))
        prefix = model.new_prefix()
        prefill(model, prefix, np.asarray(prompt), None)
        *_, last = denoise_block(model, prefix, options, mx.random.key(i)[None])
        found["diffusion"].append(np.asarray(last.argmax)[0].tolist())
        drawn, text = prompt[:, -1:].astype(mx.int32), []
        for _ in range(EQUAL_TOKENS):
            drawn = mx.argmax(model.logits(model.encode_ahead(drawn, [prefix])), axis=-1).astype(mx.int32)
            prefix.accept(1)
            text.append(drawn.item())
        found["causal"].append(text)
    say(group, f"equality: tokens of {PROMPTS} prompts made in float32, {args.equal_layers} layers")


def answers(args: argparse.Namespace, group, found: dict) -> None:
    """Tokens of the demo's answers to forty prompts in every mode, in float32."""
    import mlx_dgemma

    os.environ["MLX_DGEMMA_MEASURE"] = "0"  # drafts must not depend on what passes cost
    engine = mlx_dgemma.load(dtype="float32", group=group)
    prompts = [f"What is {a} + {b}?" for a in range(1, 9) for b in (2, 5, 7)]
    prompts += [f"Which is larger, {a} or 23?" for a in range(3, 35, 2)]
    for mode, options in MODES.items():
        made = [engine.generate(one, seed=i, max_tokens=24, **options).tokens for i, one in enumerate(prompts)]
        found[mode] = made
        say(group, f"demo, {mode}: {len(prompts)} prompts")
        save(args, group, {"ranks": group.size, "job": "demo", "tokens": found})


# What the command does.


def main() -> None:
    args = arguments()
    if args.worker:
        sys.path.insert(0, str(Path(__file__).parent))
        work(args)
        return
    from report import finish, machine

    told, began = machine(), time.monotonic()
    results, report = {}, {}
    for job in args.jobs:
        results[job] = {}
        for ranks in args.ranks:
            if time.monotonic() - began > args.budget:
                print(f"{job} on {ranks} ranks is left out: the budget is used up.", flush=True)
                continue
            print(f"\n{job}, {ranks} ranks over {args.backend}", flush=True)
            results[job][ranks] = start(args, job, ranks)
        report[job] = equal_tokens(results[job]) if job in EQUALITY else gains(results[job], job)
    runs = [{name: value for name, value in one.items() if name != "tokens"}
            for by_ranks in results.values() for one in by_ranks.values()]  # fmt: skip
    finish("parallel", **told, shape=args.shape, transport=args.backend, runs=runs, compared=report)


def start(args: argparse.Namespace, job: str, ranks: int) -> dict:
    """Run a job on so many ranks and return what rank 0 wrote; a failure is told in it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--worker", job, str(file)]
        # In float32 the tensor cores would round to ten bits.
        env = {**os.environ, "MLX_ENABLE_TF32": "0", "PYTHONUNBUFFERED": "1"}
        if ranks > 1:
            launch = [sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"]
            port = str(free_port(ranks))
            flags = ["-n", str(ranks), "--backend", args.backend, "--starting-port", port, "--nccl-port", port]
            command = [*launch, *flags, "--", *command]
        else:
            env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        # The launcher reads its stdin, which must not end. In a session of their own all ranks can be ended together.
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True) as process:
            try:
                failure = f"exit code {code}" if (code := process.wait(args.timeout)) else None
            except subprocess.TimeoutExpired:
                failure = f"not ready after {args.timeout} s"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        found = json.loads(file.read_text()) if file.exists() else {"ranks": ranks, "job": job}
        if failure or not file.exists():
            found["failure"] = failure or "no figures"
            print(f"{job} on {ranks} ranks failed: {found['failure']}", flush=True)
        return found


def free_port(count: int) -> int:
    """The first of so many ports that nobody listens at."""
    for first in range(32400, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise SystemExit("There is no free port.")


def gains(runs: dict[int, dict], job: str) -> list[dict]:
    """Times as fast as one rank, the share of communication, and the weights of a rank; printed, too."""
    one, found = runs.get(1, {}), []
    base = {row["prefix"]: row for row in one.get("rows", ()) if "failure" not in row}
    for ranks, run in runs.items():
        for row in run.get("rows", ()) if ranks > 1 else ():
            alone = base.get(row["prefix"])
            if "failure" in row or alone is None:
                continue
            gain: dict = {"ranks": ranks, "prefix": row["prefix"]}
            for name in ("step", "token", "prefill"):
                times = alone[f"{name}_ms"]["median"] / row[f"{name}_ms"]["median"]
                gain[name] = {"times": round(times, 3), "efficiency": round(times / ranks, 3)}
            sent, step = row["communication"], row["step_ms"]["median"]
            gain["communication"] = {
                "alone": round(sent["alone_ms"] / step, 3),
                "left_out": round(1 - sent["without_ms"]["median"] / step, 3),
            }
            gain["weights_over_share"] = round(max(run["weights"]) * ranks / one["weights"][0], 4)
            found.append(gain)
            told = ", ".join(f"{name} {gain[name]['times']:.2f}" for name in ("step", "token", "prefill"))
            share = gain["communication"]
            print(
                f"{job}, prefix {row['prefix']}, {ranks} ranks, times as fast: {told}; communication takes "
                f"{share['alone']:.0%} of a step (alone), {share['left_out']:.0%} (left out); weights of a rank "
                f"{gain['weights_over_share']:.3f} times 1/{ranks}",
                flush=True,
            )
    return found


def equal_tokens(runs: dict[int, dict]) -> dict[int, dict]:
    """By number of ranks, of each mode the prompts and tokens that equal one rank's; printed, too."""
    expected, found = runs.get(1, {}).get("tokens"), {}
    for ranks, run in runs.items():
        if ranks == 1 or not expected or "tokens" not in run:
            continue
        found[ranks] = {}
        for mode in [name for name, held in expected.items() if isinstance(held, list) and name in run["tokens"]]:
            pairs = list(zip(expected[mode], run["tokens"][mode]))
            same = sum(a == b for mine, theirs in pairs for a, b in zip(mine, theirs))
            whole = sum(len(mine) for mine, _ in pairs)
            prompts = sum(a == b for a, b in pairs)
            found[ranks][mode] = {"prompts": [prompts, len(pairs)], "tokens": [same, whole]}
            print(f"{ranks} ranks, float32, {mode}: {prompts} of {len(pairs)} prompts and {same} of {whole} tokens "
                  "equal one rank's", flush=True)  # fmt: skip
    return found


if __name__ == "__main__":
    main()
