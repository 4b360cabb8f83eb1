"""Requests that a description of the API allows, and many that it does not: does the server stand?

    python bench/fuzz.py --seconds 600

schemathesis (pip install schemathesis) makes them from /openapi.json. A server error, an answer that is not as
described, one that takes too long, or a traceback in the server's log is a failure. Generations are kept short.
"""

import argparse
import json
import os
import random
import re
import tempfile
import time
from pathlib import Path

import schemathesis
from report import GIB, finish, machine, table
from schemathesis import GenerationMode
from schemathesis.cli import schemathesis as cli
from serving import Server

LIMITS = {"max_tokens": 64, "max_completion_tokens": 64, "max_output_tokens": 64, "max_denoising_steps": 4, "n": 2}
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
PICTURE = f"data:image/png;base64,{PIXEL}"
KEPT = 4  # fields of a valid body, besides the one it needs
OWN = {  # the limit that an endpoint knows
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method"
)


@schemathesis.hook
def before_call(context, case, kwargs) -> None:
    """Of what is to be accepted keep a few fields, since many together contradict each other; keep generations short.

    The choice of fields depends on the body alone, so that a failure can be repeated.
    """
    body, limit = case.body, OWN.get(case.operation.path)
    if not limit or not isinstance(body, dict):
        return
    if case.meta and case.meta.generation.mode == GenerationMode.POSITIVE:
        chance = random.Random(json.dumps(body, sort_keys=True, default=str))
        free = sorted(set(body) - {"messages", "prompt", "input"})
        for name in chance.sample(free, max(len(free) - chance.randint(0, KEPT), 0)):
            del body[name]
        mend(body)
    for name, most in LIMITS.items():
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)
    if not any(name in body for name in LIMITS if name.endswith("tokens")):
        body[limit] = LIMITS[limit]
    body.setdefault("max_denoising_steps", LIMITS["max_denoising_steps"])


def mend(body: dict) -> None:
    """Give a valid body what its description cannot ask for: calls before their outputs, JSON, a picture, a stream."""
    if "stream_options" in body or "drafts" in body:
        body["stream"] = True
    for kind, call_id in (("messages", "tool_call_id"), ("input", "call_id")):
        items = [body[kind]] if isinstance(body.get(kind), str) else body.get(kind, [])
        for i, item in reversed(list(enumerate(items))):
            if not isinstance(item, dict):
                continue
            for call in (item, *(call["function"] for call in item.get("tool_calls") or [])):
                if "arguments" in call:
                    call["arguments"] = "{}"
            for part in item["content"] if isinstance(item.get("content"), list) else []:
                if part.get("image_url"):
                    part["image_url"] = PICTURE if kind == "input" else {"url": PICTURE}
            if item.get("role") == "tool" or item.get("type") == "function_call_output":
                name = {"name": "f", "arguments": "{}"}
                call = {"id": item[call_id], "type": "function", "function": name}
                made = {"role": "assistant", "tool_calls": [call]}
                items.insert(
                    i, made if kind == "messages" else {"type": "function_call", call_id: item[call_id], **name}
                )


def answers(server: Server) -> dict[str, dict[str, int]]:
    """How often each endpoint answered with each status, as the server counts it."""
    found: dict[str, dict[str, int]] = {}
    for path, status, count in re.findall(
        r'requests_total{endpoint="(.*)",status="(\d+)"} (\d+)', server.text("/metrics")
    ):
        found.setdefault(path, {})[status] = int(count)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--answer-seconds", type=float, default=60, help="in which every answer is to come")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = machine("schemathesis")
    with Server() as server:
        before, started = (server.resident(), server.held()), time.perf_counter()
        failed = fuzz(server, args)
        took = time.perf_counter() - started
        time.sleep(1)
        health, log, after = server.get("/health"), server.log(), (server.resident(), server.held())
        counted = answers(server)
    print()
    statuses = sorted({status for one in counted.values() for status in one})
    table(["answers", *statuses], [[path, *(one.get(s, 0) for s in statuses)] for path, one in sorted(counted.items())])
    print()
    rows = [[what, before[1][what], after[1][what]] for what in ("files", "threads")]
    table(["", "before", "after"], [["resident, GiB", before[0] / GIB, after[0] / GIB], *rows])
    tracebacks = log.count("Traceback (most")
    if tracebacks:
        print(log[max(log.index("Traceback (most") - 300, 0) :][:6000])
    good = not failed and not tracebacks and health["status"] == "ok" and not health["running"] + health["waiting"]
    figures = {"seconds": round(took), "good": good, "failed": failed, "tracebacks": tracebacks, "health": health}
    finish("fuzz", **found, **figures, answers=counted, resident=[before[0], after[0]], held=[before[1], after[1]])
    raise SystemExit(not good)


def fuzz(server: Server, args: argparse.Namespace) -> bool:
    """Run schemathesis; whether it found anything."""
    command = [
        "run", f"{server.url}/openapi.json", "--checks", CHECKS, "--max-time", str(args.seconds),
        "--request-timeout", str(args.answer_seconds), "--workers", str(args.workers), "--seed", str(args.seed),
        "--continue-on-failure", "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all",
    ]  # fmt: skip
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # where schemathesis and hypothesis keep what they found
        try:
            return cli.main(command, standalone_mode=False) not in (0, None)
        except SystemExit as ended:
            return ended.code not in (0, None)
        finally:
            os.chdir(here)


if __name__ == "__main__":
    main()
