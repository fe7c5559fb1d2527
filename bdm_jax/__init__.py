"""bdm_jax: the Bridge Diffusion Model in JAX.

A frozen English Stable-Diffusion backbone and a trainable branch that reads another language (Chinese first).
docs/architecture.md shows the rooms.
"""
