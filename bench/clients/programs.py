"""Agents that are programs: how each is started without a terminal, towards a server, in a home of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

QUESTION, ANSWER = "Sort these numbers: 42, 7, 19", "7, 19, 42"
MODEL, KEY = "default", "none"


class Start(NamedTuple):
    """A command line and what it needs in its environment."""

    command: list[str]
    environment: dict[str, str]


def aider(program: str, url: str, home: Path) -> Start:
    """One question in the mode that changes no file."""
    options = ["--no-git", "--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings"]
    options += ["--no-show-release-notes", "--no-pretty", "--no-fancy-input", "--no-detect-urls"]
    options += ["--model", f"openai/{MODEL}", "--chat-mode", "ask", "--map-tokens", "0", "--message", QUESTION]
    return Start([program, *options], {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": KEY})


def continue_cli(program: str, url: str, home: Path) -> Start:
    """`cn -p` with a configuration of one model."""
    model = {"name": "dgemma", "provider": "openai", "model": MODEL, "apiBase": f"{url}/v1", "apiKey": KEY}
    config = {"name": "bench", "version": "1.0.0", "schema": "v1", "models": [{**model, "roles": ["chat"]}]}
    (home / "config.yaml").write_text(json.dumps(config))
    command = [program, "-p", QUESTION, "--config", str(home / "config.yaml")]
    return Start(command, {"CONTINUE_TELEMETRY_ENABLED": "0", "CONTINUE_GLOBAL_DIR": str(home / ".continue")})


def opencode(program: str, url: str, home: Path) -> Start:
    """`opencode run` with a provider of the kind openai-compatible."""
    model = {"name": "dgemma", "limit": {"context": 4096, "output": 512}, "tool_call": True}
    options = {"baseURL": f"{url}/v1", "apiKey": KEY}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "dgemma", "options": options, "models": {MODEL: model}}
    config = {"provider": {"dgemma": provider}, "autoupdate": False, "share": "disabled"}
    (home / "opencode.json").write_text(json.dumps(config))
    off = {f"OPENCODE_DISABLE_{name}": "1" for name in ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "SHARE")}
    command = [program, "run", "--model", f"dgemma/{MODEL}", *QUESTION.split()]  # it quotes what holds spaces
    return Start(command, {**off, "OPENCODE_CONFIG": str(home / "opencode.json")})


def codex(program: str, url: str, home: Path) -> Start:
    """`codex exec` with a provider of /v1/responses."""
    (home / "codex").mkdir()
    (home / "codex" / "config.toml").write_text(
        f'model = "{MODEL}"\nmodel_provider = "dgemma"\n[analytics]\nenabled = false\n'
        f'[model_providers.dgemma]\nname = "dgemma"\nbase_url = "{url}/v1"\nwire_api = "responses"\n'
        "request_max_retries = 0\nstream_max_retries = 0\n"
    )
    command = [program, "exec", "--skip-git-repo-check", "--sandbox", "read-only", QUESTION]
    return Start(command, {"CODEX_HOME": str(home / "codex")})


def claude(program: str, url: str, home: Path) -> Start:
    """`claude -p` with every model name pointing to the server's."""
    names = ("ANTHROPIC_MODEL", "ANTHROPIC_DEFAULT_HAIKU_MODEL", "ANTHROPIC_DEFAULT_SONNET_MODEL")
    environment = dict.fromkeys((*names, "ANTHROPIC_DEFAULT_OPUS_MODEL"), MODEL)
    environment |= {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": KEY, "CLAUDE_CONFIG_DIR": str(home / "claude")}
    environment |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "CLAUDE_CODE_MAX_RETRIES": "0"}
    return Start([program, "-p", QUESTION, "--output-format", "text"], environment)


STARTS: dict[str, Callable[[str, str, Path], Start]] = {
    "aider": aider,
    "cn": continue_cli,
    "opencode": opencode,
    "codex": codex,
    "claude": claude,
}
