"""Fixtures: the bundled demo, and the same weights as the Hugging Face release that it was converted from.

The release is rebuilt from the demo byte by byte. `data/hf_manifest.json` holds the checksums of every file and
tensor of the original, so that what the tests convert is the real layout and not one that suits the converter.
Fixtures import what they need: the process that deals the tests to others reads this file, too.
"""

import gc
import json
import os
import shutil
import sys
from collections import OrderedDict
from pathlib import Path

import products  # noqa: F401  (before what loads MLX)
import pytest
from safetensors_files import INDEX, read_folder, sha256, write_safetensors

from mlx_dgemma.checkpoint.find import DEMO

DATA = Path(__file__).parent / "data"
os.environ["MLX_DGEMMA_MEASURE"] = "0"  # how many passes are made must not depend on a machine's speed
sys.dont_write_bytecode = False  # or every process that a test starts would compile the package again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if hasattr(os, "SCHED_BATCH"):  # MLX's thread wakes for each operation; it need not interrupt the one that asks for it
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
os.environ["XDG_CONFIG_HOME"] = str(DATA / "nowhere")  # the user's config.toml names no model here


def pytest_collection_finish():
    """Thousands of tests stay; the collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def shared_engines_are_left_as_they_were(request):
    """Of all files, the one that changes an engine of `support.engine_of` fails."""
    yield
    from support import engine_of

    if complaint := engine_of.complaint(request.node.nodeid):
        pytest.fail(complaint)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The bundled checkpoint, in MLX's layout."""
    return DEMO


@pytest.fixture(scope="session")
def hf_checkpoint(tmp_path_factory) -> Path:
    """The release that the demo was converted from: three shards, experts as bare tensors."""
    manifest = json.loads((DATA / "hf_manifest.json").read_text())
    folder = tmp_path_factory.mktemp("release")
    ours = read_folder(DEMO)
    tensors = {}
    for name, one in manifest["tensors"].items():
        dtype, shape, data = ours.pop(name if name in ours else f"{name}.weight")
        assert (dtype, shape, sha256(data)) == (one["dtype"], one["shape"], one["sha256"]), name
        tensors[name] = (dtype, shape, data)
    assert not ours
    shards = {name: one["shard"] for name, one in manifest["tensors"].items()}
    for shard in sorted(set(shards.values())):
        write_safetensors(folder / shard, {name: tensors[name] for name in sorted(shards) if shards[name] == shard})
    index = {"metadata": manifest["metadata"], "weight_map": dict(sorted(shards.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    shutil.copyfile(DATA / "hf_config.json", folder / "config.json")
    for file in DEMO.iterdir():
        if file.name in manifest["files"] and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)
    assert {file.name: sha256(file.read_bytes()) for file in folder.iterdir()} == manifest["files"]
    return folder


@pytest.fixture
def whisper(tmp_path, monkeypatch):
    """A package in mlx-whisper's place, for this process and those it starts."""
    from hearing import STAND_IN

    from mlx_dgemma.prompt.audio import transcripts as audio

    folder = tmp_path / "packages" / "mlx_whisper"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.setattr(audio, "_transcripts", OrderedDict())


@pytest.fixture(scope="module")
def scheduler():
    """The demo for a server; its thread alone may use this engine."""
    import mlx_dgemma
    from mlx_dgemma.serving.scheduler import Scheduler

    return Scheduler(mlx_dgemma.load(DEMO, dtype="float32"), rows=4, waiting=8)


@pytest.fixture(scope="module")
def url(scheduler):
    """A server with the demo, named demo."""
    from serving import serving

    with serving(scheduler, model="demo") as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    """OpenAI's own client of that server."""
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
