"""What the server tells of its model, the names it goes by, and who may ask."""

import json

import pytest
from serving import MODEL, Script, ask, said

from mlx_dgemma.errors import OptionError
from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.settings import Settings


def app_of(**settings):
    return create_app(Script(), Settings(model=MODEL, **settings))


def get(app, path, **headers):
    status, _, answer = ask(app, "GET", path, headers)
    return status, json.loads(answer)


def test_every_name_is_listed_with_what_clients_look_for():
    app = app_of(aliases=("gpt-4o", MODEL))
    _, listed = get(app, "/v1/models")
    assert [one["id"] for one in listed["data"]] == [MODEL, "gpt-4o"]
    assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (MODEL, "gpt-4o", False)
    one = listed["data"][1]
    assert (one["max_model_len"], one["context_length"], one["max_context_length"]) == (4096,) * 3
    assert one["capabilities"] == ["completion", "insert", "tools", "vision"]
    assert (one["type"], one["display_name"], one["created_at"][-1]) == ("model", "gpt-4o", "Z")
    assert get(app, "/v1/models/gpt-4o") == (200, one)
    assert get(app, "/v1/models/default")[1]["id"] == MODEL
    _, studio = get(app, "/api/v0/models")
    assert [(one["id"], one["type"], one["max_context_length"]) for one in studio["data"]] == [
        (MODEL, "vlm", 4096), ("gpt-4o", "vlm", 4096)
    ]  # fmt: skip
    status, error = get(app, "/api/v0/models/gpt-5")
    assert status == 404 and "start the server with --alias for this name" in error["error"]


@pytest.mark.parametrize("alias", ["", " a", "a\n"])
def test_an_alias_is_a_name(alias):
    with pytest.raises(OptionError, match="The alias is"):
        Settings(aliases=(alias,))


def test_paths_without_v1_mean_those_with_it():
    app = app_of()
    assert get(app, "/models") == get(app, "/v1/models")
    body = (json.dumps({"messages": said("Hi."), "n": 0}).encode(), b"")
    for path in ("/chat/completions", "/v1/chat/completions"):
        status, _, answer = ask(app, "POST", path, (), body)
        assert (status, json.loads(answer)["error"]["param"]) == (400, "n")
    assert ask(app, "GET", "/modelsx")[0] == 404


APPS = ["app://obsidian.md", "tauri://localhost", "http://tauri.localhost", "file://", "vscode-webview://1a2b"]


@pytest.mark.parametrize("origin", APPS)
def test_desktop_apps_may_ask_where_the_user_says_so(origin):
    status, headers, answer = ask(app_of(), "GET", "/v1/models", {"origin": origin})
    assert (status, "access-control-allow-origin" in headers) == (403, False)
    assert "--desktop-apps allows it" in json.loads(answer)["error"]["message"]
    status, headers, _ = ask(app_of(desktop_apps=True), "GET", "/v1/models", {"origin": origin})
    assert (status, headers["access-control-allow-origin"], headers["vary"]) == (200, origin, "Origin")
    asked = {"origin": origin, "access-control-request-method": "POST"}
    assert ask(app_of(desktop_apps=True), "OPTIONS", "/v1/models", asked)[0] == 204


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "http://tauri.localhost.evil.example",
        "app:",
        "http://app",
        "chrome-extension://a",
    ],
)
def test_pages_may_not_ask_even_then(origin):
    assert ask(app_of(desktop_apps=True), "GET", "/v1/models", {"origin": origin})[0] == 403


def test_containers_name_this_machine():
    host = {"host": "host.docker.internal:8080"}
    assert ask(app_of(), "GET", "/v1/models", host)[0] == 403
    assert ask(app_of(desktop_apps=True), "GET", "/v1/models", host)[0] == 200
