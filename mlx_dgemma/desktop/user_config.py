"""The user's config.toml, which names the default model. An option or a variable that names one goes before it."""

from __future__ import annotations

import os
import sys

from ..errors import DgemmaError, shown

TYPE_CHECKING = False  # as typing's: this is read at every start of a command
if TYPE_CHECKING:
    from pathlib import Path

KEYS = ("model",)
_MODEL_LINE = r"^[ \t]*model[ \t]*=.*$"


def config_path() -> Path:
    """$XDG_CONFIG_HOME/mlx-dgemma/config.toml, where ~/.config is the default; it may not exist."""
    from pathlib import Path

    return Path(_config_file())


def default_model() -> str | None:
    """The folder or Hub id that config.toml names, if it names one.

    Raises:
        DgemmaError: the file is not TOML, or holds something unknown.
    """
    path = _config_file()
    try:
        with open(path, "rb") as file:
            return _model_of(file.read(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DgemmaError(f"{path} cannot be read ({error.strerror}); mend that, or name a model.") from None


def set_default_model(name: str) -> Path:
    """Write the default model into config.toml; what else it holds stays. Returns the file.

    Raises:
        DgemmaError: the file is not TOML, holds something unknown, or cannot be written.
    """
    import json
    import re

    from ..files import atomic_file, told_errors

    default_model()  # a broken file is told, not overwritten
    path = config_path()
    old = path.read_text("utf-8") if path.exists() else ""
    line = f"model = {json.dumps(name, ensure_ascii=False)}"
    pattern = re.compile(_MODEL_LINE, re.MULTILINE)
    new = pattern.sub(lambda _: line, old, count=1) if pattern.search(old) else f"{line}\n{old}"
    with told_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as draft:
        draft.write_text(new, "utf-8")
    return path


def _config_file() -> str:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(home, "mlx-dgemma", "config.toml")


def _model_of(data: bytes, path: str) -> str | None:
    if (plain := _plain(data)) is not None:
        return os.path.expanduser(plain)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DgemmaError(f"{path} is not TOML ({error}); mend it, or remove it.") from None
    for key in content:
        if key not in KEYS:
            raise DgemmaError(f"{path} has the key {key}; it should have {', '.join(KEYS)} alone.")
    model = content.get("model")
    if model is not None and (not isinstance(model, str) or not model.strip()):
        raise DgemmaError(f"{path} has model = {shown(model)}; it should be a folder or a Hub id, as text.")
    return os.path.expanduser(model) if model else None


def _plain(data: bytes) -> str | None:
    """The model of a file as `set_default_model` makes it, where its text needs no escapes: a parser costs more."""
    text, head, tail = data.decode("utf-8", "replace"), 'model = "', '"\n'
    name = text[len(head) : -len(tail)]
    is_plain = text.startswith(head) and text.endswith(tail) and name.isprintable() and not {*name} & {*'"\\\ufffd'}
    return name if is_plain and name.strip() else None
