"""Thirty hostile clients beside an honest one: latency, memory, threads and files of a server under attack.

The server runs as a process of its own. An honest client asks for short answers, first alone and then beside the
attack, one request after the other. Bounds: its median latency under attack is at most `--ratio` times the quiet one,
memory grows by at most 5 % between the first and the last third of the attack, no file, no process and no thread but
idle ones stay, and the server ends with exit code 130 within its time. Exit code 1 where a bound fails; the last line
is JSON. Prompts that are merely long are load, not an attack: there are none.

The hostile clients are processes of their own with the lowest priority: they stand for other machines, whose work takes
no processor from the server.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import multiprocessing
import os
import platform
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from PIL import Image

from mlx_dgemma.checkpoint.find import DEMO

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
CLIENTS, KEY = 30, "honest"
PROCESSES, NICENESS = 3, 19  # of the hostile clients
HONEST = {"messages": [{"role": "user", "content": "Spell the word frog."}], "seed": 0}
BOMBS = ("(?:){4294967294}", "a{19000}", ".{15000}", "(a?){9000}", "((a?){90}){90}", "(x+x+)+y", "[ab]*a[ab]{40}")
MB = 2**20
KEPT = {"threads": 4}  # anyio keeps idle worker threads until it is asked for one again


class Server:
    """A server process, and what the system tells about it (Linux: /proc)."""

    def __init__(self, arguments: list[str]):
        command = [sys.executable, "-m", "mlx_dgemma", "serve", "--port", "0", "--api-key", KEY, *arguments]
        # A shell starts background jobs with SIGINT ignored, and their children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if line.startswith("Listening"))
        self.port = int(re.findall(r":(\d+)/v1", line)[0])
        self.log: Counter[str] = Counter()
        self.other: list[str] = []  # lines that are not of the access log
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = re.search(r" (\d{3}) ", line)
            self.log[found[1] if found else "other"] += 1
            if not found and len(self.other) < 20:
                self.other.append(line.rstrip()[:200])

    def rss(self) -> int:
        """Resident bytes."""
        return int(self._status("VmRSS")) * 1024

    def held(self) -> dict[str, int]:
        """Its threads, open file descriptors, and the processes that it has started."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return {
            "threads": int(self._status("Threads")),
            "files": len(os.listdir(f"/proc/{self.process.pid}/fd")),
            "processes": sum(len((task / "children").read_text().split()) for task in tasks),
        }

    def _status(self, name: str) -> str:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return re.findall(rf"{name}:\s+(\d+)", text)[0]

    def stop(self, seconds: float) -> int | None:
        """Ask it to stop; its exit code, or None if it does not stop in time."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None


def post(port: int, path: str, body: bytes | dict, key: str = KEY, seconds: float = 120) -> int:
    """Status of a request; 0 where the connection fails."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def raw(port: int, data: bytes, pause: float, stop: threading.Event) -> None:
    """Send bytes, wait, leave."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(data)
        stop.wait(pause)


def head(length: int) -> bytes:
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def picture(side: int) -> str:
    file = BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def said(text: object, **more: object) -> dict:
    return {"messages": [{"role": "user", "content": text}], **more}


class Attacks:
    """What hostile clients do; each method is one attack, which ends by itself."""

    def __init__(self, port: int, stop: threading.Event):
        self.port, self.stop = port, stop
        self.picture = picture(5000)

    def all(self) -> list[Callable[[random.Random], None]]:
        """All attacks."""
        return [getattr(self, name) for name in sorted(vars(type(self))) if re.fullmatch("_[a-z]+(_[a-z]+)*", name)]

    def _half_open(self, rng: random.Random) -> None:
        raw(self.port, b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc", rng.uniform(1, 20), self.stop)

    def _half_body(self, rng: random.Random) -> None:
        raw(self.port, head(MB) + b'{"messages":', rng.uniform(1, 20), self.stop)

    def _no_http(self, rng: random.Random) -> None:
        raw(self.port, rng.randbytes(2000), 0.2, self.stop)

    def _slow_sender(self, rng: random.Random) -> None:
        body = json.dumps(HONEST).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            for byte in head(len(body)) + body:
                connection.sendall(bytes([byte]))
                if self.stop.wait(0.05):
                    return

    def _slow_reader(self, rng: random.Random) -> None:
        body = json.dumps(
            said("Count from 3 to 30.", stream=True, drafts=True, max_tokens=200, max_denoising_steps=2)
        ).encode()
        raw(self.port, head(len(body)) + body, rng.uniform(2, 10), self.stop)

    def _leaver(self, rng: random.Random) -> None:
        body = json.dumps(said("Count from 3 to 30.", max_tokens=1000, n=2)).encode()
        raw(self.port, head(len(body)) + body, rng.uniform(0, 0.5), self.stop)

    def _huge_body(self, rng: random.Random) -> None:
        post(self.port, CHAT, b'{"messages":[{"role":"user","content":"' + b"x" * (33 * MB) + b'"}]}')

    def _empty_messages(self, rng: random.Random) -> None:
        post(self.port, CHAT, b'{"messages":[' + b"{}," * rng.choice([10_000, 300_000, 1_000_000]) + b"{}]}")

    def _nested(self, rng: random.Random) -> None:
        depth = rng.choice([200, 100_000])
        post(self.port, CHAT, b'{"messages":' + b"[" * depth + b"]" * depth + b"}")

    def _pattern_bomb(self, rng: random.Random) -> None:
        bomb = rng.choice(BOMBS)
        post(self.port, CHAT, said("hi", regex=bomb if rng.random() < 0.5 else f"{bomb}|{rng.random()}"))

    def _schema_bomb(self, rng: random.Random) -> None:
        properties = {f"p{i}": {"type": "string", "maxLength": rng.randrange(1, 10**9)} for i in range(200)}
        schema = {"type": "object", "properties": properties}
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        post(self.port, CHAT, said("hi", response_format=asked))

    def _large_tool(self, rng: random.Random) -> None:
        function = {"name": "f", "description": "word " * (8 * MB // 5), "parameters": {"type": "object"}}
        post(self.port, CHAT, said("hi", tools=[{"type": "function", "function": function}]))

    def _long_hole(self, rng: random.Random) -> None:
        post(self.port, COMPLETIONS, {"prompt": "a" * 50_000 + "!", "suffix": rng.choice(["", " end"])})

    def _pictures(self, rng: random.Random) -> None:
        parts = [{"type": "image_url", "image_url": {"url": self.picture}}] * 4 + [{"type": "text", "text": "What?"}]
        post(self.port, CHAT, said(parts, max_tokens=1, max_denoising_steps=1))

    def _pictures_of_responses(self, rng: random.Random) -> None:
        parts = [{"type": "input_image", "image_url": self.picture}] * 4 + [{"type": "input_text", "text": "What?"}]
        post(self.port, RESPONSES, {"input": [{"role": "user", "content": parts}], "max_output_tokens": 1})

    def _wrong_key(self, rng: random.Random) -> None:
        post(self.port, CHAT, said("x" * MB), key="wrong")

    def _wrong_host(self, rng: random.Random) -> None:
        raw(self.port, b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n", 0.1, self.stop)

    def _many_headers(self, rng: random.Random) -> None:
        raw(self.port, b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000, 0.2, self.stop)

    def _nonsense(self, rng: random.Random) -> None:
        values = [None, 2**63, -1, 1e308, [], {}, "\ud800", "", True]
        names = ["max_tokens", "seed", "n", "stop", "temperature", "model", "tools", "stream", "regex", "messages"]
        post(self.port, CHAT, {**said("hi"), **{rng.choice(names): rng.choice(values) for _ in range(3)}})


def attack(attacks: Attacks, number: int, pause: float, done: Counter[str]) -> None:
    """One hostile client: attack after attack, each kind first by another client."""
    rng, kinds = random.Random(number), attacks.all()
    for turn in range(10**9):
        kind = kinds[number % len(kinds)] if turn == 0 else rng.choice(kinds)
        try:
            kind(rng)
        except OSError:  # refused or reset, as may be
            done["refused"] += 1
        done[kind.__name__.strip("_")] += 1
        if attacks.stop.wait(pause):
            return


def attack_together(port: int, numbers: range, pause: float, pipe: Connection) -> None:
    """Hostile clients in threads of this process until the pipe says how long to wait for the last ones;
    what they did goes into it."""
    with suppress(OSError):
        os.nice(NICENESS)
    stop, done = threading.Event(), Counter()
    attacks = Attacks(port, stop)
    clients = [threading.Thread(target=attack, args=(attacks, one, pause, done), daemon=True) for one in numbers]
    for client in clients:
        client.start()
    end = pipe.recv() + time.monotonic()
    stop.set()
    for client in clients:
        client.join(max(end - time.monotonic(), 0))
    pipe.send(done)


class Hostile:
    """Processes of hostile clients."""

    def __init__(self, port: int, clients: int, pause: float):
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for i in range(PROCESSES):
            ours, theirs = context.Pipe()
            numbers = range(i, clients, PROCESSES)
            context.Process(target=attack_together, args=(port, numbers, pause, theirs), daemon=True).start()
            self._pipes.append(ours)

    def stop(self, seconds: float) -> Counter[str]:
        """End the attacks, waiting so long for those that are under way; how many there were of each."""
        done: Counter[str] = Counter()
        for pipe in self._pipes:
            pipe.send(seconds)
        for pipe in self._pipes:
            done.update(pipe.recv())
        return done


def honest(port: int, seconds: float, server: Server) -> tuple[list[float], Counter[int]]:
    """Seconds that each request took, and statuses."""
    times: list[float] = []
    statuses: Counter[int] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.process.poll() is None:
        began = time.perf_counter()
        statuses[post(port, CHAT, HONEST)] += 1
        times.append(time.perf_counter() - began)
        time.sleep(0.05)
    return times, statuses


def watch(server: Server, memory: list[int], end: threading.Event) -> None:
    """Resident bytes, twice a second: requests come less often the more there is to do."""
    with suppress(OSError, IndexError):  # the server has died
        while not end.wait(0.5):
            memory.append(server.rss())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="of the attack")
    parser.add_argument("--quiet", type=float, default=30, help="seconds of the honest client alone")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two attacks of a client")
    parser.add_argument("--ratio", type=float, default=1.5, help="of the latencies, at most")
    parser.add_argument("--settle", type=float, default=60, help="seconds in which what the attack left must go")
    parser.add_argument("--model", default=str(DEMO))
    return parser.parse_args()


def percentiles(times: list[float]) -> dict[str, float]:
    return {"median": round(float(np.median(times)), 4), "p95": round(float(np.percentile(times, 95)), 4)}


def settled(server: Server, before: dict[str, int], seconds: float) -> dict[str, int]:
    """What the server holds once it is no more than before, or when the time is over."""
    end = time.monotonic() + seconds
    while True:
        left = server.held()
        if time.monotonic() > end or all(left[name] <= before[name] for name in left):
            return left
        time.sleep(1)


def main() -> int:
    options = parse()
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()}", flush=True)
    server = Server(["--model", options.model])
    memory: list[int] = []
    honest(server.port, 5, server)  # warm
    quiet, _ = honest(server.port, options.quiet, server)
    before = server.held()
    hostile = Hostile(server.port, options.clients, options.pause)
    attack_is_over = threading.Event()
    threading.Thread(target=watch, args=(server, memory, attack_is_over), daemon=True).start()
    attacked, statuses = honest(server.port, options.seconds, server)
    attack_is_over.set()
    alive, load = server.process.poll() is None, os.getloadavg()
    done = hostile.stop(options.settle)
    after = settled(server, before, options.settle) if alive else {}
    again, _ = honest(server.port, options.quiet, server) if alive else ([], None)
    code = server.stop(60)
    third = max(len(memory) // 3, 1)
    growth = float(np.median(memory[-third:]) / np.median(memory[:third])) - 1 if memory else float("nan")
    both = [*quiet, *again]  # before and after, since the machine may have other things to do
    ratio = float(np.median(attacked) / np.median(both))
    bounds = {
        "latency": ratio <= options.ratio,
        "answers": set(statuses) == {200},
        "memory": growth <= 0.05,
        "threads and files": alive and all(after[name] <= before[name] + KEPT.get(name, 0) for name in before),
        "exit": code == 130,
        "log": not [line for line in server.other if "Traceback" in line],
    }
    for name, value in (("attacks", dict(done)), ("log", dict(server.log)), ("other lines", server.other[:5])):
        print(f"{name}: {value}")
    print(f"quiet {percentiles(both)}, under attack {percentiles(attacked)} s, load {load}")
    result = {
        "bench": "hostile", "seconds": options.seconds, "clients": options.clients, "requests": len(attacked),
        "statuses": {str(status): count for status, count in statuses.items()}, "quiet": percentiles(both),
        "attacked": percentiles(attacked), "ratio": round(ratio, 3), "memory_growth": round(growth, 4),
        "memory_mb": [round(float(np.median(tenth)) / MB) for tenth in np.array_split(memory, 10) if len(tenth)],
        "before": before, "after": after, "exit": code, "bounds": bounds, "attacks": sum(done.values()),
    }  # fmt: skip
    print(json.dumps(result))
    return 0 if all(bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
