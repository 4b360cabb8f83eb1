"""Many clients at once for long: does the server give the same answers, and keep its memory and its pace?

    python bench/soak.py --requests 500 --clients 8

Every hundred holds the same requests in the same order: chats, streamed and whole, pictures, JSON schemas, tools,
holes to fill, responses; a fifth are left midway, some are malformed. Each is asked alone first, and must be answered
with the same text whoever else asks. Needs the packages `openai` and `psutil`.
"""

import argparse
import base64
import io
import json
import queue
import random
import re
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import openai
import quality
from quality import score, tasks
from report import finish, machine, table
from serving import Server

HUNDRED = 100
MEMORY, PACE = 1.02, 1.10  # what the last hundred may take of what the first took
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
    "required": ["name", "age", "city"],
}
CHAT, FILL, RESPOND = "/chat/completions", "/completions", "/responses"
MALFORMED = (  # path, body, the field that is to blame
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "colour": "red"}, "colour"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * 5000}]}, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "Hi"}], "stream": True}, "messages[0].role"),
    (FILL, {"prompt": 3}, "prompt"),
    (FILL, {"prompt": "a", "echo": True}, "echo"),
    (RESPOND, {"input": "Hi", "conversation": "conv_1"}, "conversation"),
    (RESPOND, {"input": "Hi", "tools": [{"type": "custom", "name": ""}]}, "tools[0].name"),
    (RESPOND, {"input": " ", "stream": True}, "input"),
)
PER_HUNDRED = {"chat": 40, "picture": 10, "schema": 10, "tool": 10, "fill": 8, "response": 12}  # and MALFORMED


@dataclass(frozen=True)
class Ask:
    """A request of the mix.

    Attributes:
        blamed: the field that a malformed one is refused for.
        leave: seconds after the first event at which the client leaves, or None.
        case: of tasks.py, where it can be marked.
    """

    kind: str
    path: str
    body: dict[str, Any]
    blamed: str | None = None
    leave: float | None = None
    case: dict | None = None


def mix(seed: int) -> list[Ask]:
    """A hundred requests."""
    chance = random.Random(seed)
    texts = iter(quality.cases([f for f in quality.TEXT if f not in (tasks.weather, tasks.count)], 6, seed))
    seen = iter(quality.cases(tasks.VISION[:3], 8, seed))
    tools = iter(quality.cases([tasks.weather], 10, seed))
    people = iter(quality.cases([tasks.extract], 18, seed))
    asks = [Ask("malformed", *one) for one in MALFORMED]
    makers: dict[str, Callable[[], Ask]] = {
        "chat": lambda: chat("chat", next(texts)),
        "picture": lambda: chat("picture", next(seen)),
        "schema": lambda: chat("schema", next(people), response_format=schema_form()),
        "tool": lambda: chat("tool", next(tools)),
        "fill": lambda: fill(next(people)["answer"]),
        "response": lambda: respond(next(texts)),
    }
    for kind, count in PER_HUNDRED.items():
        for i in range(count):
            ask = makers[kind]()
            asks.append(replace(ask, body={**ask.body, "seed": i, "stream": i % 2 == 0}))
    leaving = chance.sample([i for i, ask in enumerate(asks) if ask.blamed is None], HUNDRED // 5)
    for i in leaving:
        asks[i] = replace(asks[i], leave=chance.choice((0, chance.random() / 2)), body={**asks[i].body, "stream": True})
    chance.shuffle(asks)
    assert len(asks) == HUNDRED
    return asks


def chat(kind: str, case: dict, **more: Any) -> Ask:
    pictures = iter(case["images"])
    messages = [
        {**message, "content": [part_of(part, pictures) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in map(sent, case["messages"])
    ]
    body = {"messages": messages, "thinking": case["enable_thinking"], "tools": case["tools"], **more}
    return Ask(kind, CHAT, {name: value for name, value in body.items() if value}, case=case)


def sent(message: dict) -> dict:
    """A message of tasks.py as OpenAI writes it."""
    found = {name: value for name, value in message.items() if name != "name"}
    if calls := found.get("tool_calls"):
        functions = [{**one["function"], "arguments": json.dumps(one["function"]["arguments"])} for one in calls]
        found["tool_calls"] = [{**one, "function": function} for one, function in zip(calls, functions)]
    return found


def part_of(part: dict, pictures: Any) -> dict:
    if part["type"] != "image":
        return part
    file = io.BytesIO()
    next(pictures).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def schema_form() -> dict:
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}


def fill(answer: str) -> Ask:
    """The age is the hole."""
    before, rest = answer.split('"age": ')
    return Ask("fill", FILL, {"prompt": f'{before}"age": ', "suffix": rest[rest.index(",") :]})


def respond(case: dict) -> Ask:
    body = {"input": case["messages"], "thinking": case["enable_thinking"]}
    return Ask("response", RESPOND, body, case=case)


def answer(client: openai.OpenAI, ask: Ask, leave: bool) -> str | None:
    """What came: the text and the calls; of a refusal its status and field; None where the client left."""
    body, events = {"model": "default", **ask.body}, openai.Stream[dict]
    try:
        if not body.get("stream"):
            return whole(ask, client.post(ask.path, body=body, cast_to=dict))
        with client.post(ask.path, body=body, cast_to=dict, stream=True, stream_cls=events) as stream:
            pieces, last, left_at = [], {}, None
            for event in stream:
                left_at = left_at or time.perf_counter() + (ask.leave or 0)
                if leave and ask.leave is not None and time.perf_counter() >= left_at:
                    return None
                last = event.get("response", last)
                pieces.append(piece(event))
        return whole(ask, last) if ask.path == RESPOND else "".join(pieces)
    except openai.APIStatusError as error:
        return f"refused: {error.status_code} {error.param}"


def piece(event: dict) -> str:
    """New text or calls in a chunk."""
    if not event.get("choices"):
        return ""
    one = event["choices"][0]
    calls = one.get("delta", {}).get("tool_calls") or []
    return (one.get("text") or one.get("delta", {}).get("content") or "") + "".join(map(told, calls))


def whole(ask: Ask, found: dict) -> str:
    if ask.path == RESPOND:
        items = [part["text"] for item in found["output"] if item["type"] == "message" for part in item["content"]]
        return "".join(items)
    one = found["choices"][0]
    if ask.path == FILL:
        return one["text"]
    return (one["message"]["content"] or "") + "".join(map(told, one["message"].get("tool_calls") or []))


def told(call: dict) -> str:
    return f"call:{call['function']['name']}{call['function']['arguments']}"


def hundred(url: str, asks: list[Ask], clients: int, expected: list[str]) -> dict:
    """Ask a hundred by several clients; what went wrong and how long it took."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for one in enumerate(asks):
        waiting.put(one)
    wrong, seconds, left = [], {}, []

    def work() -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            while True:
                try:
                    i, ask = waiting.get_nowait()
                except queue.Empty:
                    return
                started = time.perf_counter()
                try:
                    found = answer(client, ask, leave=True)
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"
                if found is None:
                    left.append(i)
                    continue
                if ask.leave is None:
                    seconds[i] = time.perf_counter() - started
                if found != expected[i]:
                    wrong.append({"kind": ask.kind, "found": found, "expected": expected[i]})

    threads, started = [threading.Thread(target=work) for _ in range(clients)], time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"wrong": wrong, "seconds": seconds, "left": len(left), "took": time.perf_counter() - started}


def alone(url: str, asks: list[Ask]) -> list[str]:
    """Each answer when nobody else asks."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        return [answer(client, ask, leave=False) for ask in asks]


def settled(server: Server) -> dict:
    """/health, once what was left has been noticed."""
    for _ in range(100):
        health = server.get("/health")
        if not health["running"] + health["waiting"]:
            break
        time.sleep(0.1)
    return health


def faults(asks: list[Ask], expected: list[str]) -> list[str]:
    """What is wrong with answers alone: a malformed request must be refused for its field, a schema held to."""
    found = []
    for ask, text in zip(asks, expected):
        if ask.blamed and text != f"refused: 400 {ask.blamed}":
            found.append(f"{ask.blamed} should be refused: {text}")
        if ask.kind == "schema" and sorted(json.loads(text)) != ["age", "city", "name"]:
            found.append(f"not of the schema: {text}")
        if not ask.blamed and text.startswith("refused: "):
            found.append(f"{ask.kind} was refused: {text}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500, help="a multiple of 100, at least 200")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the mix")
    args = parser.parse_args()
    if args.requests % HUNDRED or args.requests < 2 * HUNDRED:
        parser.error("--requests should be a multiple of 100, at least 200")
    found, asks = machine("openai"), mix(args.seed)
    marked = [i for i, ask in enumerate(asks) if ask.case and not ask.case["tool_calls"]]
    with Server() as server:
        expected = alone(server.url, asks)
        bad = faults(asks, expected)
        right = sum(score.right(asks[i].case, expected[i]) for i in marked)
        rounds = []
        for _ in range(args.requests // HUNDRED):
            before = server.worked()
            one = hundred(server.url, asks, args.clients, expected)
            worked = server.worked() - before
            health = settled(server)
            time.sleep(1)  # connections that were left are closed
            rounds.append({**one, "worked": worked, "resident": server.resident(), **server.held()})
        alive = health["status"] == "ok" and not health["running"] + health["waiting"]
        tracebacks = server.log().count("Traceback")
        cancelled = int(re.search(r"dgemma_cancelled_total (\d+)", server.text("/metrics"))[1])
    first, last = rounds[0], rounds[-1]
    same = sorted(first["seconds"].keys() & last["seconds"].keys())
    pace = [statistics.mean(one["seconds"][i] for i in same) for one in (first, last)]
    print(f"\n{right} of {len(marked)} answers alone are right; answers in a crowd must be the same")
    print(f"{sum(one['left'] for one in rounds)} were left midway, {cancelled} of them before they were generated")
    table(
        ["hundred", "differing", "left", "seconds", "processor s", "mean s", "median s", "MiB", "files", "threads"],
        [
            [str(i + 1), len(one["wrong"]), one["left"], one["took"], one["worked"],
             statistics.mean(one["seconds"].values()), statistics.median(one["seconds"].values()),
             one["resident"] / 2**20, one["files"], one["threads"]]
            for i, one in enumerate(rounds)
        ],
    )  # fmt: skip
    checks = {
        "alone": not bad,
        "same": not any(one["wrong"] for one in rounds),
        "memory": last["resident"] <= first["resident"] * MEMORY,
        "pace": pace[1] <= pace[0] * PACE,
        "files": last["files"] <= first["files"],
        "threads": last["threads"] <= first["threads"],
        "idle": alive,
        "log": not tracebacks,
    }
    for fault in [*bad, *(one for each in rounds for one in each["wrong"])][:20]:
        print(fault)
    print(", ".join(f"{name}: {'good' if good else 'BAD'}" for name, good in checks.items()))
    figures = [
        {**one, "wrong": len(one["wrong"]), "seconds": statistics.mean(one["seconds"].values())} for one in rounds
    ]
    finish(
        "soak",
        **found,
        checks=checks,
        right=right,
        marked=len(marked),
        rounds=figures,
        cancelled=cancelled,
        health=health,
    )
    raise SystemExit(not all(checks.values()))


if __name__ == "__main__":
    main()
