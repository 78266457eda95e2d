import json
import math
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

import rl
from rl.comparison import Comparison, Curve, read, steps_done, write_report
from rl.grid import _Run, _tasks, compare, estimate_cost
from rsm_sampler.checkpoint import CheckpointError

SMALL = {
    "warmup_steps": 100,
    "width": 16,
    "depth": 1,
    "num_steps": 5,
    "batch_size": 16,
    "replay_size": 1000,
    "policy_states": 8,
    "num_envs": 1,
    "eval_every": 100,
    "eval_episodes": 2,
}
# One thread for each process: two would wait for each other where others use the machine.
QUIET = {"jobs": os.cpu_count() or 1, "say": lambda text: None}


def curve(*returns, seconds=60.0):
    return Curve([100 * (i + 1) for i in range(len(returns))], list(returns), seconds, 500.0)


def known():
    """Two agents on two tasks; b is better on x in all seeds, and equal on y."""
    return Comparison(
        {
            "a": {"x": {0: curve(1, 9, 2), 1: curve(1, 2, 4)}, "y": {0: curve(0, 0, 50)}},
            "b": {"x": {0: curve(1, 2, 10)}, "y": {0: curve(0, 60, 50), 1: curve(0, 0, 50)}},
        },
        {"x": 0.0, "y": -50.0},
        300,
    )


def test_scores_of_last_and_best_evaluations():
    np.testing.assert_array_equal(known().scores("a")["x"], [2, 4])
    np.testing.assert_array_equal(known().scores("a", "best")["x"], [9, 4])
    with pytest.raises(ValueError, match="which must be 'last' or 'best', got 'first'"):
        known().scores("a", "first")


def test_the_report_holds_the_numbers_of_the_runs(tmp_path):
    text = write_report(known(), tmp_path).read_text()
    assert "| x | 3.00 ± 1.41 | 10.0 |" in text
    assert "| best of each seed | 6.50 ± 3.54 | 10.0 |" in text
    assert "x 0.0 and 10.0, y -50.0 and 50.0" in text
    # a: 0.2, 0.4, 1; b: 1, 1, 1. On x all pairs are lost, on y all are equal.
    assert "| a | 0.65 [" in text and "] | 0.53 [" in text
    assert "| b | 1.00 [1.00, 1.00] | 1.00 [1.00, 1.00] | – |" in text
    assert "] | 0.25 [0.25, 0.25] |" in text
    assert "| x | 0.30; 0.00 [0.00, 0.00] | **1.00** |" in text
    assert "| y | **1.00** | 1.00; 0.50 [0.50, 0.50] |" in text
    for name in ("curves.png", "profiles.png"):
        assert (tmp_path / name).stat().st_size > 5000
    assert json.loads((tmp_path / "scores.json").read_text())["random"] == known().random


def test_agents_with_fewer_tasks_do_not_hide_the_others_tasks(tmp_path):
    """c has run on x alone: a and b are compared on both tasks, all three on x."""
    found = known()
    found.curves["c"] = {"x": {0: curve(0, 0, 5)}}
    text = write_report(found, tmp_path).read_text()
    both, one = text.split("Over 2 tasks")[1].split("Over 1 task")
    assert "| a | 0.65 [" in both and "| c |" not in both
    alone = "0.50 [0.50, 0.50] | 0.50 [0.50, 0.50] | 0.00 [0.00, 0.00]"
    assert "| a | 0.30 [" in one and f"| c | {alone} |" in one
    assert "| x | 0.30; 0.00 [0.00, 0.00] | **1.00** | 0.50; 0.00 [0.00, 0.00] |" in text
    assert "| **1.00** | 1.00; 0.50 [0.50, 0.50] | – |" in text


def test_a_reference_counts_as_one(tmp_path):
    text = write_report(known(), tmp_path, reference={"x": 20.0, "y": 50.0}).read_text()
    assert "x 0.0 and 20.0" in text
    # Of a task that it does not name, as of a folder with more tasks, the best agent's mean.
    text = write_report(known(), tmp_path, reference={"x": 20.0}).read_text()
    assert "x 0.0 and 20.0, y -50.0 and 50.0" in text


def test_random_steps_that_do_not_count_are_not_read_as_training(tmp_path):
    """A run of 200 steps after 100 that its length leaves out: evaluations at 100 and 200."""
    folder = tmp_path / "runs" / "dpmd-Pendulum-v1-0"
    rl.train(
        "dpmd",
        "Pendulum-v1",
        total_steps=200,
        count_warmup=False,
        progress=False,
        run_dir=folder,
        **SMALL,
    )
    found = read(tmp_path, total_steps=200).curves["dpmd"]["Pendulum-v1"][0]
    assert found.steps == [100, 200] and steps_done(folder) == 200
    assert found.updates == pytest.approx(0.2 * 200, abs=1)


def test_the_time_of_a_run_is_that_of_all_its_sittings(tmp_path):
    began = time.perf_counter()
    shared = {"run_dir": tmp_path / "runs" / "run", "progress": False, **SMALL}
    rl.train("dpmd", "Pendulum-v1", total_steps=200, **shared)
    first = read(tmp_path).curves["dpmd"]["Pendulum-v1"][0].seconds
    middle = time.perf_counter()
    time.sleep(0.5)
    paused = time.perf_counter()
    rl.resume(tmp_path / "runs" / "run", total_steps=400, progress=False)
    second = read(tmp_path).curves["dpmd"]["Pendulum-v1"][0].seconds
    assert 0 < first < second < middle - began + time.perf_counter() - paused


def die():
    os._exit(9)


def test_a_run_whose_process_is_killed_takes_no_other_with_it(tmp_path):
    with pytest.raises(RuntimeError, match="1 of 3 runs failed: dpmd-Pendulum-v1-0: Broken"):
        compare(
            ["Pendulum-v1"],
            ["dpmd", "qsm", "qvpo"],
            seeds=1,
            total_steps=200,
            out=tmp_path,
            changes={"dpmd": {"eval_env": die}},
            **QUIET,
            **SMALL,
        )
    found = read(tmp_path)
    assert [found.curves[a]["Pendulum-v1"][0].steps[-1] for a in ("qsm", "qvpo")] == [200, 200]
    assert "dpmd" not in found.curves


def test_yardsticks_make_as_many_updates(tmp_path):
    """Mixed with ours, whose fields they do not know; and the grid goes on with the same call."""
    pytest.importorskip("stable_baselines3")
    shared = {key: SMALL[key] for key in ("eval_every", "eval_episodes")}
    own = {key: value for key, value in SMALL.items() if key not in shared}
    small = {"learning_starts": 100, "policy_kwargs": {"net_arch": [8]}}
    grid = {
        "total_steps": 200,
        "seeds": 1,
        "out": tmp_path,
        "changes": {"dpmd": own, "sac": small, "td3": small},
        **QUIET,
        **shared,
    }
    found = compare(["Pendulum-v1"], ["dpmd", "sac", "td3"], **grid)
    updates = {agent: by["Pendulum-v1"][0].updates for agent, by in found.curves.items()}
    assert all(19 <= made <= 20 for made in updates.values()), updates
    text = (tmp_path / "report.md").read_text()
    assert "| td3 | 1 | 1 | 0.10 |" in text or "| td3 | 1 | 1 | 0.09 |" in text
    assert compare(["Pendulum-v1"], ["dpmd", "sac", "td3"], **grid) == found


def test_a_grid_runs_what_is_missing(tmp_path):
    said = []
    grid = {"total_steps": 200, "out": tmp_path, **QUIET, "say": said.append, **SMALL}
    found = compare(["Pendulum-v1"], ["dpmd"], seeds=2, **grid)
    assert said[0] == "2 runs of 200 steps, 0 of them done" and "GFLOP" in said[1]
    assert all(
        found.curves[a]["Pendulum-v1"][s].steps == [100, 200] for a in found.curves for s in (0, 1)
    )
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/checkpoint.pt")}
    said.clear()
    again = compare(["Pendulum-v1"], ["dpmd"], seeds=2, **grid)
    assert said == ["2 runs of 200 steps, 2 of them done"]
    assert again == found and {p: p.stat().st_mtime_ns for p in before} == before
    # A run of the grid is the run that train makes.
    alone = rl.train(
        "dpmd",
        "Pendulum-v1",
        total_steps=200,
        seed=1,
        progress=False,
        run_dir=tmp_path / "alone",
        **SMALL,
    )
    kept = rl.load(tmp_path / "runs" / "dpmd-Pendulum-v1-1" / "last.pt")
    for p, q in zip(alone.policy.parameters(), kept.policy.parameters(), strict=True):
        np.testing.assert_allclose(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)


def test_a_grid_that_was_killed_goes_on(tmp_path):
    """Killed once a run has a checkpoint, then run again: the same curve as never killed.

    The process that trains outlives it for a while, and the second grid waits for that to end.
    """
    options = ["--set", *(f"{k}={v}" for k, v in SMALL.items() if not k.startswith("eval"))]
    command = [sys.executable, "-c", "from rl.cli import main; main()", "compare", "--agents"]
    command += [
        "dpmd",
        "--envs",
        "Pendulum-v1",
        "--seeds",
        "1",
        "--total-steps",
        "600",
        "--eval-every",
        "100",
    ]
    command += ["--eval-episodes", "2", "--jobs", "2", "--out", str(tmp_path / "killed"), *options]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    folder = tmp_path / "killed" / "runs" / "dpmd-Pendulum-v1-0"
    deadline = time.monotonic() + 120
    while steps_done(folder) < 200 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert 200 <= steps_done(folder) < 600
    grid = {"total_steps": 600, "seeds": 1, **QUIET, **SMALL}
    found = compare(["Pendulum-v1"], ["dpmd"], out=tmp_path / "killed", **grid)
    whole = compare(["Pendulum-v1"], ["dpmd"], out=tmp_path / "whole", **grid)
    mine, theirs = (c.curves["dpmd"]["Pendulum-v1"][0] for c in (found, whole))
    assert mine.steps == theirs.steps == [100, 200, 300, 400, 500, 600]
    assert mine.returns == pytest.approx(theirs.returns, rel=1e-6)


def test_batched_seeds_fill_the_same_grid(tmp_path):
    """One process for the seeds that are missing, folders and curves as of single runs."""
    grid = {"total_steps": 300, **QUIET, **SMALL}
    pair = ["Pendulum-v1"], ["dpmd"]
    single = compare(*pair, seeds=3, out=tmp_path / "one", **grid)
    shutil.copytree(
        tmp_path / "one/runs/dpmd-Pendulum-v1-1", tmp_path / "many/runs/dpmd-Pendulum-v1-1"
    )
    said = []
    options = {**grid, "say": said.append}
    found = compare(*pair, seeds=3, out=tmp_path / "many", batched=True, **options)
    mine, theirs = (c.curves["dpmd"]["Pendulum-v1"] for c in (found, single))
    assert mine.keys() == theirs.keys() == {0, 1, 2}
    for seed, curve in mine.items():
        assert curve.returns == pytest.approx(theirs[seed].returns, rel=1e-3)
        assert curve.seconds > 0
    assert [line for line in said if line.startswith("[")] == [
        "[1/2] dpmd-Pendulum-v1-0",
        "[2/2] dpmd-Pendulum-v1-2",
    ]


def test_only_agents_that_can_be_batched_are(tmp_path):
    """The others, those of stable-baselines3 too, have a process for each run."""
    runs = [
        _Run(agent, env, seed, tmp_path)
        for agent in ("sdac", "dppo", "sac")
        for env in ("x", "y")
        for seed in (0, 1)
    ]
    sizes = [len(task) for task in _tasks(runs, True, {})]
    assert sizes == [2, 2, *[1] * 8]
    assert all(len(task) == 1 for task in _tasks(runs, None, {"device": "cpu"}))
    assert len(_tasks(runs, None, {"device": "cuda"})) == 10


@pytest.mark.parametrize("agent", ["qsm", "dipo", "dacer", "qvpo"])
def test_every_agent_has_a_cost(agent):
    """Those that differentiate critics within an update too."""
    sizes = {"width": 16, "depth": 1, "batch_size": 16, "policy_states": 8}
    if agent == "dacer":
        sizes |= {"entropy_states": 4, "entropy_draws": 16}
    cost = estimate_cost(agent, "Pendulum-v1", updates=2, **sizes)
    assert cost.gflop > 0 and cost.seconds > 0


def test_finished_runs_of_another_configuration_are_refused(tmp_path):
    grid = {"total_steps": 200, "seeds": 1, "out": tmp_path, **QUIET, **SMALL}
    rl.train(
        "dpmd",
        "Pendulum-v1",
        total_steps=200,
        progress=False,
        run_dir=tmp_path / "runs" / "dpmd-Pendulum-v1-0",
        **SMALL,
    )
    with pytest.raises(ValueError, match=r"out must hold runs of this configuration, .* width 16"):
        compare(["Pendulum-v1"], ["dpmd"], **{**grid, "width": 8})


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path):
    blocked = tmp_path / "runs" / "sdac-Pendulum-v1-0"
    blocked.mkdir(parents=True)
    (blocked / "other").write_text("of somebody else")
    with pytest.raises(RuntimeError, match="1 of 2 runs failed: sdac-Pendulum-v1-0: ValueError"):
        compare(
            ["Pendulum-v1"],
            ["sdac", "dpmd"],
            seeds=1,
            total_steps=200,
            out=tmp_path,
            **QUIET,
            **SMALL,
        )
    assert list(read(tmp_path).curves) == ["dpmd"] and (tmp_path / "report.md").exists()
    with pytest.raises(RuntimeError, match="1 of 1 runs failed: dpmd-Pendulum-v1-0: ValueError"):
        compare(["Pendulum-v1"], ["dpmd"], seeds=1, total_steps=50, out=tmp_path / "none",
                **QUIET, **SMALL)  # fmt: skip


def test_ray_runs_the_grid(tmp_path):
    pytest.importorskip("ray")
    found = compare(
        ["Pendulum-v1"],
        ["dpmd"],
        seeds=1,
        total_steps=200,
        out=tmp_path,
        ray="local",
        **QUIET,
        **SMALL,
    )
    assert found.curves["dpmd"]["Pendulum-v1"][0].steps == [100, 200]


def test_operations_are_counted():
    """DPMD with one draw and no chain to speak of: by hand, layer by layer."""
    sizes = {"width": 64, "depth": 2, "batch_size": 128, "num_envs": 1, "policy_period": 1}
    few, many = (
        estimate_cost("dpmd", "Pendulum-v1", updates=1, updates_per_step=u, **sizes)
        for u in (0.5, 1.0)
    )
    update = 2 * (many.gflop - few.gflop)
    # Of the critics alone: two of them, forward and backward, on 3 + 1 inputs.
    layers = 4 * 64 + 64 * 64 + 64
    assert update > 2 * 3 * 128 * layers * 2 / 1e9
    assert 0 < few.seconds < 10 and math.isfinite(many.seconds)
    wide = estimate_cost("dpmd", "Pendulum-v1", updates=1, **{**sizes, "width": 128})
    assert 2.0 < wide.gflop / estimate_cost("dpmd", "Pendulum-v1", updates=1, **sizes).gflop < 4.0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"envs": []}, "envs must be different ones, at least one, got"),
        ({"agents": ["sdac", "sdac"]}, "agents must be different ones"),
        ({"agents": ["sda"]}, r"agents must be among .* got \['sda'\]"),
        ({"seeds": 0}, r"seeds must be different ones, at least one, got \(\)"),
        ({"eval_every": 0}, "eval_every must be at least 1, .* got 0"),
        ({"jobs": 0}, "jobs must be at least 1, got 0"),
        ({"changes": {"dpmd": {}}}, r"changes must be of \['sdac'\], got \['dpmd'\]"),
        ({"reference": {"x": 1.0}}, r"reference must have \['Pendulum-v1'\], got \['x'\]"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, message, tmp_path):
    given = {"envs": ["Pendulum-v1"], "agents": ["sdac"], "total_steps": 10, "out": tmp_path}
    with pytest.raises(ValueError, match=message):
        compare(**{**given, **changes})


def test_a_folder_without_runs_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no runs at"):
        read(tmp_path)
