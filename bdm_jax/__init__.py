"""bdm_jax: the Bridge Diffusion Model in JAX.

A frozen English Stable-Diffusion backbone and a trainable branch that reads another language (Chinese first).
Import what you need from its rooms: `bdm_jax.pipeline`, `bdm_jax.generate`, `bdm_jax.models`, `bdm_jax.diffusion`.
"""
