"""Fixtures of the scheduler's and the prefix cache's tests."""

import pytest
from loop import tiny_engine
from prefixes import PLENTY
from support import engine_of

from mlx_dgemma.serving.prefix_cache import PrefixCache
from mlx_dgemma.serving.scheduler import Scheduler


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random model with a window of 5, as if from a checkpoint's folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(200)))
    return tiny_engine(folder)


@pytest.fixture
def cache(tiny):
    return PrefixCache(tiny, PLENTY)


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.fixture
def tiny_scheduler(request):
    """A scheduler of a random model that keeps no prefixes; `rows` and more by parametrize."""
    scheduler = Scheduler(tiny_engine(), cache_bytes=0, **getattr(request, "param", {"rows": 2, "waiting": 3}))
    yield scheduler
    scheduler.close()
