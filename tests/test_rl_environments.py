import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rl.environments import EnvironmentFailure, Environments
from tests.toy_envs import Counter

MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED]
MUJOCO = [
    "Ant-v5",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "InvertedDoublePendulum-v5",
    "InvertedPendulum-v5",
    "Pusher-v5",
    "Reacher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
]


def counters(mode, terminates, copies=2):
    makers = [lambda: Counter(3, terminates)] * copies
    return Environments(SyncVectorEnv(makers, autoreset_mode=mode), copies)


def transitions(environments, steps):
    """What a replay of the first copy would hold."""
    found, observation = [], environments.reset(seed=0)
    for _ in range(steps):
        step = environments.step(np.zeros((environments.num_envs, 1), np.float32))
        if step.valid[0]:
            found.append(
                (
                    observation[0].tolist(),
                    step.next_observation[0].tolist(),
                    bool(step.terminated[0]),
                    bool(step.ended[0]),
                )
            )
        observation = step.observation
    return found


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["Half Cheetah", "Pendulum-v0"])
def test_other_bad_ids_are_named_too(name):
    with pytest.raises(ValueError, match=f"env must be a registered id, got '{name}'"):
        Environments(name)


def test_observations_are_not_the_environments_own_memory():
    vector = gym.vector.SyncVectorEnv([lambda: Counter(5)] * 2, copy=False)
    environments = Environments(vector)
    first = environments.reset(seed=0)
    before = first.copy()
    environments.step(np.zeros((2, 1), np.float32))
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("terminates", [True, False])
def test_episodes_end_with_their_real_last_observation(mode, terminates):
    """Three steps an episode, (episode, step) as observation, in every autoreset mode."""
    found = transitions(counters(mode, terminates), 9)
    expected = [
        ([float(e), float(s)], [float(e), float(s + 1)], terminates and s == 2, s == 2)
        for e in range(3)
        for s in range(3)
    ]
    assert found == expected[: len(found)] and len(found) >= 7


@pytest.mark.parametrize("mode", MODES)
def test_finished_episodes_are_counted(mode):
    environments = counters(mode, True)
    transitions(environments, 9)
    assert len(environments.finished) >= 4
    assert all(entry == (3.0, 3) for entry in environments.finished)  # the middle of [-2, 4] is 1


def test_actions_are_rescaled():
    environments = Environments(Counter(100))
    environments.reset(seed=0)
    rewards = [environments.step(np.full((1, 1), a, np.float32)).reward[0] for a in (-1, 0, 1)]
    assert rewards == [-2.0, 1.0, 4.0]


@pytest.mark.parametrize("name", [*MUJOCO, "Pendulum-v1", "MountainCarContinuous-v0"])
def test_state_is_everything(name):
    """Restored copies go on bit for bit, through ends and resets."""
    rng = np.random.default_rng(0)
    environments = Environments(name, 2)
    environments.reset(seed=3)
    for _ in range(23):
        environments.step(rng.uniform(-1, 1, (2, environments.action_dim)).astype(np.float32))
    state = environments.state()
    actions = rng.uniform(-1, 1, (80, 2, environments.action_dim)).astype(np.float32)
    first = [environments.step(action) for action in actions]
    again = Environments(name, 2)
    again.restore(state)
    assert again.resumes_exactly
    for one, other in zip(first, [again.step(action) for action in actions], strict=True):
        np.testing.assert_array_equal(one.observation, other.observation)
        np.testing.assert_array_equal(one.next_observation, other.next_observation)
        np.testing.assert_array_equal(one.reward, other.reward)
        np.testing.assert_array_equal(one.ended, other.ended)


def test_other_environments_say_that_they_do_not_resume():
    class Plain(gym.Wrapper):
        pass

    assert not Environments(lambda: Plain(gym.make("Pendulum-v1")), 1).resumes_exactly


def test_makes_no_noise(capfd):
    Environments("HalfCheetah-v4", 2).reset(seed=0)
    out, err = capfd.readouterr()
    assert out == "" and err == ""


class Odd(gym.Env):
    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action


LINE = Box(-1.0, 1.0, (2,))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (LINE, Discrete(3), "Box of one axis as action space"),
        (LINE, Box(-np.inf, np.inf, (2,)), "bounded action space"),
        (LINE, Box(-1.0, 1.0, (2, 2)), "Box of one axis as action space"),
        (Dict({"x": LINE}), LINE, "Box of one axis as observation space"),
        (Box(0, 255, (8, 8, 3), np.uint8), LINE, "Box of one axis as observation space"),
        (Discrete(3), LINE, "Box of one axis as observation space"),
    ],
)
def test_unsupported_spaces_are_named(observation, action, message):
    with pytest.raises(ValueError, match=message):
        Environments(lambda: Odd(observation, action))


@pytest.mark.bad_input
def test_errors_name_the_nearest_id():
    with pytest.raises(ValueError, match="nearest known: HalfCheetah-v5"):
        Environments("HalfCheeta-v5")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("source", "copies", "message"),
    [
        (3, 1, "source must be a string or callable or .*, got 3"),
        ("Pendulum-v1", 0, "num_envs must be at least 1"),
        (Counter(), 2, "num_envs must be 1 for a single environment"),
    ],
)
def test_bad_sources(source, copies, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Environments(source, copies)


@pytest.mark.parametrize(
    ("bad", "message"),
    [("nan", r"returned observation \[nan, nan\] at step 5"), ("raise", "raised at step 4")],
)
def test_failures_name_the_step(bad, message):
    environments = Environments(lambda: Counter(100, bad_step=5, bad=bad))
    environments.reset(seed=0)
    with pytest.raises(EnvironmentFailure, match=message):
        for _ in range(5):
            environments.step(np.zeros((1, 1), np.float32))
