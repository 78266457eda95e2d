"""Many seeds at once: every one of them goes its own way."""

import copy

import numpy as np
import pytest
import torch

import rl
from rl.lockstep import Lockstep
from rl.replay import Batch, ReplayBuffer
from rsm_sampler.loggers import MemoryLogger
from tests.test_rl_training import QUICK, acting, parameters
from tests.toy_envs import SHORT, Counter

SMALL = {"width": 16, "depth": 2, "batch_size": 32, "policy_states": 8, "num_steps": 5}
PUBLISHED = {"warmup_steps": 0, "policy_states": 8, "kappa_period": 5}


def double(agent):
    """An agent whose networks compute in double precision."""
    for module in agent._modules().values():
        module.double()
    for name in ("_starts", "_ess"):
        if hasattr(agent, name):
            setattr(agent, name, getattr(agent, name).double())
    if hasattr(getattr(agent, "_entropy", None), "_sigma"):
        agent._entropy._sigma = agent._entropy._sigma.double()
    return agent


def filled(seed, n=300):
    """A replay of random transitions in double precision."""
    rng = torch.Generator().manual_seed(seed)
    replay = ReplayBuffer(n, 3, 2)
    replay._rows = [rows.double() for rows in replay._rows]
    normal, uniform = torch.randn(n, 8, generator=rng), torch.rand(n, 3, generator=rng)
    ends = (uniform[:, 2] < 0.1).float()
    replay.add(
        Batch(normal[:, :3], 2 * uniform[:, :2] - 1, normal[:, 3], normal[:, 4:7], ends, ends + 1)
    )
    return replay


@pytest.mark.parametrize(
    ("agent", "preset", "changes"),
    [
        ("sdac", "corrected", {}),
        ("sdac", "corrected", {"anchor_share": 0.5, "proposal": "next", "n_step": 2}),
        ("sdac", "corrected", {"proposal": "noised-policy", "critic_layer_norm": True}),
        ("sdac", "corrected", {"proposal": "policy", "temperature_rule": "fixed"}),
        ("sdac", "corrected", {"gradient_clip": 0.05, "critic_activation": "relu"}),
        ("sdac", "corrected", {"target_candidates": 4}),
        ("sdac", "official", PUBLISHED),
        ("dpmd", "corrected", {}),
        ("dpmd", "corrected", {"old_policy_period": 3, "behaviour_candidates": 4}),
        ("dpmd", "corrected", {"chain": "multistep", "policy_period": 2, "target_period": 3}),
        ("dpmd", "corrected", {"target_from_average": True, "normalise_observations": True}),
        ("dpmd", "printed", {}),
        ("dpmd", "official", PUBLISHED),
        ("qvpo", "corrected", {"uniform_share_updates": 10}),
        ("qvpo", "official", {"warmup_steps": 0}),
        ("qsm", "corrected", {}),
        ("qsm", "icml2025", {"warmup_steps": 0}),
        ("dipo", "corrected", {"action_lr": 0.1}),
        ("dipo", "official", {"warmup_steps": 0, "action_clip": 1e-3}),
        ("dacer", "corrected", {"entropy_states": 4, "entropy_draws": 16, "kappa_period": 5}),
        ("dacer", "icml2025", {"warmup_steps": 0, "policy_states": 8, "kappa_lr": 0.0}),
    ],
)
def test_twenty_updates_equal_those_of_each_seed_alone(agent, preset, changes):
    """To 1e-10 in double precision: networks, slow copies, optimisers, what is tuned, numbers."""
    kind = rl.AGENTS[agent]
    config = kind.config_type.preset(preset, **{**SMALL, **changes})
    seeds = (3, 4, 8)
    alone, joined = (
        [double(kind(3, 2, config, seed=seed, device="cpu")) for seed in seeds] for _ in range(2)
    )
    many = Lockstep(joined)
    double(many._common)
    replays = [filled(seed) for seed in seeds]
    observations = np.random.default_rng(0).normal(size=(20, 3, 2, 3)).astype(np.float32)
    for own in observations:
        for each in (*alone, *joined):
            each.moments.update(torch.from_numpy(own[0]))
        found = many.update(replays)
        for i, each in enumerate(alone):
            numbers = each.update(replays[i])
            assert numbers.keys() == found[i].keys()
            for name, value in numbers.items():
                torch.testing.assert_close(found[i][name], value, rtol=1e-9, atol=1e-9)
    for one, other in zip(alone, joined, strict=True):
        gap = (parameters(one) - parameters(other)).abs().max()
        assert gap < 1e-10
        for a, b in zip(one._optimisers(), other._optimisers(), strict=True):
            kept, same = a.state_dict()["state"], b.state_dict()["state"]
            assert kept.keys() == same.keys()
            for key, state in kept.items():
                for name, value in state.items():
                    torch.testing.assert_close(value, same[key][name], rtol=0, atol=1e-10)
        for name, value in one.extra_state().items():
            torch.testing.assert_close(other.extra_state()[name], value, rtol=1e-6, atol=1e-6)
        assert torch.equal(one.generator.get_state(), other.generator.get_state())
    differ = parameters(joined[0]) - parameters(joined[1])
    assert differ.abs().max() > 0.1


@pytest.mark.parametrize("changes", [{}, {"persistence": 0.7}])
def test_acting_together_equals_acting_alone(changes):
    """Up to rounding, and from the same random numbers."""
    config = rl.SDACConfig(**SMALL, **changes)
    alone, joined = ([rl.SDAC(3, 2, config, seed=s, device="cpu") for s in (0, 1)] for _ in "ab")
    many = Lockstep(joined)
    for observations in np.random.default_rng(0).normal(size=(3, 2, 4, 3)).astype(np.float32):
        found = many.act(observations)
        for i, each in enumerate(alone):
            np.testing.assert_allclose(found[i], each.act(observations[i]), atol=1e-5)


def test_agents_stay_whole():
    """Each can be used, saved and trained by itself while it is part of a stack."""
    config = rl.DPMDConfig(**SMALL)
    agents = [rl.DPMD(3, 2, config, seed=seed, device="cpu") for seed in (0, 1)]
    many, replays = Lockstep(agents), [ReplayBuffer(50, 3, 2) for _ in "ab"]
    row = torch.linspace(-1, 1, 30)
    for replay in replays:
        replay.add(
            Batch(
                row[:, None] * torch.ones(3),
                row[:, None] * torch.ones(2),
                row,
                row[:, None] * torch.ones(3),
                row * 0,
                row * 0 + 1,
            )
        )
    many.update(replays)
    state = copy.deepcopy(agents[1].state())
    restored = rl.DPMD.from_state(state, device="cpu")
    assert torch.equal(parameters(restored), parameters(agents[1]))
    many.update(replays)
    restored.update(replays[1])
    torch.testing.assert_close(parameters(restored), parameters(agents[1]), rtol=0, atol=1e-5)
    again = Lockstep(
        [restored, rl.DPMD.from_state(copy.deepcopy(agents[1].state()), device="cpu")]
    )
    again.update(replays)
    many.update(replays)
    torch.testing.assert_close(
        parameters(again.agents[1]), parameters(agents[1]), rtol=0, atol=1e-5
    )


@pytest.mark.bad_input
def test_agents_that_cannot_be_stacked_are_refused():
    """Other kinds, other configurations, other numbers of updates, or none at all."""
    config = rl.DPMDConfig(**SMALL)

    def dpmd(seed=0, **changes):
        return rl.DPMD(3, 2, rl.DPMDConfig(**{**SMALL, **changes}), seed=seed, device="cpu")

    later = dpmd()
    later.updates = 3
    for agents, message in (
        ([], "at least one"),
        ([rl.DPPO(3, 2, device="cpu")], "stackable kind, got dppo"),
        ([dpmd(), rl.SDAC(3, 2, device="cpu")], "one kind, got dpmd and sdac"),
        ([dpmd(), dpmd(width=8)], "one config"),
        ([dpmd(), rl.DPMD(4, 2, config, device="cpu")], "one observation_dim, got 3 and 4"),
        ([dpmd(), later], "one updates, got 0 and 3"),
    ):
        with pytest.raises(ValueError, match=message):
            Lockstep(agents)


# ---------------------------------------------------------------------- whole runs


def several(agent="dpmd", env=SHORT, **options):
    return rl.train_seeds(
        agent,
        env,
        **{"total_steps": 80, "eval_every": 0, "seeds": (5, 2), **QUICK, "policy_states": 8}
        | options,
    )


@pytest.mark.parametrize(
    ("agent", "batched"), [("dpmd", True), ("sdac", True), ("dpmd", False), ("dipo", True)]
)
def test_several_seeds_are_the_runs_of_each(agent, batched, tmp_path):
    """The same agents, evaluations and logs: bit for bit one after the other, else nearly."""
    options = {"total_steps": 100, "eval_every": 50, "log_every": 50}
    log = MemoryLogger()
    found = several(agent, batched=batched, run_dir=tmp_path / "all", logger=log, **options)
    for seed, mine in zip((5, 2), found, strict=True):
        own = MemoryLogger()
        alone = rl.train(
            agent,
            SHORT,
            seed=seed,
            logger=own,
            **{**QUICK, "policy_states": 8, **options},
        )
        assert mine.seed == seed
        tolerance = {"rtol": 0, "atol": 1e-4 if batched else 0}
        torch.testing.assert_close(acting(mine), acting(alone), **tolerance)
        kept = rl.load(tmp_path / "all" / f"seed-{seed}" / "last.pt", device="cpu")
        assert torch.equal(acting(kept), acting(mine))
        steps = [record["step"] for record in own.records if "eval_mean" in record]
        named = f"seed-{seed}/eval_mean"
        assert [record["step"] for record in log.records if named in record] == steps == [50, 100]


@pytest.mark.parametrize("batched", [True, False])
def test_interrupted_seeds_go_on_together_or_alone(batched, tmp_path):
    """A call that is repeated goes on; so does each folder by itself."""

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.step == 80 and progress.agent.seed == 2:
            raise Stop

    options = {"total_steps": 160, "eval_every": 40, "batched": batched}
    whole = several(run_dir=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        several(run_dir=tmp_path / "parts", callback=stop, **options)
    alone = rl.resume(tmp_path / "parts" / "seed-5", progress=False)
    found = several(run_dir=tmp_path / "parts", **options)
    for mine, theirs in zip(found, whole, strict=True):
        assert mine.updates == theirs.updates == 60
        tolerance = {"rtol": 0, "atol": 1e-3 if batched else 0}
        torch.testing.assert_close(acting(mine), acting(theirs), **tolerance)
    assert torch.equal(acting(found[0]), acting(alone))


def test_all_stop_when_every_callback_wants_to():
    """One that is satisfied goes on until the last one is."""
    seen = []

    def callback(progress):
        seen.append((progress.agent.seed, progress.step))
        return progress.step >= {5: 40, 2: 60}[progress.agent.seed]

    several(total_steps=200, eval_every=20, callback=callback, batched=True)
    assert seen == [(seed, step) for step in (20, 40, 60) for seed in (5, 2)]


def test_after_a_failure_the_others_catch_up(tmp_path):
    """All are saved; a repeated call brings every run to the end."""
    made = []

    def make():
        made.append(None)
        # The first environment of the second run fails once.
        return Counter(length=5, bad_step=70 if len(made) == 2 else None, bad="raise")

    options = {"total_steps": 200, "run_dir": tmp_path, "batched": True, "num_envs": 1}
    with pytest.raises(rl.EnvironmentFailure):
        several(env=make, **options)
    found = several(env=make, **options)
    assert [rl.run.read_about(tmp_path / f"seed-{s}")["seed"] for s in (5, 2)] == [5, 2]
    assert all(agent.updates >= 79 for agent in found)


@pytest.mark.bad_input
def test_bad_arguments_of_several_seeds_are_named():
    """No seeds, one twice, an environment, a foreign agent, a kind that cannot be batched."""
    for options, message in (
        ({"seeds": 0}, "seeds must be at least one"),
        ({"seeds": (1, 1)}, "all different"),
        ({"env": Counter()}, "env must be an id or a function"),
        ({"eval_env": Counter()}, "eval_env must be an id or a function"),
        ({"agent": "sac"}, "for several seeds, got 'sac'"),
    ):
        with pytest.raises(ValueError, match=message):
            several(**options)
    with pytest.raises(ValueError, match=r"batched must be False or None for the agent .dppo."):
        rl.train_seeds("dppo", SHORT, seeds=2, total_steps=9, batched=True)
    with pytest.raises(ValueError, match=r"seeds must go to rl.train_seeds, got 5"):
        rl.train_sdac(SHORT, total_steps=9, seeds=5)
