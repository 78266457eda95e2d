"""Doctored files of agents and run folders: refused by name, or right; in time, within memory."""

import json
import math
import shutil

import numpy as np
import pytest

import rl
from rsm_sampler import CheckpointError
from tests.doctored import (
    MEMORY,
    contents_of,
    failures,
    headers,
    in_time,
    judge,
    payloads,
    peak,
    write,
)
from tests.toy_envs import SHORT

STEPS = 60
QUICK = {
    "num_envs": 2,
    "updates_per_step": 0.5,
    "warmup_steps": 20,
    "batch_size": 8,
    "replay_size": 128,
    "width": 8,
    "depth": 2,
    "num_steps": 4,
    "policy_states": 4,
    "eval_every": 0,
    "eval_episodes": 1,
    "progress": False,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run, and an agent of stable-baselines3."""
    folder = tmp_path_factory.mktemp("runs")
    rl.train("sdac", SHORT, total_steps=STEPS, run_dir=folder / "run", **QUICK)
    rl.train("dppo", SHORT, total_steps=STEPS, run_dir=folder / "dppo", **ON_POLICY)
    rl.train(
        "ppo", SHORT, total_steps=64, run_dir=folder / "ppo", progress=False, eval_every=0,
        n_steps=64, batch_size=32, device="cpu", policy_kwargs={"net_arch": [8]}, normalise=True,
    )  # fmt: skip
    return folder


ON_POLICY = {
    k: v
    for k, v in QUICK.items()
    if k not in ("updates_per_step", "warmup_steps", "replay_size", "policy_states")
}


def use(agent):
    action, _ = agent.predict(np.zeros(3, np.float32), deterministic=True)
    assert action.shape == (1,) and np.isfinite(action).all()


def load(path):
    return rl.load(path, device="cpu")


def examine_agent(path, share):
    before = peak()
    wrong, tried = failures(path, load, use, share=share)
    assert wrong == []
    assert peak() - before < MEMORY
    return tried


def examine_run(folder, share):
    """Doctored forms of checkpoint.pt, run.json, and the files of the replay."""
    before = peak()

    def resume(path):
        return rl.resume(folder, device="cpu", progress=False)

    checkpoint = folder / "checkpoint.pt"
    wrong, tried = failures(checkpoint, resume, use, share=share)
    for path in sorted((folder / "replay").glob("*.pt")):
        good, contents = path.read_bytes(), contents_of(path)
        forms = [*headers(contents)]
        forms += [(k, {**contents, "payload": v}) for k, v in payloads(contents["payload"])]
        for name, changed in forms[:: max(1, round(1 / share))]:
            write(path, changed)
            tried += 1
            wrong += filter(None, [judge(f"replay: {name}", path, resume, use)])
        path.write_bytes(good)
    path = folder / "run.json"
    good = path.read_text()
    forms = [("cut", good[:50]), ("empty", ""), ("list", "[1]"), ("deep", "[" * 100_000)]
    forms += [("digits", good.replace('"seed": 0', '"seed": ' + "9" * 10_000))]
    for name, about in payloads(json.loads(good)):
        try:
            forms.append((name, json.dumps(about)))
        except (TypeError, ValueError):
            continue
    for name, text in forms[:: max(1, round(1 / share))]:
        path.write_text(text)
        tried += 1
        wrong += filter(None, [judge(f"run.json: {name}", path, resume, use)])
    path.write_text(good)
    use(resume(path))
    assert wrong == []
    assert peak() - before < MEMORY
    return tried


@pytest.mark.parametrize("name", ["run", "dppo", "ppo"])
def test_some_doctored_agents(folder, name):
    assert examine_agent(folder / name / "last.pt", 0.03) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "dppo", "ppo"])
def test_doctored_agents(folder, name):
    assert examine_agent(folder / name / "last.pt", 1.0) >= 200


@pytest.mark.parametrize("name", ["run", "dppo"])
def test_some_doctored_runs(folder, tmp_path, name):
    shutil.copytree(folder / name, tmp_path / name)
    assert examine_run(tmp_path / name, 0.02) >= 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "dppo"])
def test_doctored_runs(folder, tmp_path, name):
    shutil.copytree(folder / name, tmp_path / name)
    assert examine_run(tmp_path / name, 0.25) >= 300


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**8},
        {"depth": 10**8},
        {"critic_width": 10**8},
        {"num_steps": 10**9},
        {"evaluation_candidates": 10**9},
    ],
)
def test_an_agent_larger_than_its_file_is_refused_before_it_is_made(folder, tmp_path, changes):
    contents = contents_of(folder / "run" / "last.pt")
    contents["payload"]["config"] |= changes
    write(tmp_path / "large.pt", contents)
    before = peak()
    with in_time(), pytest.raises(CheckpointError, match=r"large\.pt"):
        load(tmp_path / "large.pt")
    assert peak() - before < 200 << 20


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"width": 10**8},
        {"depth": 10**8},
        {"num_envs": 10**9},
        {"num_steps": 10**9},
        {"replay_size": 10**15},
    ],
)
def test_a_run_that_asks_for_too_much_is_refused_before_it_is_made(
    folder, tmp_path, started, changes
):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    about = json.loads((run / "run.json").read_text())
    about["config"] |= changes
    (run / "run.json").write_text(json.dumps(about))
    if not started:
        (run / "checkpoint.pt").unlink()
    before = peak()
    with in_time(), pytest.raises(CheckpointError, match=r"run\.json"):
        rl.resume(run, device="cpu", progress=False)
    assert peak() - before < 200 << 20


def test_a_replay_that_is_refused_stays(folder, tmp_path):
    """A checkpoint of fewer transitions does not cost those that came later."""
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    contents, before = contents_of(run / "checkpoint.pt"), sorted((run / "replay").iterdir())
    contents["payload"]["transitions"], contents["payload"]["owed"] = 0, math.inf
    write(run / "checkpoint.pt", contents)
    with pytest.raises(CheckpointError, match="owed"):
        rl.resume(run, device="cpu", progress=False)
    assert sorted((run / "replay").iterdir()) == before


def test_names_of_generators_are_not_called(folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    contents, called = contents_of(run / "checkpoint.pt"), []
    monkeypatch.setattr(np.random, "seed", lambda *arguments: called.append(arguments))
    for copy in contents["payload"]["environments"]["copies"]:
        copy["generator"]["name"] = "seed"
    write(run / "checkpoint.pt", contents)
    with pytest.raises(CheckpointError, match=r"\['name'\] must be one of .*, got 'seed'"):
        rl.resume(run, device="cpu", progress=False)
    assert called == []
