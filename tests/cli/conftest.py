"""Fixtures of the command line's tests."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from PIL import Image, ImageDraw
from support import engine_of

from mlx_dgemma import engine
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.decoding.events import Block

COUNT = "Count from 1 to 60."


@pytest.fixture(autouse=True)
def no_model_named(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)


@pytest.fixture(autouse=True)
def sockets(monkeypatch):
    """The folder of a test's own servers: a socket's path has about 100 bytes at most."""
    with TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("MLX_DGEMMA_RUNTIME_DIR", f"{folder}/run")
        yield Path(folder) / "run"


@pytest.fixture
def red(tmp_path):
    path = tmp_path / "red.png"
    picture = Image.new("RGB", (160, 160), (250, 250, 250))
    ImageDraw.Draw(picture).rectangle((45, 45, 115, 115), fill=(220, 40, 40))
    picture.save(path)
    return path


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C as soon as a first block is finished; the whole answer to COUNT."""
    whole = engine_of(DEMO).generate(COUNT, seed=0, max_tokens=100).text
    real = engine.Engine.run

    def run(self, *arguments, **options):
        for event in real(self, *arguments, **options):
            yield event
            if isinstance(event, Block):
                raise KeyboardInterrupt

    monkeypatch.setattr(engine.Engine, "run", run)
    return whole
