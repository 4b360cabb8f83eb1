"""Fixtures of the tasks: the demo, and holes with few lengths."""

import pytest
from support import engine_of


@pytest.fixture(scope="module")
def engine(demo):
    return engine_of(demo)


@pytest.fixture
def few_lengths(monkeypatch):
    """A hole without a length has 8 tokens at most, all in one pass."""
    monkeypatch.setattr("mlx_dgemma.tasks.infill.LONGEST", 8)
