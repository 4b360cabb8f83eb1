"""The socket at which a server and the commands of its user meet: names, owners, and what is left behind."""

import os
import socket
import stat
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from support import refusal

from mlx_dgemma.errors import OptionError
from mlx_dgemma.serving import rendezvous
from mlx_dgemma.serving.rendezvous import Occupied, check_owner, identity, listening, running, socket_path, stamp

WHAT = identity("org/model", None, None, None)


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    with TemporaryDirectory(dir="/tmp") as made:
        monkeypatch.setenv("MLX_DGEMMA_RUNTIME_DIR", f"{made}/run")
        yield Path(made) / "run"


def mode_of(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_nobody_else_may_use_the_socket(folder):
    before = os.umask(0)
    try:
        with listening(WHAT):
            path = socket_path(WHAT)
            assert (mode_of(folder), mode_of(path)) == (0o700, 0o600)
            assert check_owner(path) and running() == [path]
            assert sorted(one.suffix for one in folder.iterdir()) == [".lock", ".sock"]  # and no draft
    finally:
        os.umask(before)
    assert not check_owner(path) and running() == []


def test_a_socket_belongs_to_what_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    same = {identity(name, None, None, None) for name in ("a", "./a", "link", str(tmp_path / "a"))}
    assert len(same) == 1
    others = [("org/a", None, None, None), ("a", "link", None, None), ("a", None, "float16", None)]
    others += [("a", None, None, "float16"), (None, None, None, None)]
    assert len({socket_path(one) for one in (*same, *(identity(*other) for other in others))}) == 6


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(folder):
    folder.mkdir(mode=0o700)
    path = socket_path(WHAT)
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(path)
    os.chmod(path, 0o600)
    assert running() == []
    with listening(WHAT) as server:
        assert refusal(Occupied, listening(WHAT).__enter__) == (
            f"Another server with this model answers the commands of this machine, at {path}."
        )
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            assert server.accept()
    assert not os.path.exists(path)


def test_what_is_anothers_or_open_to_others_is_refused(folder, monkeypatch):
    with ExitStack() as stack:
        stack.enter_context(listening(WHAT))
        path = socket_path(WHAT)
        os.chmod(path, 0o666)
        said = f"{path} is open to other users (mode 0666), so it is not used; chmod go= closes it."
        assert refusal(OptionError, check_owner, path) == said
        os.chmod(folder, 0o755)
        said = f"{folder} is open to other users (mode 0755), so it is not used; chmod go= closes it."
        assert refusal(OptionError, check_owner, path) == said
        assert refusal(OptionError, listening(identity("b", None, None, None)).__enter__) == said
        mine = os.getuid()
        monkeypatch.setattr(rendezvous.os, "getuid", lambda: mine + 1)
        said = f"{folder} belongs to another user (id {mine}), so it is not used; remove it."
        assert refusal(OptionError, check_owner, path) == said


def test_a_link_to_a_socket_elsewhere_is_no_socket(folder, tmp_path):
    folder.mkdir(mode=0o700)
    path = socket_path(WHAT)
    os.symlink(tmp_path, path)
    with pytest.raises(OptionError, match="is not used"):
        check_owner(path)


def test_the_folder_follows_the_system(monkeypatch, tmp_path):
    monkeypatch.delenv("MLX_DGEMMA_RUNTIME_DIR")
    monkeypatch.setenv("HOME", "/Users/a")
    monkeypatch.setattr(rendezvous, "sys", SimpleNamespace(platform="darwin"))
    assert rendezvous.runtime_folder() == "/Users/a/Library/Application Support/mlx-dgemma/run"
    monkeypatch.setattr(rendezvous, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert rendezvous.runtime_folder() == f"{tmp_path}/mlx-dgemma"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    monkeypatch.setattr(rendezvous.os, "getuid", lambda: 123456)  # who has no folder in /run/user
    assert rendezvous.runtime_folder() == "/tmp/mlx-dgemma-123456"


def test_a_stamp_differs_once_a_file_changed(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"a")
    (tmp_path / "notes.txt").write_bytes(b"a")
    before = stamp(tmp_path, None)
    (tmp_path / "notes.txt").write_bytes(b"bc")
    assert stamp(tmp_path, None) == before
    os.utime(tmp_path / "model.safetensors", ns=(0, 1))
    assert stamp(tmp_path, None) != before
