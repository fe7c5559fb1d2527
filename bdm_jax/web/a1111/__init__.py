"""The web API of A1111's Stable Diffusion web UI, as its clients and plug-ins speak it.

`prompt` and `negative_prompt` are the branch's (Chinese); `english` and `english_negative`, fields of their own or of
`override_settings`, the backbone's. `override_settings` also takes sample.py's settings by name, as
`{"branch_strength": 0.8}`. What is not known, or has no effect here, is named in `info` under `warnings`.
"""

from bdm_jax.web.a1111.routes import router

__all__ = ["router"]
