"""Finding a checkpoint by path or Hub id: snapshots on this machine first; every failure is one sentence."""

from functools import partial

import pytest
from mlx.utils import tree_flatten
from support import refusal, small_model, write_checkpoint

from mlx_dgemma.checkpoint.find import DEMO, find
from mlx_dgemma.errors import CheckpointError

message = partial(refusal, CheckpointError)


@pytest.fixture
def tensors():
    return dict(tree_flatten(small_model().parameters()))


def test_a_folder_is_found(tmp_path, monkeypatch):
    assert find(tmp_path) == tmp_path
    assert find(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find(f"~/{tmp_path.name}") == tmp_path


def test_without_a_name_the_environment_and_then_the_demo_is_taken(tmp_path, monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)
    assert find() == DEMO
    monkeypatch.setenv("MLX_DGEMMA_MODEL", str(tmp_path))
    assert find() == tmp_path
    assert find(DEMO) == DEMO


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere-at-all", "nowhere", "a/b/c"])
def test_a_path_that_does_not_exist(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert message(find, name) == (
        f"{name} does not exist; give a folder or a Hub id such as google/diffusiongemma-26B-A4B-it."
    )


class Hub:
    """Replaces huggingface_hub: `local` is the cached snapshot, `remote` the result of a request."""

    def __init__(self, monkeypatch, local=None, remote=None):
        self.local, self.remote, self.asked = local, remote, []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self)

    def __call__(self, repo, allow_patterns, local_files_only=False):
        self.asked.append((repo, local_files_only))
        assert {"*.json", "*.safetensors", "*.jinja"} <= set(allow_patterns)
        answer = self.local if local_files_only else self.remote
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


def absent():
    from huggingface_hub.errors import LocalEntryNotFoundError

    return LocalEntryNotFoundError("not here")


def refused(kind):
    """An error of the Hub, made without its constructor."""
    return kind.__new__(kind)


def test_a_hub_id_is_looked_for_on_this_machine_first(tmp_path, tensors, monkeypatch):
    path = write_checkpoint(tmp_path / "a", tensors)
    hub = Hub(monkeypatch, local=path)
    assert find("some/model") == path
    assert hub.asked == [("some/model", True)]


@pytest.mark.parametrize("state", ["absent", "no config", "no weights", "a shard is missing"])
def test_what_is_absent_or_incomplete_is_downloaded(tmp_path, tensors, monkeypatch, state):
    path = write_checkpoint(tmp_path / "a", tensors, shards=2)
    if state == "no config":
        (path / "config.json").unlink()
    elif state == "no weights":
        for file in path.glob("*.safetensors"):
            file.unlink()
    elif state == "a shard is missing":
        (path / "model-00002-of-00002.safetensors").unlink()
    hub = Hub(monkeypatch, local=absent() if state == "absent" else path, remote=tmp_path)
    assert find("some/model") == tmp_path
    assert hub.asked == [("some/model", True), ("some/model", False)]


def test_a_hub_id_that_does_not_exist(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    Hub(monkeypatch, local=absent(), remote=refused(RepositoryNotFoundError))
    assert message(find, "no/body") == (
        "no/body is neither a folder here nor a repository on the Hub; check the name, or log in if it is private."
    )


def test_a_gated_repository(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    Hub(monkeypatch, local=absent(), remote=refused(GatedRepoError))
    assert message(find, "some/model") == ("some/model is gated; accept its terms on the Hub and run `hf auth login`.")


def test_no_network(monkeypatch):
    Hub(monkeypatch, local=absent(), remote=absent())
    assert message(find, "some/model") == (
        "some/model is not on this machine and the Hub cannot be reached (LocalEntryNotFoundError); "
        "connect and try again, or give a folder."
    )
    Hub(monkeypatch, local=absent(), remote=ConnectionError("down"))
    assert "(ConnectionError)" in message(find, "some/model")


def test_a_name_that_is_no_hub_id():
    assert message(find, "what is/this?") == "'what is/this?' is neither a folder here nor a valid Hub id."
