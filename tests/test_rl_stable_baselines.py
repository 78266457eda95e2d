"""Agents of stable-baselines3 behind the same training, evaluation and logs."""

import json
import tempfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rl
from rl.grid import estimate_cost
from rl.stable_baselines import StableBaselinesAgent, _model, configuration
from rsm_sampler.loggers import JSONLinesLogger

pytest.importorskip("stable_baselines3")
SMALL = {
    "sac": {"learning_starts": 50, "policy_kwargs": {"net_arch": [16]}},
    "td3": {"learning_starts": 50, "policy_kwargs": {"net_arch": [16]}},
    "ppo": {"n_steps": 64, "policy_kwargs": {"net_arch": [16]}},
}


def quick(name, env="Pendulum-v1", **options):
    given = {"total_steps": 120, "eval_every": 40, "eval_episodes": 2, "progress": False}
    return rl.train(name, env, **{**given, **SMALL[name], **options})


@pytest.mark.parametrize("name", list(SMALL))
def test_a_run_folder_is_like_that_of_any_agent(name, tmp_path):
    seen = []
    agent = quick(
        name, run_dir=tmp_path, log_every=30, callback=lambda p: seen.append((p.step, p.mean))
    )
    lines = JSONLinesLogger.read(tmp_path / "log.jsonl")
    assert [(e["step"], e["eval_mean"]) for e in lines if "eval_mean" in e] == seen
    assert [step for step, _ in seen] == [40, 80, 120]
    assert [e["step"] for e in lines if "env_steps_per_second" in e] == [30, 60, 90, 120]
    about = json.loads((tmp_path / "run.json").read_text())
    assert (about["agent"], about["env"], about["seed"]) == (name, "Pendulum-v1", 0)
    assert about["config"]["policy_kwargs"] == {"net_arch": [16]}
    kept = rl.load(tmp_path / "last.pt")
    observation = np.random.default_rng(0).normal(size=(5, 3))
    mine, theirs = (a.predict(observation, deterministic=True)[0] for a in (agent, kept))
    np.testing.assert_array_equal(mine, theirs)
    assert np.abs(mine).max() <= 2 and mine.std() > 0
    assert rl.evaluate(kept, "Pendulum-v1", episodes=2).mean == pytest.approx(seen[-1][1])
    assert agent.updates > 0 and not agent.interrupted


def test_a_run_is_decided_by_its_seed():
    first, again, other = (
        quick("sac", seed=seed, eval_every=0).policy.state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_a_run_leaves_nothing_behind_that_was_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in SMALL:
        quick(name)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_begins_anew(tmp_path):
    whole = quick("td3", run_dir=tmp_path / "whole")
    quick("td3", run_dir=tmp_path / "parts", callback=lambda p: True)
    parts = quick("td3", run_dir=tmp_path / "parts")
    lines = [JSONLinesLogger.read(tmp_path / n / "log.jsonl") for n in ("whole", "parts")]
    means = [[e["eval_mean"] for e in log if "eval_mean" in e] for log in lines]
    assert means[0] == means[1] and len(means[0]) == 3
    for p, q in zip(whole.policy.parameters(), parts.policy.parameters(), strict=True):
        assert torch.equal(p, q)


def test_they_are_compared_with_ours(tmp_path):
    ours = {"eval_every": 60, "eval_episodes": 1}
    rl.train(
        "dpmd",
        "Pendulum-v1",
        total_steps=60,
        width=8,
        batch_size=8,
        warmup_steps=20,
        replay_size=100,
        policy_states=4,
        num_envs=1,
        progress=False,
        run_dir=tmp_path / "runs" / "dpmd-Pendulum-v1-0",
        **ours,
    )
    quick("ppo", total_steps=60, run_dir=tmp_path / "runs" / "ppo-Pendulum-v1-0", eval_every=60)
    found = rl.comparison.read(tmp_path)
    assert set(found.curves) == {"dpmd", "ppo"}
    cost = estimate_cost("sac", "Pendulum-v1", updates=5, **SMALL["sac"])
    assert cost.gflop > 0 and cost.seconds > 0


def test_the_end_of_a_run_is_evaluated():
    seen = []
    quick("ppo", total_steps=130, eval_every=100, callback=lambda p: seen.append(p.step))
    assert seen == [100, 130]


def test_td3_explores():
    """Its policy is deterministic: without noise it would try one action at a state."""
    env = gym.make("Reacher-v5")
    for changes, wanted in (({}, 0.1), ({"action_noise": 0.3}, 0.3), ({"action_noise": None}, 0)):
        model, _ = _model("td3", env, configuration("td3", changes), 0, "cpu")
        model._last_obs = np.zeros((1, 10), np.float32)
        drawn = np.stack([model._sample_action(0, model.action_noise)[1][0] for _ in range(400)])
        # The error of a standard deviation of 800 numbers is 1 / sqrt(1600): 5 of them.
        assert drawn.std(0).mean() == pytest.approx(wanted, rel=0.125, abs=1e-5)


def test_observations_are_standardised_where_asked_for(tmp_path):
    """By the moments of training, also of a saved agent; rewards alone would leave none."""
    agent = quick("ppo", "InvertedPendulum-v5", normalise=True, run_dir=tmp_path)
    assert agent.moments is not None and agent.moments.count > 120
    kept = rl.load(tmp_path / "last.pt")
    observation = np.random.default_rng(0).normal(size=(5, 4))
    mine, theirs = (a.predict(observation, deterministic=True)[0] for a in (agent, kept))
    np.testing.assert_array_equal(mine, theirs)
    scaled = (observation - agent.moments.mean) / np.sqrt(agent.moments.var + 1e-8)
    direct, _ = agent.policy.predict(scaled.clip(-10, 10).astype(np.float32), deterministic=True)
    np.testing.assert_allclose(mine, direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ppo", {"use_sde": True}),
        ("sac", {"use_sde": True}),
        ("ppo", {"policy_kwargs": {"net_arch": [8], "activation_fn": torch.nn.ReLU}}),
        ("td3", {"policy_kwargs": {"net_arch": [8], "activation_fn": "Tanh"}}),
    ],
)
def test_any_policy_can_be_saved(name, changes, tmp_path):
    given = {**SMALL[name], **changes}
    before = str(given)
    agent = rl.train(
        name, "Pendulum-v1", total_steps=80, run_dir=tmp_path, progress=False, eval_every=80,
        eval_episodes=1, **given,
    )  # fmt: skip
    assert str(given) == before  # the library writes into what it is given
    observation = np.random.default_rng(0).normal(size=(5, 3))
    mine, theirs = (
        a.predict(observation, deterministic=True)[0]
        for a in (agent, rl.load(tmp_path / "last.pt"))
    )
    np.testing.assert_array_equal(mine, theirs)


def test_the_cost_of_rollouts_holds_their_epochs():
    """Operations of a step, against the difference between three and four rollouts."""
    counts = []
    for rollouts in (3, 4):
        with FlopCounterMode(display=False) as counter:
            quick("ppo", total_steps=64 * rollouts, eval_every=0)
        counts.append(counter.get_total_flops())
    cost = estimate_cost("ppo", "Pendulum-v1", **SMALL["ppo"])
    assert cost.gflop == pytest.approx((counts[1] - counts[0]) / 64 / 1e9, rel=0.02)


@pytest.mark.bad_input
def test_what_cannot_be_meant_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="config of 'sac' must have arguments of SAC, got 'width'"
    ):
        quick("sac", width=3)
    with pytest.raises(
        ValueError, match="config of 'sac' is set by its fields alone, got 'official'"
    ):
        quick("sac", config="official")
    with pytest.raises(ValueError, match=r"policy_kwargs must have classes of torch.nn or torch."):
        quick("sac", policy_kwargs={"activation_fn": StableBaselinesAgent})
    with pytest.raises(ValueError, match="policy_kwargs must hold numbers, texts, lists and dict"):
        quick("sac", policy_kwargs={"optimizer_kwargs": {"lr": lambda t: t}})
    with pytest.raises(ValueError, match="env must have a box of actions for 'sac', got Discrete"):
        quick("sac", "CartPole-v1")
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        quick("sac", total_steps=0)
    with pytest.raises(
        ValueError, match="env must be one environment for 'sac', got SyncVectorEnv"
    ):
        quick("sac", gym.make_vec("Pendulum-v1", 2))
    quick("ppo", run_dir=tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"run_dir must be new or hold this run, .* seed 0 instead of 1"
    ):
        quick("ppo", run_dir=tmp_path / "run", seed=1)
    with pytest.raises(
        ValueError, match=r"run_dir must be of an agent that resumes, got one of ppo"
    ):
        rl.resume(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match=r"run_dir must be new or hold this run, .* other files"):
        quick("ppo", run_dir=tmp_path / "other")
    agent = rl.load(tmp_path / "run" / "last.pt")
    with pytest.raises(ValueError, match="observation must have length 3, got shape"):
        agent.predict(np.zeros(4))
