"""What a training run needs on a slice of chips, before it is rented: `python -m bdm_jax.plan`."""
