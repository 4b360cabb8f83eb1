"""Several ranks on this machine against one process: the same tokens, what faults come to, and a server for long.

    python bench/ranks.py answers --ranks 2 4        # every mode, pictures, constraints, holes, sessions, a scheduler;
                                                     # started again, it goes on where it was stopped
    python bench/ranks.py faults --kills 10          # kill -9 at random instants, stops, ports, other checkpoints
    python bench/ranks.py soak --requests 200        # the mix of soak.py on two ranks; needs `openai` and `psutil`

Ranks are started as `mlx.launch` starts them, on loopback, with MLX's ring. All is float32.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rank_faults import faults
from rank_processes import LIMIT, Ranks, children

import mlx_dgemma
from mlx_dgemma.ranks.start import load, take_part

PROMPTS = 40
SHORT = {"max_tokens": 80, "seed": 0}  # more than a canvas
MODES: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "fast": {"fast": True},
    "exact": {"exact": True, "max_denoising_steps": 12},
    "causal": {"mode": "causal", "temperature": 0.7, "max_tokens": 24},  # each token is a pass
    "speculative": {"mode": "speculative", "max_tokens": 24},
}
TURNS = ("Spell the word frog.", "Spell the word dog.", "What is 25 + 31?")
PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}


# Answers: one process makes them, once; then this program is the command of every rank, and rank 0 compares.


def requests(engine: Any, prompts: int) -> Iterator[tuple[str, Any]]:
    """Requests with the name of their kind."""
    from quality import TEXT, cases, tasks

    from mlx_dgemma.tasks.edit import edit
    from mlx_dgemma.tasks.infill import infill

    texts = cases(TEXT, -(-prompts // len(TEXT)), 0)[:prompts]
    for name, options in MODES.items():
        for case in texts:
            plain = {"tools": case["tools"], "thinking": case["enable_thinking"] and name != "speculative"}
            yield name, engine.prepare(case["messages"], **{**plain, **SHORT, **options})
    few = max(prompts // 5, 1)
    for case in cases(tasks.VISION[:3], -(-few // 3), 0)[:few]:
        yield "pictures", engine.prepare(case["messages"], images=case["images"], **SHORT)
    for case in cases([tasks.extract], few, 0):
        yield "schema", engine.prepare(case["messages"], schema=PERSON, **SHORT)
        yield "regex, causal", engine.prepare(case["messages"], regex=r"[a-z ]{5,30}\.", mode="causal", **SHORT)
        before, rest = case["answer"].split('"age": ')
        yield "holes", infill(engine.builder, f'{before}"age": ', rest[rest.index(",") :], seed=0, max_tokens=16)
    for case in texts[:few]:
        yield "edits", edit(engine.builder, str(case["answer"]) or "A cat.", "Replace a word", **SHORT)


class Store:
    """Answers by the name of their request, a line each, so that a run that was stopped goes on where it was."""

    def __init__(self, file: Path):
        self._file, self.tokens = file, {}
        for line in file.read_text().splitlines() if file.exists() else ():
            with suppress(ValueError):  # one that was cut off
                name, tokens = json.loads(line)
                self.tokens[name] = tokens
        self._lock = threading.Lock()

    def add(self, name: str, tokens: list[int]) -> None:
        """Keep an answer."""
        with self._lock, self._file.open("a") as stream:
            print("", json.dumps([name, tokens]), sep="\n", file=stream)  # behind a line that was cut off
            self.tokens[name] = tokens


def named(engine: Any, prompts: int) -> dict[str, Any]:
    """The requests by names that say their kind."""
    seen: Counter[str] = Counter()
    found = {}
    for kind, request in requests(engine, prompts):
        found[f"{kind} {seen[kind]}"] = request
        seen[kind] += 1
    return found


def talks(engine: Any, prompts: int, store: Store) -> None:
    """Conversations; one that was broken off begins anew."""
    for seed in range(max(prompts // 8, 1)):
        if f"sessions {seed}.{len(TURNS) - 1}" in store.tokens:
            continue
        session = engine.session()
        for i, turn in enumerate(TURNS):
            made = engine.generate(turn, session=session, seed=seed, max_tokens=SHORT["max_tokens"])
            store.add(f"sessions {seed}.{i}", made.tokens)


def told(what: str, found: dict[str, list[int]], wanted: dict[str, list[int]]) -> dict[str, list[int]]:
    """Print and return by kind how many answers have equal tokens, of how many."""
    counts: dict[str, list[int]] = {}
    for name, tokens in found.items():
        of_kind = counts.setdefault(name.rpartition(" ")[0], [0, 0])
        of_kind[0] += tokens == wanted.get(name)
        of_kind[1] += 1
    shown = ", ".join(f"{kind} {same} of {asked}" for kind, (same, asked) in counts.items())
    print(f"{time.strftime('%H:%M:%S')} {what}: equal tokens: {shown}", flush=True)
    return counts


def expect(folder: Path, prompts: int) -> None:
    """Answer all in this process, which has no ranks."""
    engine, store = mlx_dgemma.load(dtype="float32"), Store(folder / "alone.jsonl")
    left = {name: one for name, one in named(engine, prompts).items() if name not in store.tokens}
    for i, (name, request) in enumerate(left.items(), 1):
        store.add(name, list(engine.run(request, drafts=False))[-1].result.tokens)
        if i % 20 == 0 or i == len(left):
            print(f"{time.strftime('%H:%M:%S')} one process: {i} of {len(left)} answered", flush=True)
    talks(engine, prompts, store)


def compare(folder: Path, prompts: int, count: int) -> None:
    """As rank 0: the first of each kind, then conversations, then eight at a time as a server does.

    Eight rows share each message between ranks, so that this is the cheap way. What differs in it is asked again by
    itself.
    """
    from mlx_dgemma.decoding.events import Finished
    from mlx_dgemma.ranks.leading import LeadingCache
    from mlx_dgemma.serving.scheduler import Scheduler

    wanted = Store(folder / "alone.jsonl").tokens
    single, served = Store(folder / f"{count}-single.jsonl"), Store(folder / f"{count}-served.jsonl")
    together = load(None, dtype="float32")

    def by_itself(names: list[str]) -> None:
        for name, one in named(together, prompts).items():
            if name in names and name not in single.tokens:
                single.add(name, list(together.run(one, drafts=False))[-1].result.tokens)

    every = named(together, prompts)
    by_itself([name for name in every if name.endswith(" 0")])
    talks(together, prompts, single)
    told(f"{count} ranks, one at a time", single.tokens, wanted)
    left = {name: one for name, one in every.items() if name not in served.tokens}
    scheduler = Scheduler(together, rows=8, waiting=10**4, make_cache=LeadingCache)
    pending, changed = set(left), threading.Condition()

    def listen(name: str, event: Any) -> None:
        if isinstance(event, (Finished, Exception)):
            if isinstance(event, Finished):
                served.add(name, event.result.tokens)
            with changed:
                pending.discard(name)
                changed.notify()

    for name, request in left.items():
        scheduler.submit(lambda request=request: request, partial(listen, name))
    with changed:
        shown = len(pending)
        while pending:
            changed.wait()
            if shown - len(pending) >= 20 or not pending:
                shown = len(pending)
                told(f"{count} ranks, eight at a time, {shown} left", served.tokens, wanted)
    scheduler.close()
    by_itself([name for name, tokens in served.tokens.items() if tokens != wanted[name]])


def code_digest() -> str:
    """Of what tokens depend on: answers of other code are not taken."""
    package, digest = Path(mlx_dgemma.__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] not in ("cli", "server", "desktop", "tune", "convert"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def answers(args: argparse.Namespace) -> dict:
    folder = Path(args.store, f"{code_digest()}-{args.prompts}")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Answers are kept in {folder}; a run that is stopped goes on from there.", flush=True)
    os.environ["MLX_DGEMMA_MEASURE"] = "0"  # drafts must not depend on what passes cost
    given, found = ["--prompts", str(args.prompts), "--store", str(folder)], {}
    subprocess.run([sys.executable, __file__, "alone", *given], check=True)
    wanted = Store(folder / "alone.jsonl").tokens
    for count in args.ranks:
        started = time.perf_counter()
        with Ranks(count, [sys.executable, __file__, "part", *given, "--ranks", str(count)]) as ranks:
            for line in ranks.processes[0].stdout:
                print(line, end="", flush=True)
            codes = ranks.wait(LIMIT)
        if codes != [0] * count:
            raise SystemExit(f"{count} ranks ended with {codes}: {ranks.log()}")
        ways = {"one at a time": "single", "eight at a time": "served"}
        missing = sorted(set(wanted) - set(Store(folder / f"{count}-served.jsonl").tokens))
        missing = [name for name in missing if not name.startswith("sessions")]
        found[count] = {"unanswered": missing} | {
            way: told(f"{count} ranks, {way}", Store(folder / f"{count}-{name}.jsonl").tokens, wanted)
            for way, name in ways.items()
        }
        print(f"{count} ranks left {len(missing)} unanswered: {missing[:5]}", flush=True)
        print(f"{count} ranks took {time.perf_counter() - started:.0f} s", flush=True)
    return found


# The soak.


def soak(args: argparse.Namespace) -> dict:
    import psutil
    import soak as mixed
    from serving import Server

    asks = mixed.mix(args.seed)
    with Server() as server:
        expected = mixed.alone(server.url, asks)
    command = [sys.executable, "-m", "mlx_dgemma", "serve", "--port", "0"]
    rounds = []
    with Ranks(2, command) as ranks:
        while not (listening := re.search(r"Listening on (http://[^/]+)/v1", ranks.log())):
            if ranks.processes[0].poll() is not None:
                raise SystemExit(ranks.log())
            time.sleep(0.1)
        workers = [psutil.Process(children(one.pid)[0]) for one in ranks.processes]
        for _ in range(args.requests // mixed.HUNDRED):
            one = mixed.hundred(listening[1], asks, args.clients, expected)
            time.sleep(2)
            resident = [worker.memory_info().rss for worker in workers]
            rounds.append({"wrong": len(one["wrong"]), "left": one["left"], "took": one["took"], "resident": resident})
            shown = " and ".join(f"{size / 2**20:.1f}" for size in resident)
            print(f"a hundred in {one['took']:.0f} s: {len(one['wrong'])} differ, {one['left']} left, {shown} MiB")
            for wrong in one["wrong"][:5]:
                print(" ", wrong)
        idle = [sum(worker.cpu_times()[:2]) for worker in workers]
        time.sleep(5)
        idle = [sum(worker.cpu_times()[:2]) - before for worker, before in zip(workers, idle)]
        print("processor time in 5 s without a request: " + ", ".join(f"{one:.2f} s" for one in idle))
        ranks.processes[0].send_signal(signal.SIGINT)
        codes = ranks.wait(30)
    print(f"exit codes {codes}")
    return {"rounds": rounds, "idle": idle, "codes": codes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "faults", "soak", "alone", "part"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--store", default=Path(tempfile.gettempdir(), "ranks-answers"), help="where answers are kept")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--only", default="", help="part of the names of the faults")
    parser.add_argument("--latest", type=float, default=10.0, help="seconds after which the latest fault comes")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "part":
        code = take_part()
        if code is not None:
            sys.exit(code)
        compare(Path(args.store), args.prompts, args.ranks[0])
        return
    if args.what == "alone":
        expect(Path(args.store), args.prompts)
        return
    from report import finish, machine

    found = machine()
    result = {"answers": answers, "faults": faults, "soak": soak}[args.what](args)
    finish("ranks", what=args.what, **found, result=result)


if __name__ == "__main__":
    main()
