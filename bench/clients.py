"""Real clients from PyPI and npm against `mlx-dgemma serve` with the bundled demo: which work, and what the others got.

    python bench/clients.py --packages DIR                      # its own server; installs what DIR does not hold yet
    python bench/clients.py --packages DIR --url http://127.0.0.1:8080 --only codex claude

The scripts and programs are in bench/clients/. A client works if every check of its script passes, or, an agent, if the
program ends with 0 and has printed the right answer. Between client and server stands a proxy that notes what was
refused. It changes nothing, except where the table says "shortened": there texts are cut to the demo's context, or
"schemas": there two words are left out of tools (bench/clients/forward.py). The last line is JSON. Exit code 1 where
fewer than --least clients work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent / "clients"
sys.path.insert(0, str(HERE))

from forward import Forward  # noqa: E402
from programs import ANSWER, STARTS  # noqa: E402

SECONDS, INSTALL_SECONDS = 150, 1200
ASIDE = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1"}  # nobody else is asked


class Client(NamedTuple):
    """A package, the environment that holds it, and what is run of it: a script, or a program's name."""

    name: str
    package: str
    place: str  # clients of one place share a virtual environment, or "node" and "programs" a folder
    runs: str
    extras: str = ""
    change: str = ""  # what the proxy changes of its requests


CLIENTS = (
    Client("openai (Python)", "openai", "shared", "openai_py.py", change="schemas"),
    Client("openai (node)", "openai", "node", "openai_node.mjs"),
    Client("anthropic (Python)", "anthropic", "shared", "anthropic_py.py"),
    Client("anthropic (node)", "@anthropic-ai/sdk", "node", "anthropic_node.mjs"),
    Client("ollama (Python)", "ollama", "shared", "ollama_py.py"),
    Client("ollama (node)", "ollama", "node", "ollama_js.mjs"),
    Client("llm", "llm", "shared", "llm_py.py"),
    Client("litellm", "litellm", "litellm", "litellm_py.py"),
    Client("instructor", "instructor", "litellm", "instructor_py.py"),
    Client("pydantic-ai", "pydantic-ai-slim", "shared", "pydantic_ai_py.py", "openai", "schemas"),
    Client("openai-agents", "openai-agents", "shared", "openai_agents_py.py", change="schemas"),
    Client("langchain", "langchain", "shared", "langchain_py.py"),
    Client("smolagents", "smolagents", "shared", "smolagents_py.py", "openai", change="shortened"),
    Client("guidance", "guidance", "shared", "guidance_py.py"),
    Client("dspy", "dspy", "litellm", "dspy_py.py"),
    Client("outlines", "outlines", "shared", "outlines_py.py", "openai"),
    Client("aider", "aider-chat", "aider", "aider", change="shortened"),
    Client("Continue CLI", "@continuedev/cli", "programs", "cn", change="shortened"),
    Client("opencode", "opencode-ai", "programs", "opencode", change="shortened"),
    Client("Codex", "@openai/codex", "programs", "codex", change="shortened"),
    Client("Claude Code", "@anthropic-ai/claude-code", "programs", "claude", change="shortened"),
)
BESIDE = {  # what the scripts of a place import too, and bounds without which pip tries a hundred versions
    "shared": ["langchain-openai", "pillow"],
    "litellm": ["litellm>=1.110", "instructor>=1.17"],
}
NODE_PLACES = ("node", "programs")


class Verdict(NamedTuple):
    """What became of a client. `said` is the sentence that it got, or empty where all is well."""

    client: Client
    version: str
    checks: dict[str, str]  # name -> "" or a sentence
    said: str
    refused: list[str]
    seconds: float

    @property
    def works(self) -> bool:
        """Whether every check passed."""
        return not self.said and bool(self.checks) and not any(self.checks.values())

    def sentence(self) -> str:
        """The table's cell."""
        failed = {name: told for name, told in self.checks.items() if told}
        if self.works:
            return f"works ({len(self.checks)} of {len(self.checks)})" if len(self.checks) > 1 else "works"
        if not failed:
            return self.said
        return f"{len(self.checks) - len(failed)} of {len(self.checks)}; " + "; ".join(
            f"{name}: {told}" for name, told in failed.items()
        )


# Installing


def python_of(folder: Path) -> str:
    """The interpreter of a virtual environment."""
    return str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")


def version_of(client: Client, packages: Path) -> str | None:
    """The installed version, or None."""
    folder = packages / client.place
    if client.place in NODE_PLACES:
        file = folder / "node_modules" / client.package / "package.json"
        return json.loads(file.read_text())["version"] if file.exists() else None
    if not Path(python_of(folder)).exists():
        return None
    code = f"from importlib.metadata import version; print(version({client.package!r}))"
    told = subprocess.run([python_of(folder), "-c", code], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def install(place: str, clients: list[Client], packages: Path, base_python: str) -> str:
    """Install what a place lacks; "" or what the installer said last."""
    folder = packages / place
    if place in NODE_PLACES:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "package.json").exists():
            (folder / "package.json").write_text('{"private": true}')
        # The programs' own scripts put their binaries into place.
        command = ["npm", "install", "--no-audit", "--no-fund", *(one.package for one in clients)]
    else:
        if not Path(python_of(folder)).exists():
            subprocess.run([base_python, "-m", "venv", str(folder)], check=True)
        wanted = [f"{one.package}[{one.extras}]" if one.extras else one.package for one in clients]
        command = [python_of(folder), "-m", "pip", "install", "--quiet", *wanted, *BESIDE.get(place, [])]
    try:
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{type(error).__name__}: {error}"
    return "" if told.returncode == 0 else (told.stderr or told.stdout).strip().splitlines()[-1][:300]


def install_missing(clients: list[Client], packages: Path, base_python: str) -> dict[str, str]:
    """What could not be installed: {place: sentence}."""
    failures = {}
    for place in dict.fromkeys(one.place for one in clients):
        of_place = [one for one in CLIENTS if one.place == place]
        if any(version_of(one, packages) is None for one in of_place):
            print(f"installing {', '.join(one.package for one in of_place)}", file=sys.stderr, flush=True)
            if said := install(place, of_place, packages, base_python):
                failures[place] = said
    return failures


# Running


class Server:
    """`mlx-dgemma serve` with the demo on a free port, until `close`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "mlx_dgemma", "serve", "--port", "0"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        told = []
        for line in self.process.stderr:
            told.append(line)
            if line.startswith("Listening"):
                break
        else:
            raise SystemExit("".join(told))
        self.url = re.findall(r"(http://\S+)/v1", told[-1])[0]
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        for _ in self.process.stderr:
            pass

    def close(self) -> None:
        """Stop it."""
        self.process.terminate()
        self.process.wait(30)


def execute(command: list[str], environment: dict[str, str], home: Path) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a command in a home of its own; it is ended after SECONDS."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    process = subprocess.Popen(
        command, cwd=home, env={**kept, **ASIDE, "HOME": str(home), **environment}, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return 124, out, f"{err}\nno end after {SECONDS} seconds"
    return process.returncode, out, err


def ask_script(client: Client, packages: Path, url: str, home: Path) -> tuple[dict[str, str], str]:
    """(checks, sentence) of a script."""
    folder, script = packages / client.place, HERE / client.runs
    if client.place in NODE_PLACES:  # node looks for packages beside the script
        for name in (client.runs, "checks.mjs"):
            shutil.copy(HERE / name, folder / name)
        command = ["node", str(folder / client.runs), url]
    else:
        command = [python_of(folder), str(script), url]
    status, out, err = execute(command, {}, home)
    try:
        return json.loads(out.strip().splitlines()[-1]), ""
    except (ValueError, IndexError):
        return {}, f"exit status {status}: {' '.join((err or out).split())[-300:]}"


def ask_program(client: Client, packages: Path, url: str, home: Path) -> tuple[dict[str, str], str]:
    """(checks, sentence) of an agent that is asked one question."""
    folder = packages / client.place
    inside = Path("node_modules") / ".bin" if client.place in NODE_PLACES else Path("bin")
    start = STARTS[client.runs](str(folder / inside / client.runs), url, home)
    status, out, err = execute(start.command, start.environment, home)
    told = " ".join(f"{out} {err}".split())
    if status == 0 and ANSWER in out:
        return {"question": ""}, ""
    return {"question": f"exit status {status}: {told[-300:]}"}, ""


def judge(client: Client, packages: Path, url: str, log: Path | None) -> Verdict:
    """Run a client."""
    version, began = version_of(client, packages), time.perf_counter()
    if version is None:
        return Verdict(client, "-", {}, "not installed", [], 0.0)
    forward = Forward(url, client.change, log and log / f"{client.runs}.jsonl")
    with tempfile.TemporaryDirectory(prefix="client-") as home:
        ask = ask_program if client.runs in STARTS else ask_script
        checks, said = ask(client, packages, forward.url, Path(home))
    forward.close()
    refused = [*dict.fromkeys(str(one) for one in forward.refused)]
    return Verdict(client, version, checks, said, refused, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, required=True, help="folder for virtual environments and node packages"
    )
    parser.add_argument("--url", help="a server that runs already, without /v1")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="clients whose name or package holds one of these")
    parser.add_argument("--least", type=int, default=18, help="clients that must work")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the virtual environments")
    parser.add_argument("--log", type=Path, help="folder for the requests and answers, one file a client")
    args = parser.parse_args()
    packages = args.packages.resolve()
    if args.log:
        args.log.mkdir(parents=True, exist_ok=True)
    chosen = [
        one for one in CLIENTS if not args.only or any(w in f"{one.name} {one.package}".lower() for w in args.only)
    ]
    failures = install_missing(chosen, packages, args.python)
    server = None if args.url else Server()
    began, verdicts = time.perf_counter(), []
    try:
        for client in chosen:
            verdict = judge(client, packages, args.url or server.url, args.log)
            if verdict.said == "not installed":
                verdict = verdict._replace(said=f"cannot be installed: {failures.get(client.place, 'no reason told')}")
            verdicts.append(verdict)
            print(
                f"{client.name:20}{verdict.version:10}{client.change:11}{verdict.seconds:5.0f} s  {verdict.sentence()}",
                flush=True,
            )
            for refusal in verdict.refused:
                print(f"{'':48}got {refusal}", flush=True)
    finally:
        if server:
            server.close()
    working = sum(one.works for one in verdicts)
    print(f"{working} of {len(verdicts)} clients work, {time.perf_counter() - began:.0f} s")
    rows = [
        {"client": one.client.name, "version": one.version, "works": one.works, "change": one.client.change,
         "checks": one.checks, "said": one.said, "refused": one.refused, "seconds": round(one.seconds, 1)}
        for one in verdicts
    ]  # fmt: skip
    print(json.dumps({"bench": "clients", "platform": platform.platform(), "working": working, "clients": rows}))
    sys.exit(working < args.least)


if __name__ == "__main__":
    main()
