"""How fast the networks are, beside PyTorch on the same machine: `python -m bdm_jax.bench`."""
