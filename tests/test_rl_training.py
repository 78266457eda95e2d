import itertools
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import rl
from rl.cli import main
from rl.run import Run
from rsm_sampler import DivergedError, checkpoint
from rsm_sampler.checkpoint import CheckpointError
from rsm_sampler.loggers import JSONLinesLogger, MemoryLogger
from tests.toy_envs import SHORT, Counter, Wells

QUICK = {
    "num_envs": 2,
    "updates_per_step": 0.5,
    "warmup_steps": 40,
    "batch_size": 16,
    "replay_size": 64,
    "width": 16,
    "num_steps": 5,
    "eval_episodes": 2,
    "progress": False,
}


OFF_POLICY = ("updates_per_step", "warmup_steps", "replay_size")


def quick(agent="sdac", env="Pendulum-v1", **options):
    small = {"total_steps": 80, "eval_every": 0, **QUICK, "policy_states": 8, **options}
    if agent == "dppo":  # it has no replay
        small = {k: v for k, v in small.items() if k not in ("policy_states", *OFF_POLICY)}
    if agent == "dacer":
        few = {"entropy_states": 4, "entropy_draws": 16, "kappa_period": 10}
        small = {**few, **small}
    return rl.train(agent, env, **small)


def parameters(agent, *, training=True):
    modules = agent.state(training=training)["modules"]
    return torch.cat([p.flatten() for module in modules.values() for p in module.values()])


def acting(agent):
    """What an agent's file holds: not the slow copies that only training needs."""
    return parameters(agent, training=False)


OFFICIAL = {"config": "official", "kappa_period": 10, "normalise_observations": True}


@pytest.mark.parametrize(
    ("agent", "env", "changes"),
    [
        *itertools.product(["sdac", "dpmd"], [SHORT, "InvertedPendulum-v5"], [{}]),
        *itertools.product(["qsm", "dipo", "dacer", "qvpo"], [SHORT], [{}]),
        ("qsm", SHORT, {"config": "icml2025", "warmup_steps": 40}),
        ("dipo", SHORT, {"config": "official", "gradient_clip": 1.0}),
        ("dacer", SHORT, {"config": "official", "normalise_observations": True}),
        ("qvpo", SHORT, {"target_from_average": True, "uniform_share_updates": 50}),
        ("sdac", SHORT, {**OFFICIAL, "policy_lr_hold": 5, "policy_lr_decay": 10}),
        ("dpmd", SHORT, OFFICIAL),
        ("dpmd", SHORT, {"old_policy_period": 7, "critic_layer_norm": True}),
        ("sdac", SHORT, {"anchor_share": 0.5, "proposal": "next", "chain": "multistep"}),
        ("sdac", SHORT, {"persistence": 0.8, "num_envs": 2, "updates_per_step": 0.5}),
        ("dppo", SHORT, {"rollout_steps": 64, "num_envs": 2}),
        ("dpmd", SHORT, {"n_step": 7, "num_envs": 3, "updates_per_step": 1.0}),
    ],
)
def test_interrupted_and_resumed_equals_never_interrupted(agent, env, changes, tmp_path):
    """Bit for bit: networks, optimisers, replay, environments, logs; but for the time it took."""
    options = {"total_steps": 120, "eval_every": 40, "log_every": 20, **changes}
    whole = quick(agent, env, run_dir=tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    def stop_at(progress):
        if progress.step >= limit:
            raise Stop

    folder = tmp_path / "parts"
    for limit in (40, 80):
        with pytest.raises(Stop):
            if limit == 40:
                quick(agent, env, run_dir=folder, callback=stop_at, **options)
            else:
                rl.resume(folder, callback=stop_at, progress=False)
    parts = rl.resume(folder, progress=False)
    assert torch.equal(parameters(whole), parameters(parts))
    states = [
        checkpoint.load(tmp_path / name / "checkpoint.pt", kind="run")
        for name in ("whole", "parts")
    ]
    assert all(state.pop("seconds") > 0 for state in states)
    assert json.dumps(states[0], default=lambda t: t.tolist()) == json.dumps(
        states[1], default=lambda t: t.tolist()
    )
    logs = [JSONLinesLogger.read(tmp_path / name / "log.jsonl") for name in ("whole", "parts")]
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert key.endswith(("per_second", "seconds")) or one[key] == other[key]


def test_neighbouring_seeds_have_no_environment_in_common():
    """And the first copy has the run's own seed, whatever stands beside it."""
    first = {}
    for seed, copies in ((0, 1), (0, 3), (1, 3)):
        run = Run("dpmd", "Pendulum-v1", total_steps=200, seed=seed, run_dir=None,
                  changes={"num_envs": copies, "warmup_steps": 10})  # fmt: skip
        run.open(None)
        first[seed, copies] = run.observation
        run.close()
    np.testing.assert_array_equal(first[0, 1][0], first[0, 3][0])
    both = np.concatenate([first[0, 3], first[1, 3]])
    assert len(np.unique(both.round(6), axis=0)) == 6


@pytest.mark.parametrize("agent", ["sdac", "qsm", "dipo", "dacer", "qvpo"])
def test_same_seed_same_run_and_other_seed_another(agent):
    first, again, other = (parameters(quick(agent, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_run_folder_holds_what_it_says(tmp_path):
    agent = quick(run_dir=tmp_path / "run", total_steps=120, eval_every=60)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "log.jsonl", "checkpoint.pt", "replay", "last.pt", "best.pt"}
    log = JSONLinesLogger.read(tmp_path / "run" / "log.jsonl")
    evaluations = [record for record in log if "eval_mean" in record]
    assert [record["step"] for record in evaluations] == [60, 120]
    assert evaluations[-1]["eval_best"] == max(r["eval_mean"] for r in evaluations)
    last = rl.load(tmp_path / "run" / "last.pt", device="cpu")
    assert torch.equal(acting(agent), acting(last))
    found = rl.evaluate(last, "Pendulum-v1", episodes=2)
    assert found.mean == pytest.approx(evaluations[-1]["eval_mean"])


def test_a_finished_run_lets_go_of_its_replay():
    import gc
    import weakref

    seen = []
    original = rl.ReplayBuffer.__init__

    def note(self, *arguments, **options):
        original(self, *arguments, **options)
        seen.append(weakref.ref(self))

    gc.collect()
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rl.ReplayBuffer, "__init__", note)
            agent = quick()
        assert len(seen) == 1 and seen[0]() is None
    finally:
        gc.enable()
    assert agent.act(np.zeros((2, 3), np.float32)).shape == (2, 1)


def test_updates_are_owed_by_the_step():
    logger = MemoryLogger()
    agent = quick(total_steps=140, updates_per_step=0.25, logger=logger, log_every=20)
    assert agent.updates == 25
    record = logger.records[-1]
    for key in ("critic_loss", "temperature", "q_weight_ess", "updates_per_second", "updates"):
        assert key in record


def test_warmup_counts_or_not():
    assert quick(total_steps=60, updates_per_step=0.5).updates == 10
    assert quick(total_steps=60, updates_per_step=0.5, count_warmup=False).updates == 30


def test_transitions_do_not_cross_an_end(tmp_path):
    """What the replay holds of an environment that counts its steps."""
    for terminates in (True, False):
        folder = tmp_path / str(terminates)
        quick(
            "sdac",
            lambda t=terminates: Counter(3, t),
            run_dir=folder,
            total_steps=60,
        )
        state = checkpoint.load(folder / "checkpoint.pt", kind="run")
        replay = rl.ReplayBuffer(64, 2, 1)
        replay.load(folder / "replay", state["transitions"])
        batch = replay.all()
        assert torch.equal(batch.observation[:, 0], batch.next_observation[:, 0])
        assert torch.equal(batch.observation[:, 1] + 1, batch.next_observation[:, 1])
        last = batch.next_observation[:, 1] == 3
        assert torch.equal(batch.terminated > 0, last if terminates else last & False)


def test_an_environment_by_hand(tmp_path):
    environment = gym.make("Pendulum-v1")
    agent = quick("sdac", environment, total_steps=60, num_envs=1, run_dir=tmp_path / "run")
    assert rl.evaluate(agent, environment, episodes=1).lengths.tolist() == [200]
    with pytest.raises(ValueError, match="env must be given for a run on Pendulum-v1"):
        rl.resume(tmp_path / "run")
    rl.resume(tmp_path / "run", env=gym.make("Pendulum-v1"), total_steps=70, progress=False)


def test_the_environment_of_evaluations_is_kept(tmp_path):
    def shorter():
        return gym.make("Pendulum-v1", max_episode_steps=7)

    gym.register("Shorter-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=7)
    options = {"eval_every": 42, "eval_episodes": 1, "total_steps": 42}
    try:
        for source in ("Shorter-v0", shorter):
            folder = tmp_path / str(callable(source))
            quick("sdac", run_dir=folder, eval_env=source, **options)
            if callable(source):
                with pytest.raises(ValueError, match="eval_env must be given for a run on short"):
                    rl.resume(folder)
            again = source if callable(source) else None
            rl.resume(folder, eval_env=again, total_steps=84, progress=False)
            lines = [json.loads(s) for s in (folder / "log.jsonl").read_text().splitlines()]
            assert [s["eval_length"] for s in lines if "eval_length" in s] == [7, 7]
    finally:
        del gym.registry["Shorter-v0"]


@pytest.mark.bad_input
def test_another_kind_of_environment_for_evaluations(tmp_path):
    with pytest.raises(ValueError, match="observation_dim 3, got 2 in MountainCarContinuous-v0"):
        quick("sdac", run_dir=tmp_path / "run", eval_env="MountainCarContinuous-v0")
    assert not (tmp_path / "run").exists()


def test_observations_are_standardised():
    agent = quick("sdac", normalise_observations=True)
    assert float(agent.moments.count) == 80
    x = torch.randn(1000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = rl.base.RunningMoments(3)
    for part in (5 + 2 * x).split(93):
        moments.update(part)
    torch.testing.assert_close(moments.mean, (5 + 2 * x).mean(0))
    torch.testing.assert_close(moments.variance, (5 + 2 * x).var(0, correction=0))
    assert moments(5 + 2 * x).std(0).sub(1).abs().max() < 1e-3


@pytest.mark.parametrize("bad", ["nan", "raise"])
def test_a_failing_environment_leaves_a_saved_run(bad, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(rl.EnvironmentFailure, match="at step"):
        quick("sdac", lambda: Counter(9, bad_step=30, bad=bad), run_dir=folder)
    state = checkpoint.load(folder / "checkpoint.pt", kind="run")
    assert state["step"] == 58 and state["transitions"] == 58


@pytest.mark.parametrize("agent", ["sdac", "dppo"])
def test_a_run_that_diverges_leaves_its_last_checkpoint(agent, tmp_path):
    folder, options = tmp_path / "run", {"rollout_steps": 40} if agent == "dppo" else {}
    with pytest.raises(DivergedError, match=rf"{agent} must give finite actions, got \[nan\]"):
        quick(
            agent, policy_lr=1e30, run_dir=folder, checkpoint_every=20, total_steps=400, **options
        )
    kept = checkpoint.load(folder / "checkpoint.pt", kind="run")
    modules = kept["agent"]["modules"]
    assert all(p.isfinite().all() for module in modules.values() for p in module.values())


def test_after_a_failure_episodes_begin_anew(tmp_path):
    """The environment has moved, we have not: no transition may bridge the two."""
    folder = tmp_path / "run"
    source = lambda: Counter(9, bad_step=30, bad="raise")  # noqa: E731
    with pytest.raises(rl.EnvironmentFailure):
        quick("sdac", source, run_dir=folder, num_envs=1, policy_states=8)
    seen = []
    original = rl.ReplayBuffer.add

    def note(self, batch):
        seen.append(batch)
        original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.ReplayBuffer, "add", note)
        rl.resume(folder, env=lambda: Counter(9), total_steps=60, progress=False)
    assert seen[0].observation[0, 1] == 0
    for batch in seen:
        step, following = batch.observation[0], batch.next_observation[0]
        assert following[0] == step[0] and following[1] == step[1] + 1


def test_an_interruption_within_a_step_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    folder, original = tmp_path / "run", rl.SDAC.after_policy_step
    calls = []

    def interrupt(self, *arguments):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(rl.SDAC, "after_policy_step", interrupt)
    options = {"total_steps": 300, "checkpoint_every": 20}
    agent = quick(run_dir=folder, **options)
    assert agent.interrupted
    whole = quick(run_dir=tmp_path / "whole", **options)
    assert not whole.interrupted
    assert torch.equal(parameters(rl.resume(folder, progress=False)), parameters(whole))


def test_a_class_makes_environments():
    sizes = []
    original = rl.Environments.__init__

    def note(self, *arguments, **options):
        original(self, *arguments, **options)
        sizes.append(self.num_envs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl.Environments, "__init__", note)
        quick("sdac", Wells, eval_every=40)
    assert sizes == [2, 2, 2]  # training, and two evaluations of two episodes


def test_the_last_agent_is_kept_without_evaluations(tmp_path):
    agent = quick(run_dir=tmp_path / "run")
    last = rl.load(tmp_path / "run" / "last.pt", device="cpu")
    assert torch.equal(acting(agent), acting(last))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    code = (
        "import rl, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "rl.train_sdac('Pendulum-v1', total_steps=10**6, run_dir=sys.argv[1], "
        "num_envs=2, warmup_steps=40, batch_size=16, policy_states=16, replay_size=64, "
        "width=16, eval_every=0, "
        "log_every=50)"
    )
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") > 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert f"go on with: rsm-rl resume {folder}" in out
    state = checkpoint.load(folder / "checkpoint.pt", kind="run")
    agent = rl.resume(folder, total_steps=state["step"] + 20, progress=False)
    assert agent.updates == state["agent"]["updates"] + 4


def test_evaluation_is_the_same_every_time():
    agent = quick()
    first, again = (rl.evaluate(agent, "Pendulum-v1", episodes=3) for _ in range(2))
    np.testing.assert_array_equal(first.returns, again.returns)
    assert first.lengths.tolist() == [200] * 3 and first.std > 0
    two = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
    again = rl.evaluate(agent, two, episodes=3)
    # The same episodes, but for the rounding of products of other sizes.
    np.testing.assert_allclose(first.returns, again.returns, rtol=0.01)
    other = rl.evaluate(agent, "Pendulum-v1", episodes=3, seed=5)
    assert not np.array_equal(first.returns, other.returns)


def test_video(tmp_path):
    pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("pygame")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    path = tmp_path / "film.gif"
    rl.evaluate(quick(), "Pendulum-v1", episodes=1, video=path)
    assert path.stat().st_size > 10_000


def test_command_line(tmp_path, capsys):
    folder = str(tmp_path / "run")
    train = [
        "train",
        "sdac",
        "--env-id",
        "Pendulum-v1",
        "--total-steps",
        "60",
        "--run-dir",
        folder,
    ]
    fields = [f"{k}={v}" for k, v in QUICK.items() if k not in ("eval_episodes", "progress")]
    fields += ["policy_states=16"]
    train += ["--eval-every", "60", "--eval-episodes", "2", "--set", *fields]
    assert main(train) == 0
    assert main(["resume", folder, "--total-steps", "70"]) == 0
    assert main(["evaluate", folder, "--episodes", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        "last.pt  return -" in out
        and "best.pt  return -" in out
        and "sdac on Pendulum-v1: return -" in out
    )
    several = [*train[:6], "--seed", "3", "--seeds", "2", "--run-dir", str(tmp_path / "two")]
    assert main([*several, *train[8:]]) == 0
    out = capsys.readouterr().out
    assert all(f"two/seed-{seed}/last.pt  return -" in out for seed in (3, 4))
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "no run at" in capsys.readouterr().err
    assert main([*train[:2], "--env-id", "Pendulum-v1", "--total-steps", "9", "--set", "x=1"]) == 2
    assert "config must have fields of SDACConfig, got 'x'" in capsys.readouterr().err


def test_truth_values_and_tensorboard_on_the_shell(tmp_path, monkeypatch):
    made = []

    class Writer:
        def __init__(self, folder, purge_step=None):
            made.append(folder)
            Path(folder).mkdir(parents=True)

        def add_scalar(self, *arguments):
            pass

        def close(self):
            pass

    stub = types.ModuleType("torch.utils.tensorboard")
    stub.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    fields = [f"{k}={v}" for k, v in QUICK.items() if k not in ("eval_episodes", "progress")]
    arguments = [
        "train",
        "sdac",
        "--env-id",
        "Pendulum-v1",
        "--total-steps",
        "60",
        "--tensorboard",
    ]
    arguments += ["--eval-every", "60", "--eval-episodes", "2", "--run-dir", str(tmp_path / "run")]
    assert main([*arguments, "--set", *fields, "policy_states=8", "truncated=false"]) == 0
    assert made == [str(tmp_path / "run" / "tensorboard")]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["truncated"] is False


@pytest.mark.bad_input
def test_a_rejected_run_leaves_its_folder_alone(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="betas must lie within"):
        quick(run_dir=folder, schedule_scale=3.0)
    with pytest.raises(ValueError, match="total_steps must be above warmup_steps 40"):
        quick(run_dir=folder, total_steps=40)
    assert not folder.exists()
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="must say what was run"):
        rl.resume(folder)


@pytest.mark.bad_input
def test_a_folder_of_another_run_is_refused(tmp_path):
    folder = tmp_path / "run"
    quick(run_dir=folder)
    with pytest.raises(ValueError, match=r"run_dir must be new or hold this run, .* seed 0"):
        quick(run_dir=folder, seed=1)
    with pytest.raises(ValueError, match="with config"):
        quick(run_dir=folder, width=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="with other files"):
        quick(run_dir=tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"no run at .*: there is no run\.json"):
        rl.resume(tmp_path / "nothing")


@pytest.mark.bad_input
def test_a_checkpoint_of_another_agent_is_refused(tmp_path):
    quick().save(tmp_path / "sdac.pt")
    state = checkpoint.load(tmp_path / "sdac.pt", kind="agent")
    agent = rl.DPMD(3, 1, rl.DPMDConfig(width=16), device="cpu")
    with pytest.raises(CheckpointError, match="must be of an agent with agent dpmd, got sdac"):
        agent.load_state(state)
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        rl.load(tmp_path / "broken.pt")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"eval_every": -1}, "eval_every must be at least 0, got -1"),
        ({"config": "best"}, "preset must be one of"),
        ({"config": rl.SDACConfig()}, "config must be a preset's name to change"),
        (
            {"agent": "ddpg"},
            "agent must be one of .'dacer', 'dipo', .* 'sdac', 'td3'., got 'ddpg'",
        ),
        ({"env": "CartPole-v1"}, "Box of one axis as action space"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        quick(**options)


@pytest.mark.bad_input
def test_evaluation_refuses_another_environment():
    with pytest.raises(ValueError, match="env must have the agent's observation_dim 3, got 4"):
        rl.evaluate(quick(), "InvertedPendulum-v5", episodes=1)


def test_a_replay_that_does_not_fit_is_announced(monkeypatch):
    monkeypatch.setattr("rl.run._free_memory", lambda: 100.0)
    with pytest.warns(ResourceWarning, match="64 transitions"):
        quick()


BANDIT = {
    "sdac": {"num_draws": 32, "target_entropy": 0.0},
    "dpmd": {"noise": 0.05, "target_kl": 0.8},
    "qsm": {"target_entropy": 0.0},
    "dipo": {"noise": 0.05},
    "dacer": {"noise": 0.05, "kappa": 1.0, "kappa_lr": 0.0},
    "qvpo": {"noise": 0.05},
}


@pytest.mark.parametrize("agent", list(BANDIT))
def test_learns_a_bandit(agent):
    """Most draws of the learned policy lie near one of the two good actions.

    Uniform draws do so with probability 0.8 x 2 / 2 = 0.8 of the box at 0.4; at 0.2 it is 0.4.
    """
    trained = rl.train(
        agent,
        Wells,
        total_steps=900,
        num_envs=5,
        updates_per_step=1.0,
        warmup_steps=500,
        batch_size=128,
        width=48,
        num_steps=10,
        eval_every=0,
        progress=False,
        policy_period=1,
        policy_lr=2e-3,
        critic_lr=2e-3,
        **BANDIT[agent],
    )
    draws = trained.predict(np.zeros((600, 1)))[0][:, 0]
    near = np.minimum(abs(draws - 0.5), abs(draws + 0.5))
    assert (near < 0.2).mean() > 0.55
