"""Gaussian moments of image features: Frechet distance, EMA state, leave-one-out rewards.

Owns everything between a batch of features and a Frechet-based reward. Knows nothing of
images, feature networks, actors or runs: pure functions on float64 tensors and frozen
dataclasses.
"""
