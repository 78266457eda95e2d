"""Diffusion-policy agents: the sampler with a learned Q-function in the energy's place.

This room is still empty. It will hold the agents that build on :mod:`rsm_sampler`, together with
their critics, replay memory, training loop and evaluation.
"""

__all__: list[str] = []
