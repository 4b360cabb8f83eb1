"""Every rank has a process that watches it: whatever happens to one, all end, and rank 0 says why in a sentence."""

import json
import os
import re
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from watched_ranks import WAIT, Ranks, free_ports

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.distributed.launched import Place, place_of
from mlx_dgemma.distributed.meeting import meet
from mlx_dgemma.errors import CircumstanceError
from mlx_dgemma.ranks.start import facts_of

PROCESS = r"\(process \d+ on [^)]+\)"
FAULTS = {
    "a child that is killed": ("child", 1, signal.SIGKILL, rf"Rank 1 {PROCESS} was killed by SIGKILL\."),
    "rank 0's child killed": ("child", 0, signal.SIGKILL, rf"Rank 0 {PROCESS} was killed by SIGKILL\."),
    "a watching process": ("parent", 1, signal.SIGKILL, rf"Rank 1 {PROCESS} has ended before the others\."),
    "a child that hangs": ("child", 1, signal.SIGSTOP, rf"Rank 1 {PROCESS} has been stopped for 7 s, .*"),
    "rank 0's child hangs": ("child", 0, signal.SIGSTOP, rf"Rank 0 {PROCESS} has been stopped for 7 s, .*"),
    "a watching process hangs": ("parent", 1, signal.SIGSTOP, rf"Rank 1 {PROCESS} has said nothing for 7 s, .*"),
    "a rank that is told to end": ("parent", 1, signal.SIGTERM, r"Rank 1 was told to end by SIGTERM\."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_rank_ends_all_with_one_sentence(fault, tmp_path):
    who, rank, number, sentence = FAULTS[fault]
    with Ranks(tmp_path, [WAIT] * (3 if fault == "a child that is killed" else 2)) as ranks:
        children = ranks.children(ranks.size)
        os.kill(children[rank] if who == "child" else ranks.processes[rank].pid, number)
        code, said = ranks.ended()
    assert code == 1
    assert re.fullmatch(rf"(a word\n)?Error: {sentence}\n", said), said  # MLX's own lines are left out
    assert not any(ranks.stderr[other] for other in ranks.stderr if other)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_without_rank_0_the_next_one_says_so(number, tmp_path):
    with Ranks(tmp_path, [WAIT] * 2) as ranks:
        ranks.children(2)
        time.sleep(1)  # rank 0 tells which process its child is; this child, unlike a rank, ends only if it is killed
        os.kill(ranks.processes[0].pid, number)
        assert ranks.ended()[0] == -signal.SIGKILL
    assert re.fullmatch(rf"Error: Rank 0 {PROCESS} has .*, so all ranks end\.\n", ranks.stderr[1])
    assert ranks.processes[1].returncode == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_anywhere_ends_all(rank, tmp_path):
    with Ranks(tmp_path, [WAIT] * 2) as ranks:
        ranks.children(2)
        os.kill(ranks.processes[rank].pid, signal.SIGINT)
        assert ranks.ended() == (130, "a word\n")
    assert ranks.processes[1].returncode == 130


def test_the_group_ends_as_rank_0_does(tmp_path):
    patient = {"PATIENT": "20"}  # or rank 0 kills one that it has told to end and that takes its time
    with Ranks(tmp_path, [f"{WAIT.partition('time.sleep')[0]}sys.exit(3)", WAIT], env=patient) as ranks:
        other = ranks.ended()
    assert other[0] == 1 and "another command" in other[1]  # each rank was told to do something else
    code = f"{WAIT.partition('time.sleep')[0]}time.sleep(60 * int(os.environ['MLX_RANK'])); sys.exit(3)"
    with Ranks(tmp_path, [code] * 2, env=patient) as ranks:
        assert ranks.ended() == (3, "a word\n")
    assert ranks.processes[1].returncode == 3
    code = f"{WAIT.partition('time.sleep')[0]}time.sleep(60 * (1 - int(os.environ['MLX_RANK']))); sys.exit('no memory')"
    with Ranks(tmp_path, [code] * 2, env={"PATIENT": "0.2"}) as ranks:
        code, said = ranks.ended()
    assert code == 1 and re.search(rf"Error: Rank 1 {PROCESS} has ended with exit code 1 \(no memory\)\.", said)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_port_that_is_taken_is_told(rank, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, Ranks(tmp_path, [WAIT] * 2) as others:
        ports = list(others.ports)
        others.__exit__()
        ports[rank] = taken.getsockname()[1]
        with Ranks(tmp_path, [WAIT] * 2, ports) as ranks:
            code, said = ranks.ended()
    assert code == 1
    assert re.fullmatch(rf"Error: Rank {rank} cannot listen on 127\.0\.0\.1:{ports[rank]} \(Address .*\); .*\n", said)


def test_a_rank_of_another_version_is_refused_before_it_starts(tmp_path):
    with Ranks(tmp_path, [WAIT] * 2, env={"MLX_OF_0": "1", "MLX_OF_1": "2"}) as ranks:
        assert ranks.ended() == (1, "Error: Rank 1 has MLX 2, but rank 0 has 1; install the same version.\n")
        assert ranks.processes[1].returncode == 1 and not ranks.children()


def test_checkpoints_are_told_apart_before_ranks_start(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for file in DEMO.iterdir():
            (tmp_path / name / file.name).symlink_to(file)

    def told(*arguments, **environment):
        *_, checkpoint = facts_of(["generate", *map(str, arguments)], environment)
        return checkpoint.value

    one, other = tmp_path / "one", tmp_path / "other"
    held = other / "generation_config.json"
    text = held.read_text()
    held.unlink()
    held.write_text(text.replace("0.005", "0.006"))
    values = told("--model", one), told(f"-m{one}", "--", "--model", other), told(MLX_DGEMMA_MODEL=str(one))
    assert set(values) == {told(f"--model={one}", MLX_DGEMMA_MODEL=str(other))} != {told("-m", other)}
    assert told("-m", tmp_path / "none") is told("-m", "a/b") is told() is None
    (other / "model.safetensors").unlink()
    for rank, name in enumerate(("one", "other")):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "model").symlink_to(tmp_path / name)
    command = [sys.executable, "-m", "mlx_dgemma", "info", "-m", "model"]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    folders = tmp_path / "0", tmp_path / "1"
    with Ranks(tmp_path, [None] * 2, command=command, env=environment, folders=folders) as ranks:
        wanted = "Error: Rank 1: The shard model/model.safetensors is missing; download it again.\n"
        assert ranks.ended() == (1, wanted)


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with Ranks(tmp_path, [WAIT] * 2, missing=(1,)) as ranks:
        code, said = ranks.ended()
    assert code == 1 and said.startswith("Error: Rank 1 of 2 has not come to 127.0.0.1:")


def test_places_are_read_from_each_launcher(tmp_path):
    hosts, devices = tmp_path / "hosts", tmp_path / "devices"
    hosts.write_text('[["10.0.0.1:5000", "10.0.0.1:5001"], ["10.0.0.2:5002", "10.0.0.2:5003"]]')
    devices.write_text('[[null, "rdma_en5"], ["rdma_en5", null]]')
    ring = place_of({"MLX_RANK": "1", "MLX_HOSTFILE": str(hosts)})
    assert ring == (1, 2, ("10.0.0.1", 5000), (("10.0.0.2", 5002), ("10.0.0.2", 5003)))
    jaccl = {"MLX_RANK": "0", "MLX_JACCL_COORDINATOR": "10.0.0.1:5000", "MLX_IBV_DEVICES": str(devices)}
    assert place_of(jaccl) == (0, 2, ("10.0.0.1", 5000), ())
    nccl = {"MLX_RANK": "1", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "12345", "MLX_WORLD_SIZE": "2"}
    assert place_of(nccl) == (1, 2, ("10.0.0.1", 12345), ())
    hosts.write_text("")
    assert place_of({"MLX_RANK": "0", "MLX_HOSTFILE": str(hosts)}) is place_of({}) is None
    for broken in ({"MLX_RANK": "0"}, {"MLX_RANK": "x", **nccl}, {"OMPI_COMM_WORLD_SIZE": "2"}):
        with pytest.raises(CircumstanceError, match=r"mlx\.launch"):
            place_of({**broken, "MLX_RANK": "x"} if broken.get("MLX_RANK") else broken)


def test_what_rank_0_says_right_behind_its_hello_is_heard():
    """It tells which process its child is; a rank that is slow reads both at once."""
    (port,) = free_ports(1)
    place = Place(rank=1, size=2, meeting=("127.0.0.1", port))
    hello = {"rank": 0, "host": "a", "process": 1, "facts": {}, "group": "b"}
    with socket.create_server(place.meeting) as listener, ThreadPoolExecutor() as pool:
        rank = pool.submit(meet, place, ["a"], lambda: None)
        with listener.accept()[0] as connection:
            connection.sendall(f'{json.dumps(hello)}\n{{"child": 7}}\n{{"al'.encode())
            (peer,) = rank.result(30)
            connection.sendall(b'ive": true}\n')
            assert peer.lines.receive() == [{"child": 7}, {"alive": True}]
        assert peer.processes == [1] and peer.lines.receive() == [] and not peer.lines.open
        peer.lines.close()
