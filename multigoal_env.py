"""The multi-goal task: a point mass in the plane with several equally good goals, and pictures of what was learned.

From the origin every goal is equally good, so a policy that reaches all of them is multimodal.
"""

from typing import ClassVar

import gymnasium as gym
import numpy as np


class MultiGoalEnv(gym.Env):
    """Point mass in [-7, 7]^2. Action: its velocity in [-1, 1]^2, one unit of time a step. Goals on a circle of radius 5.

    Reward: -30 |a|^2 - (squared distance to the nearest goal) + 10 on arrival. An episode ends within distance 1 of a
    goal; `gymnasium.make` cuts it at 100 steps.
    """

    metadata: ClassVar = {"render_modes": []}

    def __init__(self, num_goals: int = 4):
        angle = 2 * np.pi * np.arange(num_goals) / num_goals
        self.goals = 5.0 * np.stack([np.cos(angle), np.sin(angle)], -1)  # (num_goals, 2)
        self.observation_space = gym.spaces.Box(-7.0, 7.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = 0.1 * self.np_random.standard_normal(2)
        return self.position.astype(np.float32), {}

    def step(self, action):
        action = np.clip(action, -1.0, 1.0).astype(np.float64)
        self.position = np.clip(self.position + action, -7.0, 7.0)
        squared_distance = np.square(self.position - self.goals).sum(-1).min()
        arrived = bool(squared_distance < 1.0)
        reward = -30.0 * np.square(action).sum() - squared_distance + 10.0 * arrived
        return self.position.astype(np.float32), float(reward), arrived, False, {}


gym.register("MultiGoal-v0", MultiGoalEnv, max_episode_steps=100)
