"""The paper model of several Macs."""

import pytest

from mlx_dgemma.check import cluster
from mlx_dgemma.check.paper import paper_step
from mlx_dgemma.check.shapes import raw_config
from mlx_dgemma.model.config import ModelConfig

RELEASE = ModelConfig.from_dict(raw_config("26b"))
JACCL, ETHERNET = cluster.LINKS.values()


def test_messages_take_what_was_measured_and_what_the_algorithms_send():
    assert cluster.message_ms(JACCL, 2**20, 2) == pytest.approx(0.15, abs=0.001)
    assert cluster.message_ms(JACCL, 2**24, 2) == pytest.approx(1.85, abs=0.001)
    assert [cluster.sent_bytes(JACCL, 12, ranks) for ranks in (2, 4)] == [12, 36]
    assert [cluster.sent_bytes(ETHERNET, 12, ranks) for ranks in (2, 4)] == [12, 18]
    assert cluster.message_ms(ETHERNET, 0, 4) == pytest.approx(6 * 0.3)
    row = 256 * 2816 * 2
    assert sum(cluster.step_messages(RELEASE)) == row * (30 * 3 + cluster.HEAD_MESSAGES)


def test_more_macs_compute_less_and_wait_for_their_messages():
    for device in ("Apple M4 Max", "Apple M3 Ultra"):
        alone = paper_step(device, RELEASE, 1024)["sum"]
        one, two, four = (cluster.cluster_step(device, RELEASE, 1024, ranks, JACCL) for ranks in (1, 2, 4))
        assert one == {"computing": pytest.approx(alone), "messages": 0, "sum": pytest.approx(alone)}
        assert alone / 2 < two["computing"] < alone > two["sum"] > four["sum"] > four["computing"] > alone / 4
        assert cluster.cluster_step(device, RELEASE, 1024, 2, ETHERNET)["sum"] > alone
    assert cluster.cluster_step("cpu", RELEASE, 1024, 2, JACCL) is None
    assert len(cluster.table(("Apple M4 Max", "cpu")).splitlines()) == 4


def test_the_largest_share_is_what_a_step_waits_for():
    assert cluster.dealt_shares(RELEASE, 1) == pytest.approx(dict.fromkeys(cluster.dealt_shares(RELEASE, 2), 1.0))
    assert cluster.dealt_shares(RELEASE, 4)["experts"] == 6 * 32 / 704
