"""The user's config.toml, which names the default model. An option or a variable that names one goes before it."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

from ..errors import DgemmaError, shown

KEYS = ("model",)
_MODEL_LINE = re.compile(r"^[ \t]*model[ \t]*=.*$", re.MULTILINE)


def config_path() -> Path:
    """$XDG_CONFIG_HOME/mlx-dgemma/config.toml, where ~/.config is the default; it may not exist."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path("~/.config").expanduser()) / "mlx-dgemma" / "config.toml"


def default_model() -> str | None:
    """The folder or Hub id that config.toml names, if it names one.

    Raises:
        DgemmaError: the file is not TOML, or holds something unknown.
    """
    path = config_path()
    try:
        return _model_of(path.read_bytes(), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DgemmaError(f"{path} cannot be read ({error.strerror}); mend that, or name a model.") from None


def set_default_model(name: str) -> Path:
    """Write the default model into config.toml; what else it holds stays. Returns the file.

    Raises:
        DgemmaError: the file is not TOML, holds something unknown, or cannot be written.
    """
    from ..files import atomic_file, told_errors

    default_model()  # a broken file is told, not overwritten
    path = config_path()
    old = path.read_text("utf-8") if path.exists() else ""
    line = f"model = {json.dumps(name, ensure_ascii=False)}"
    new = _MODEL_LINE.sub(lambda _: line, old, count=1) if _MODEL_LINE.search(old) else f"{line}\n{old}"
    with told_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as draft:
        draft.write_text(new, "utf-8")
    return path


def _model_of(data: bytes, path: Path) -> str | None:
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
