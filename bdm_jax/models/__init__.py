"""The networks, each declared once with flax.nnx and used as `(config, params)` and a pure function."""
