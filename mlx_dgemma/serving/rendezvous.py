"""Where a server and the commands of its user meet on one machine: a Unix socket that belongs to what is loaded.

The socket's name follows from the model, the adapter and the dtypes, so that a command finds the server that has just
these and wakes no other. The folder (mode 0700) and the socket (0600) let in their user alone; there is no other key.

On macOS the folder is in ~/Library/Application Support: it has the same path in a terminal, in launchd and over ssh,
and nothing clears it. $TMPDIR may differ between them and is swept after some days, and caches go when the disk is
full. On Linux it is in $XDG_RUNTIME_DIR, /run/user/UID, or /tmp.

This module is imported at every start of a command, so it imports little.
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ..errors import CircumstanceError

FOLDER = "MLX_DGEMMA_RUNTIME_DIR"  # an environment variable
SUFFIX = ".sock"
VERSION_HEADER = "x-mlx-dgemma-version"
_DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "demo")


class Occupied(CircumstanceError):
    """A server with the same model has this socket."""


def runtime_folder() -> str:
    """The folder of this user's sockets, which need not exist."""
    if given := os.environ.get(FOLDER):
        return os.path.abspath(given)
    if sys.platform == "darwin":
        return os.path.expanduser("~/Library/Application Support/mlx-dgemma/run")
    user = os.getuid()
    for one in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"):
        if one and os.path.isdir(one):
            return os.path.join(one, "mlx-dgemma")
    return f"/tmp/mlx-dgemma-{user}"


def identity(
    model: str | None, adapter: str | None, dtype: str | None, compute_dtype: str | None, kv_bits: int | None = None
) -> str:
    """What a server has loaded, as text: model and adapter as absolute paths or Hub ids, the dtypes and KV bits.

    Args:
        model: a folder or a Hub id; None is the demo.
        adapter: a folder or a Hub id.
        dtype, compute_dtype, kv_bits: as `load` takes them.
    """
    names = [_resolved(model or _DEMO), _resolved(adapter) if adapter else "", dtype or "", compute_dtype or ""]
    return "\n".join([*names, *([] if kv_bits is None else [f"kv {kv_bits}"])])


def _resolved(name: str) -> str:
    path = os.path.expanduser(name)
    return os.path.realpath(path) if os.path.exists(path) else name


def socket_path(what: str) -> str:
    """The path of the socket for an `identity`."""
    return os.path.join(runtime_folder(), f"{zlib.crc32(os.fsencode(what)):08x}{SUFFIX}")


def stamp(*folders: str | os.PathLike[str] | None) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that a model is loaded from; it differs once one of them was changed."""
    found = []
    for folder in folders:
        for one in [] if folder is None else sorted(os.scandir(os.fspath(folder)), key=lambda one: one.name):
            if one.name.endswith((".safetensors", ".json", ".jinja")):
                status = one.stat()
                found.append((one.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def check_owner(path: str) -> bool:
    """Whether there is a socket; `path` and its folder are looked at without following links.

    Raises:
        CircumstanceError: the socket or its folder belongs to someone else, or others may use them.
    """
    folder = os.path.dirname(path)
    for one, is_kind in ((folder, stat.S_ISDIR), (path, stat.S_ISSOCK)):
        try:
            status = os.lstat(one)
        except FileNotFoundError:
            return False
        if status.st_uid != os.getuid():
            raise CircumstanceError(
                f"{one} belongs to another user (id {status.st_uid}), so it is not used; remove it."
            )
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise CircumstanceError(
                f"{one} is open to other users (mode {mode:04o}), so it is not used; chmod go= closes it."
            )
        if not is_kind(status.st_mode):
            kind = "folder" if is_kind is stat.S_ISDIR else "socket"
            raise CircumstanceError(f"{one} is no {kind}, so it is not used; remove it.")
    return True


def make_folder() -> str:
    """Make the folder of the sockets, for its user alone.

    Raises:
        CircumstanceError: it cannot be made, or is another user's.
    """
    folder = runtime_folder()
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
    except OSError as error:
        raise CircumstanceError(
            f"{folder} cannot be made ({error.strerror}); set ${FOLDER} to another folder."
        ) from None
    check_owner(os.path.join(folder, "any"))
    return folder


@contextmanager
def listening(what: str) -> Iterator[socket.socket]:
    """A socket that listens for commands which ask for an `identity`. It is removed at the end.

    A server holds a lock as long as it runs, so a socket whose lock is free is stale, and is replaced.

    Raises:
        CircumstanceError: the socket cannot be made; `Occupied`: another server has it.
    """
    make_folder()
    path = socket_path(what)
    with locked(path) as is_ours:
        if not is_ours:
            raise Occupied(f"Another server with this model answers the commands of this machine, at {path}.")
        check_owner(path)
        draft = f"{path[: -len(SUFFIX)]}.{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            with suppress(FileNotFoundError):
                os.unlink(draft)
            try:
                server.bind(draft)
                os.chmod(draft, 0o600)  # before anyone knows its name, in a folder that nobody else can enter
                server.listen(128)
                os.rename(draft, path)
            except OSError as error:
                raise CircumstanceError(
                    f"{path} cannot be listened on ({error}); set ${FOLDER} to another folder."
                ) from None
            try:
                yield server
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path)


@contextmanager
def locked(path: str) -> Iterator[bool]:
    """Hold the lock of a socket's server. Yields whether it was free; a lock that another process holds stays there."""
    import fcntl  # here, since a call of a running server does without

    file = os.open(f"{path[: -len(SUFFIX)]}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)


def running() -> list[str]:
    """The sockets in this user's folder whose servers run; none of them is asked."""
    folder, found = runtime_folder(), []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if name.endswith(SUFFIX) and check_owner(path):
            with locked(path) as is_free:
                if not is_free:
                    found.append(path)
    return found
