"""Completions as editors ask for them, through a server with the demo: the right fill, and key stroke to answer.

    python bench/editors.py                # every body of tests/data/editors.json
    python bench/editors.py --rounds 3     # each so many times; a new comment makes every prompt another one
    python bench/editors.py --stale 5      # requests that are left as soon as the next key is struck

Key stroke to answer is the time from sending the request to its last byte, and the server's own processor time.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from report import finish, machine, spread, table

import mlx_dgemma
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.connections import Server
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.scheduler import Scheduler

RECORDED = json.loads((Path(__file__).parent.parent / "tests" / "data" / "editors.json").read_text(encoding="utf-8"))
MARKERS = ("fim_", "fim▁", "<PRE>", "<SUF>", "<MID>", "[PREFIX]", "[SUFFIX]", "<|code_", "file_sep")


def put(value: Any, prefix: str, suffix: str) -> Any:
    """A recorded value with the texts around the hole in their places."""
    if isinstance(value, str):
        return value.replace("{{PREFIX}}", prefix).replace("{{SUFFIX}}", suffix)
    if isinstance(value, dict):
        return {name: put(one, prefix, suffix) for name, one in value.items()}
    return [put(one, prefix, suffix) for one in value] if isinstance(value, list) else value


def text_of(path: str, answer: httpx.Response) -> str:
    """The fill as the editor reads it."""
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    bodies = [json.loads(line) for line in lines] or [answer.json()]
    if path in ("/infill", "/completion"):
        return "".join(one["content"] for one in bodies)
    choices = [one["choices"][0] for one in bodies if one["choices"]]
    if path == "/v1/completions":
        return "".join(one["text"] for one in choices)
    return "".join((one.get("delta") or one["message"])["content"] for one in choices)


def ask_all(client: httpx.Client, rounds: int) -> list[list]:
    """Every body, one after the other."""
    right, marked, failures = 0, 0, []
    seconds: dict[str, list[float]] = {"wall": [], "processor": []}
    for turn in range(rounds):
        for recorded in RECORDED["bodies"]:
            case = RECORDED["cases"][recorded["case"]]
            prefix = "\n" * turn + case["prefix"]
            began, worked = time.perf_counter(), time.process_time()
            answer = client.post(recorded["path"], json=put(recorded["body"], prefix, case["suffix"]))
            seconds["wall"].append(time.perf_counter() - began)
            seconds["processor"].append(time.process_time() - worked)
            text = text_of(recorded["path"], answer) if answer.status_code == 200 else f"status {answer.status_code}"
            right += text == case["fill"]
            marked += any(one in text for one in MARKERS)
            if text != case["fill"]:
                failures.append({"client": recorded["client"], "text": text, "wanted": case["fill"], "turn": turn})
    for one in failures:
        print("FAILURE", json.dumps(one, ensure_ascii=False))
    count = rounds * len(RECORDED["bodies"])
    rows = [["bodies", count], ["right fill", right], ["markers in the text", marked]]
    return rows + [[f"{what} seconds: {spread(some)}", spread(some)["median"]] for what, some in seconds.items()]


def leave(client: httpx.Client, count: int) -> list[list]:
    """Requests that are left after a tenth of a second, as an editor does at the next key, and then one that is not."""
    case = RECORDED["cases"]["sign"]
    body = {"input_prefix": case["prefix"], "input_suffix": case["suffix"], "n_predict": 64}

    def timed() -> float:
        began = time.perf_counter()
        client.post("/infill", json=body)
        return time.perf_counter() - began

    alone = [timed() for _ in range(3)]
    for i in range(count):
        with suppress(httpx.TimeoutException):
            client.post("/infill", json={**body, "input_prefix": f"# {i}\n" + body["input_prefix"]}, timeout=0.1)
    behind = timed()
    return [["alone", spread(alone)["median"]], [f"behind {count} that were left", round(behind, 3)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stale", type=int, default=0)
    args = parser.parse_args()
    found, scheduler = machine(), Scheduler(mlx_dgemma.load(dtype="float32"))
    server = Server(create_app(scheduler, Settings(model="demo")))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=300) as client:
            client.post("/infill", json={"input_prefix": "a", "input_suffix": "b"})  # what is made once
            rows = leave(client, args.stale) if args.stale else ask_all(client, args.rounds)
        server.should_exit = True
        thread.join()
    table(["", ""], rows)
    finish("editors", **found, rows=rows)


if __name__ == "__main__":
    main()
