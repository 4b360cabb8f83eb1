"""Files and folders that are there as a whole or not at all, whatever ends the process that writes them.

Everything is written into a draft beside its target, hidden, and named after the host and the process that writes it.
The draft is flushed to the disk and then takes the target's name in one step: by a rename, or where a folder replaces
another by an exchange of both (renameat2 on Linux, renamex_np on macOS). A killed process leaves its draft, and whoever
writes the same target next removes it. Drafts of processes that run, and those of other hosts, are left alone.

File systems without an exchange (network shares, exFAT) need two renames. A kill between them leaves the old folder
under a hidden name only, and the next process that writes the same target puts it back first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count as numbers
from pathlib import Path

from .errors import CircumstanceError, DgemmaError, OptionError, human

_DRAFT, _ASIDE = "partial", "replaced"
_NAME = re.compile(
    rf"\.(?P<target>.*)\.(?P<kind>{_DRAFT}|{_ASIDE})-(?P<host>\w*)-(?P<pid>\d{{1,9}})-\d{{1,9}}(?:\.\w+)?", re.DOTALL
)
_NAME_BYTES = 120  # of the target's name in a draft's; file systems allow 255 bytes in all
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 2**20
_in_use: set[Path] = set()  # drafts that this process is writing
_number = numbers()


@contextmanager
def atomic_file(target: Path, mode: int = 0o666, flush: bool = True) -> Iterator[Path]:
    """Yield the path of an empty draft beside `target`. It replaces `target` on success and is removed on any error.

    Args:
        target: its folder must exist. The draft has the same suffix, because some libraries insist on theirs.
        mode: permissions of the new file before the umask.
        flush: wait until the content is on the disk, so that it also survives a power failure.

    Raises:
        DgemmaError: the file cannot be written: a full disk, a limit on sizes, missing permissions.
    """
    target = target.absolute()
    with told_errors(target):
        remove_leftovers(target)
        with _draft_of(target, target.suffix) as draft:
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
            try:
                yield draft
            except RuntimeError as error:  # MLX does not tell what a write failed of
                raise _cause(draft, error) from None
            if flush:
                _flush(draft)
            os.replace(draft, target)
            if flush:
                _flush(target.parent)


@contextmanager
def told_errors(target: Path) -> Iterator[None]:
    """Turn errors of the system while a file is written into a sentence that names it.

    Raises:
        DgemmaError: instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise DgemmaError(_file_sentence(target, error)) from None


def require_absent(target: str | os.PathLike, option: str) -> Path:
    """Check that nothing exists at `target`.

    Args:
        target: path of a folder to be made; `~` is expanded.
        option: the option that sets the target, for the error message.

    Raises:
        OptionError: the path exists (CircumstanceError), or its name is not UTF-8.
    """
    path = Path(target).expanduser()
    check_name(path)
    if os.path.lexists(path):
        raise CircumstanceError(f"{path} exists; delete it or choose another {option}.")
    return path


@contextmanager
def atomic_folder(target: Path, nbytes: int, option: str, replace: bool = False) -> Iterator[Path]:
    """Yield a draft folder beside `target`. It takes the target's name on success and is removed on any error.

    Args:
        target: the folder to make; missing parents are made, too.
        nbytes: bytes that will be written; the disk must have that much free space.
        option: the option that sets the target, for error messages.
        replace: a folder may be there already; then both are exchanged, and the old one is removed.

    Raises:
        DgemmaError: too little free space, or a place that cannot be written.
    """
    target = target.absolute()
    check_name(target)
    parent, missing_parents = target.parent, [one for one in target.parents if not one.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise DgemmaError(
                f"{parent} has {human(free)} free, but the result takes {human(nbytes)}; "
                f"free some space or choose another {option}."
            )
        with _draft_of(target) as draft:
            draft.mkdir()
            yield draft
            for folder, _, files in os.walk(draft):
                for name in files:
                    _flush(Path(folder, name))
                _flush(Path(folder))
            if replace and target.exists():
                _swap(draft, target)
            else:
                draft.rename(target)
            _flush(parent)
    except BaseException as error:
        for made in missing_parents:
            with suppress(OSError):
                made.rmdir()
        if not isinstance(error, OSError):
            raise
        raise DgemmaError(_folder_sentence(target, nbytes, option, error)) from None


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes of this host left when they wrote `target`.

    A folder that was moved aside is put back if nothing else has the target's name.
    """
    _sweep(target.absolute().parent, target.name)


def sweep_folder(folder: Path) -> None:
    """Remove all that killed processes of this host left in a folder, for whatever targets."""
    _sweep(folder.absolute(), None)


def cache_folder() -> Path:
    """Where this user's caches lie: $XDG_CACHE_HOME, ~/Library/Caches on macOS, else ~/.cache; it may not exist."""
    given, mac = os.environ.get("XDG_CACHE_HOME"), sys.platform == "darwin"
    home = Path(given) if given else Path.home() / ("Library/Caches" if mac else ".cache")
    return home / "mlx-dgemma"


def state_folder() -> Path:
    """Where what this user's programs remember lies: $XDG_STATE_HOME, ~/Library/Application Support on macOS, else
    ~/.local/state; it may not exist.
    """
    given, mac = os.environ.get("XDG_STATE_HOME"), sys.platform == "darwin"
    home = Path(given) if given else Path.home() / ("Library/Application Support" if mac else ".local/state")
    return home / "mlx-dgemma"


def check_name(path: Path) -> None:
    """Refuse a path with bytes that are not UTF-8, which MLX and the tokenizers cannot open.

    Raises:
        OptionError: naming the path with its odd bytes escaped.
    """
    text = str(path)
    escaped = text.encode("utf-8", "backslashreplace").decode()
    if escaped != text:
        raise OptionError(f"{escaped} is not a name in UTF-8; choose another one.")


def _sweep(folder: Path, target: str | None) -> None:
    try:
        names = os.listdir(folder)
    except OSError:  # whoever writes there will say why
        return
    for name in names:
        found, path = _NAME.fullmatch(name), folder / name
        if found is None or path in _in_use or (target is not None and found["target"] != _short(target)):
            continue
        pid = int(found["pid"])
        if found["host"] != _host() or (pid != os.getpid() and _runs(pid)):
            continue
        original = target or found["target"]
        if found["kind"] == _DRAFT or os.path.lexists(folder / original):
            _remove(path)
        elif target or len(os.fsencode(original)) < _NAME_BYTES:  # a longer name is cut
            with suppress(OSError):
                path.rename(folder / original)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's process
        return True
    return True


def _host() -> str:
    return re.sub(r"\W", "", socket.gethostname())[:32]


def _short(name: str) -> str:
    """A target's name as its drafts contain it."""
    return os.fsdecode(os.fsencode(name)[:_NAME_BYTES])


@contextmanager
def _draft_of(target: Path, suffix: str = "", kind: str = _DRAFT) -> Iterator[Path]:
    """Yield an unused path beside `target`. What is there at the end is removed."""
    suffix = suffix if re.fullmatch(r"\.\w{1,20}", suffix) else ""
    name = f".{_short(target.name)}.{kind}-{_host()}-{os.getpid()}-{next(_number)}{suffix}"
    draft = target.with_name(name)
    _in_use.add(draft)
    try:
        yield draft
    finally:
        _remove(draft)
        _in_use.discard(draft)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)


def _swap(draft: Path, target: Path) -> None:
    """Give the new folder the target's name; the old one is removed, or stays where `draft` was."""
    if _exchange(draft, target):
        return
    with _draft_of(target, kind=_ASIDE) as aside:
        target.rename(aside)
        try:
            draft.rename(target)
        except BaseException:
            aside.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. Returns False where system or file system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    system = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            failed = system.renamex_np(*names, ctypes.c_uint(2))  # RENAME_SWAP
        else:
            here = ctypes.c_int(-100)  # AT_FDCWD; the names are absolute anyway
            failed = system.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))  # RENAME_EXCHANGE
    except AttributeError:  # a C library without this function
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _cause(draft: Path, error: RuntimeError) -> Exception:
    """The system's error behind a write that failed, found by writing a little more to the same file."""
    try:
        with draft.open("ab", buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
            os.fsync(file.fileno())
    except OSError as cause:
        return cause
    return error


def _file_sentence(target: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return f"The disk is full, so that {target} cannot be written; free some space and try again."
    if error.errno == errno.EFBIG:
        return f"{target} becomes larger than a file may be here; raise that limit (see `ulimit -f`) and try again."
    return f"{target} cannot be written ({error.strerror or error}); mend that and try again."


def _folder_sentence(target: Path, nbytes: int, option: str, error: OSError) -> str:
    parent = target.parent
    if error.errno in _FULL:
        return (
            f"The disk under {parent} is full, and the result takes {human(nbytes)}; "
            f"free some space or choose another {option}."
        )
    if error.errno == errno.EFBIG:
        return (
            f"A file of {target} becomes larger than a file may be here; "
            f"raise that limit (see `ulimit -f`) or choose another {option}."
        )
    # Users do not know the hidden draft, so name its parent instead.
    hidden = error.filename is None or _NAME.search(os.fsdecode(error.filename)) is not None
    where = parent if hidden else error.filename
    return f"{where} cannot be used ({error.strerror or error}); fix that or choose another {option}."
