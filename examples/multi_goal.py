r"""Four equally good goals: a diffusion policy chooses each of them.

A point on a plane starts near the centre and is paid for reaching any of four goals. SDAC's policy
is :math:`e^{Q/\lambda}`, with one mode for each direction; that of SAC (of stable-baselines3) is
one Gaussian bump, from which the path drifts to a goal by accumulated noise. Both learn from the
same number of steps, and each acts with single draws of its policy (no best-of-M). Expected (three
minutes, two CPU cores):

    SDAC: share of episodes that end at each goal ['0.18', '0.28', '0.23', '0.30']
    SAC: share of episodes that end at each goal ['0.20', '0.28', '0.33', '0.18']

The figure is ``out/multi_goal.png``: 200 episodes of each agent, and below them 2,000 actions that
each policy draws at the very centre.
"""

import sys
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np

import rl

GOALS = np.array([[5.0, 0.0], [-5.0, 0.0], [0.0, 5.0], [0.0, -5.0]])


class MultiGoal(gym.Env):
    """A point with bounded velocity, paid by the squared way to the nearest goal."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-7.0, 7.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        """Near the centre."""
        super().reset(seed=seed)
        self.position = self.np_random.normal(0.0, 0.1, 2)
        self.steps = 0
        return self.position.astype(np.float32), {}

    def step(self, action):
        """Move by the action."""
        self.position = np.clip(self.position + action, -7.0, 7.0)
        self.steps += 1
        distance = np.linalg.norm(GOALS - self.position, axis=1).min()
        reward = -0.1 * distance**2 - 0.3 * float(np.square(action).sum())
        there = bool(distance < 1.0)
        if there:
            reward += 10.0
        observation = self.position.astype(np.float32)
        return observation, reward, there, self.steps >= 30, {"goal": int(there)}


def episodes(agent, count=200):
    """Paths of an agent that draws from its policy."""
    paths = []
    for i in range(count):
        env = MultiGoal()
        observation, _ = env.reset(seed=i)
        path, over = [observation], False
        while not over:
            action, _ = agent.predict(observation)
            observation, _, terminated, truncated, _ = env.step(action)
            path.append(observation)
            over = terminated or truncated
        paths.append(np.array(path))
    return paths


def shares(paths):
    """How often each goal was reached."""
    ends = np.array([path[-1] for path in paths])
    distance = np.linalg.norm(ends[:, None] - GOALS, axis=-1)
    return [(distance[:, i] < 1.0).mean() for i in range(4)]


smoke = "--smoke" in sys.argv
steps = 400 if smoke else 8000
options = {
    "num_envs": 1,
    "total_steps": steps,
    "warmup_steps": steps // 8,
    "updates_per_step": 0.5,
    "width": 32 if smoke else 128,
    "eval_every": 0,
    "discount": 0.95,
    "critic_layer_norm": False,
}
sac = {  # the same of stable-baselines3
    "total_steps": steps,
    "learning_starts": steps // 8,
    "train_freq": 2,
    "policy_kwargs": {"net_arch": [options["width"]] * 3},
    "eval_every": 0,
    "gamma": options["discount"],
}
agents = {
    "SDAC": rl.train_sdac(
        MultiGoal, temperature=1.0, temperature_rule="fixed", num_draws=32, seed=0, **options
    ),
    "SAC": rl.train("sac", MultiGoal, seed=0, **sac),
}
fig, axes = plt.subplots(2, 2, figsize=(8, 8), layout="constrained")
for column, (name, agent) in zip(axes.T, agents.items(), strict=True):
    paths = episodes(agent, 20 if smoke else 200)
    for path in paths:
        column[0].plot(*path.T, color="tab:blue", alpha=0.15, lw=1)
    column[0].scatter(*GOALS.T, color="tab:red", zorder=3)
    column[0].set(title=name, xlim=(-7, 7), ylim=(-7, 7), aspect="equal")
    actions, _ = agent.predict(np.zeros((2000, 2)))
    column[1].scatter(*actions.T, s=3, alpha=0.4)
    column[1].set(title=f"{name}: actions at the centre", aspect="equal")
    column[1].set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    found = shares(paths)
    print(f"{name}: share of episodes that end at each goal", [f"{s:.2f}" for s in found])
Path("out").mkdir(exist_ok=True)
fig.savefig("out/multi_goal.png", dpi=80)
print("out/multi_goal.png")
