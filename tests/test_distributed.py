"""Two processes come to what one comes to, and share the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rsm_sampler.distributed import Team

SCRIPT = Path(__file__).with_name("parallel_fit.py")


def launched(folder, loss, processes):
    folder.mkdir()
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(processes)]
    # The kernel chooses the order of a sum by the number of rows; else all is the same.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, str(SCRIPT), str(folder), loss],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["mirror-descent", "reverse-sampling"])
def test_two_processes_find_what_one_finds(tmp_path, loss):
    """After 60 steps weights differ by rounding alone, which Adam amplifies: within 1e-4."""
    for name, processes in (("one", 1), ("two", 2)):
        done = launched(tmp_path / name, loss, processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one = torch.load(tmp_path / "one" / "0.pt")
    both = [torch.load(tmp_path / "two" / f"{rank}.pt") for rank in range(2)]
    assert both[0]["loss"] == 2 and one["loss"] == 1
    for name, weight in one["weights"].items():
        assert torch.equal(both[0]["weights"][name], both[1]["weights"][name]), name
        torch.testing.assert_close(both[0]["weights"][name], weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[0]["draws"], one["draws"], atol=2e-3, rtol=1e-3)
    assert both[0]["history"] == pytest.approx(one["history"], abs=1e-3)
    # The meter counts the points of all; each process has evaluated half of them.
    assert one["evaluations"] == both[0]["evaluations"] == both[1]["evaluations"]
    whole = one["own"]
    assert sum(each["own"] for each in both) == whole
    # In a call of an odd number of points one process has one more.
    assert abs(both[0]["own"] - both[1]["own"]) <= both[0]["calls"] < 0.2 * whole
    assert (tmp_path / "two" / "run.pt").is_file()


def test_an_exception_in_one_process_ends_all(tmp_path):
    done = launched(tmp_path / "failing", "failing", 2)
    assert done.returncode != 0
    assert "OverflowError: the callback's own" in done.stderr
    assert "the callback failed in the leading process" in done.stderr


def test_one_process_is_not_a_team():
    team = Team("cpu")
    assert team.leads and team.size == 1 and team.share(7) == slice(0, 7)
    network = torch.nn.Linear(2, 2)
    assert team.denoiser(network) is network
    assert team.energy(len) is len
    assert team.most(3) == 3
    with pytest.raises(ValueError, match="device must be available on this machine, got 'xpu:9'"):
        Team("xpu:9")


@pytest.mark.parametrize("n", [0, 1, 5, 64])
def test_shares_are_all_rows_once(n):
    teams = [Team("cpu") for _ in range(3)]
    rows = []
    for rank, team in enumerate(teams):
        team.rank, team.size = rank, 3
        share = team.share(n)
        rows += range(n)[share]
        assert len(range(n)[share]) <= -(-n // 3)
    assert rows == list(range(n))
