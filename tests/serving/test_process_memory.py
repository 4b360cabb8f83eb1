"""Memory that requests leave behind."""

import gc
import json
import platform
import sys
import weakref

import pytest
from commands import python
from listeners import until
from serving import CHAT, ask, said, tool

from mlx_dgemma.server.app import create_app
from mlx_dgemma.server.schemas import bodies
from mlx_dgemma.server.settings import Settings
from mlx_dgemma.serving.process_memory import Trimmer

KEPT = """
import ctypes, gc
from pathlib import Path
from mlx_dgemma.serving.process_memory import bound_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

bound_memory()
assert gc.get_freeze_count() > 0
del [bytes(2**23)][0]  # the largest block so far
before, kept, large = resident(), [], []
for _ in range(64):
    large.append(b"a" * 2**20)
    kept.append(bytearray(2000))
del large
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the resident memory")
def test_large_blocks_go_back_to_the_system():
    done = python("-c", KEPT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 2**20


MANY = """
import threading
from pathlib import Path
from mlx_dgemma.serving.process_memory import bound_memory

def heaps():
    starts = [int(line.partition("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines()]
    return sum(start % 2**26 == 0 for start in starts)

def prepare():
    together.wait()
    kept.append([bytearray(2000) for _ in range(100)])
    together.wait()

bound_memory()
kept, together, before = [], threading.Barrier(12), heaps()
threads = [threading.Thread(target=prepare) for _ in range(12)]
for one in threads:
    one.start()
for one in threads:
    one.join()
print(heaps() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives threads heaps of their own")
def test_threads_share_a_few_heaps():
    done = python("-c", MANY)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 2


HOLES = """
import ctypes, threading
from pathlib import Path
from mlx_dgemma.serving.process_memory import Trimmer

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def leave_holes():
    blocks = [bytearray(40_000) for _ in range(1000)]
    kept.append(blocks[::100])

kept, before = [], resident()
thread = threading.Thread(target=leave_holes)
thread.start()
thread.join()
left = resident() - before
trimmer = Trimmer(seconds=0)
print(trimmer.trim(), left > 20 * 2**20, resident() - before < left / 4)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc for its free memory")
def test_holes_between_blocks_go_back_to_the_system():
    """A thread that has prepared a request leaves them."""
    done = python("-c", HOLES)
    assert (done.stdout, done.returncode) == ("True True True\n", 0), done.stderr
    assert not Trimmer(seconds=1000).trim()


@pytest.mark.parametrize("body", [
    {"messages": said("word " * 20_000)},
    {"messages": said("Hi."), "tools": [{**tool("f"), "function": {"name": "f", "description": "word " * 20_000}}]},
], ids=["message", "tool"])  # fmt: skip
def test_a_request_that_is_refused_leaves_nothing_for_the_garbage_collector(scheduler, monkeypatch, body):
    made = []

    class Watched(bodies.Chat):
        def model_post_init(self, context):
            made.append(weakref.ref(self))

    monkeypatch.setattr("mlx_dgemma.server.endpoints.chat.ChatExchange.BODY", Watched)
    app = create_app(scheduler, Settings())
    gc.collect()
    gc.disable()
    try:
        status, _, told = ask(app, "POST", CHAT, {}, (json.dumps(body).encode(), b""))
        assert status == 400 and b"context leaves room" in told
        assert made
        until(lambda: not any(one() for one in made))  # the thread that prepared it ends
    finally:
        gc.enable()
