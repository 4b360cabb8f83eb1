"""The demo's tokenizer, and the bytes of its tokens."""

import pytest
from support import engine_of


@pytest.fixture(scope="session")
def tokenizer(demo):
    return engine_of(demo).tokenizer


@pytest.fixture(scope="session")
def token_bytes(demo):
    return engine_of(demo).builder.token_bytes
