"""Small environments whose every answer is known."""

from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box

# A real environment with short episodes, so that evaluations are quick.
SHORT = "ShortPendulum-v1"
gym.register(SHORT, entry_point="gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=40)


class Counter(gym.Env):
    """Counts its steps; ends by termination or by time limit after a given number.

    The observation is (episode, step); the reward is the action. Bounds of actions are [-2, 4].
    """

    metadata: ClassVar = {"render_modes": []}

    def __init__(self, length=3, terminates=True, bad_step=None, bad="nan"):
        self.observation_space = Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = Box(-2.0, 4.0, (1,), np.float32)
        self.length, self.terminates = length, terminates
        self.bad_step, self.bad = bad_step, bad
        self.episode, self.step_number, self.total = -1, 0, 0

    def _observation(self):
        return np.array([self.episode, self.step_number], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action):
        self.step_number += 1
        self.total += 1
        if self.bad_step == self.total:
            if self.bad == "raise":
                raise RuntimeError("the simulation diverged")
            return np.full(2, np.nan, np.float32), 0.0, False, False, {}
        over = self.step_number == self.length
        return (
            self._observation(),
            float(action[0]),
            over and self.terminates,
            over and not self.terminates,
            {},
        )

    def get_state(self):
        return {"counters": [self.episode, self.step_number, self.total]}

    def set_state(self, state):
        self.episode, self.step_number, self.total = state["counters"]


class Wells(gym.Env):
    """One step, no state that matters; the reward is highest at two actions."""

    metadata: ClassVar = {"render_modes": []}

    def __init__(self, places=(-0.5, 0.5), width=0.2):
        self.observation_space = Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.places, self.width = np.array(places), width

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        distance = (action[0] - self.places) / self.width
        reward = float(np.logaddexp.reduce(-0.5 * distance**2))
        return np.zeros(1, np.float32), reward, True, False, {}

    def get_state(self):
        return {}

    def set_state(self, state):
        pass
