"""A server that existing clients speak to, and the page: `python -m bdm_jax.web` (docs/server.md)."""
