"""Does a model draw what its prompts say? `python -m bdm_jax.evaluate`, and what plug-ins and approximations cost."""
