"""Agents on a GPU: captured graphs, the same policy as on a CPU, runs that train."""

import numpy as np
import pytest
import torch

import rl
from rl.lockstep import Lockstep

pytestmark = pytest.mark.gpu
SMALL = {"width": 32, "batch_size": 32, "replay_size": 256}


def filled(device):
    replay = rl.ReplayBuffer(256, 3, 2, device=device)
    rng = torch.Generator().manual_seed(0)
    parts = [torch.randn(256, 3, generator=rng), 2 * torch.rand(256, 2, generator=rng) - 1]
    parts += [torch.randn(256, generator=rng), torch.randn(256, 3, generator=rng)]
    replay.add(rl.Batch(*parts, torch.zeros(256), torch.ones(256)))
    return replay


@pytest.mark.parametrize(
    ("kind", "preset", "changes"),
    [
        (rl.SDAC, "corrected", {"policy_states": 16}),
        (rl.SDAC, "corrected", {"policy_states": 16, "anchor_share": 0.5, "proposal": "next"}),
        (rl.SDAC, "corrected", {"policy_states": 16, "anneal_stages": 2, "chain": "multistep"}),
        (rl.SDAC, "official", {"policy_states": 16}),
        (rl.DPMD, "corrected", {"policy_states": 16, "critic_layer_norm": True}),
        (rl.DPMD, "official", {}),
        (rl.QSM, "corrected", {"policy_states": 16}),
        (rl.QSM, "icml2025", {"policy_states": 16}),
        (rl.DIPO, "corrected", {"policy_states": 16, "gradient_clip": 10.0}),
        (rl.DACER, "corrected", {"policy_states": 16, "return_critic": False}),
        (rl.QVPO, "corrected", {"policy_states": 16, "target_from_average": True}),
    ],
)
def test_captured_updates_train(kind, preset, changes):
    config = kind.config_type.preset(preset, **SMALL, **changes)
    agent = kind(3, 2, config, device="cuda")
    replay, losses = filled(agent.device), []
    for _ in range(60):
        losses.append(float(agent.update(replay)["critic_loss"]))
    assert all(captured._graph is not None for captured in agent._captured.values())
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < np.mean(losses[:10])
    assert len(set(losses)) == len(losses)  # every replay draws anew


@pytest.mark.parametrize("kind", [rl.SDAC, rl.DPMD, rl.QVPO, rl.QSM, rl.DACER])
def test_seeds_together_are_captured_and_stay_themselves(kind):
    """One graph for all; each seed draws from its own generators, as it does alone."""
    config = kind.config_type(**SMALL, policy_states=16)
    alone, joined = ([kind(3, 2, config, seed=s, device="cuda") for s in (0, 1)] for _ in "ab")
    many, replays = Lockstep(joined), [filled("cuda") for _ in "ab"]
    for k in range(12):
        found = many.update(replays)
        for mine, agent, replay in zip(found, alone, replays, strict=True):
            own = agent.update(replay)
            tolerance = 1e-4 if k < 3 else 5e-2  # rounding grows
            torch.testing.assert_close(
                mine["critic_loss"], own["critic_loss"], rtol=tolerance, atol=tolerance
            )
    assert all(captured._graph is not None for captured in many._captured.values())
    observations = np.random.default_rng(0).normal(size=(6, 2, 4, 3)).astype(np.float32)
    for each in observations:
        acted = many.act(each)
        for i, agent in enumerate(alone):
            np.testing.assert_allclose(acted[i], agent.act(each[i]), atol=0.1)


@pytest.mark.parametrize("kind", [rl.SDAC, rl.DPMD, rl.QSM, rl.DIPO, rl.DACER, rl.QVPO, rl.DPPO])
def test_the_policy_is_that_of_a_cpu(kind, tmp_path):
    options = {"width": 32} if kind is rl.DPPO else {**SMALL, "policy_states": 16}
    agent = kind(3, 2, kind.config_type(**options), device="cuda")
    agent.save(tmp_path / "agent.pt")
    other = rl.load(tmp_path / "agent.pt", device="cpu")
    observation = np.random.default_rng(0).normal(size=(8, 3))
    mine, theirs = (a.predict(observation, deterministic=True)[0] for a in (agent, other))
    np.testing.assert_allclose(mine, theirs, atol=1e-3)


def test_a_run_on_a_gpu(tmp_path):
    agent = rl.train_sdac(
        "Pendulum-v1",
        total_steps=300,
        warmup_steps=100,
        run_dir=tmp_path / "run",
        eval_every=0,
        device="cuda",
        policy_states=16,
        progress=False,
        **SMALL,
    )
    assert agent.updates == 40 and agent.act(np.zeros((5, 3), np.float32)).shape == (5, 1)


def test_an_on_policy_run_on_a_gpu():
    agent = rl.train_dppo(
        "Pendulum-v1",
        total_steps=700,
        rollout_steps=320,
        width=32,
        eval_every=0,
        device="cuda",
        progress=False,
    )
    assert agent.updates >= 2 and agent.act(np.zeros((5, 3), np.float32)).shape == (5, 1)
