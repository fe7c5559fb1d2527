"""Which folders are packages, and where: configs/, convert/ and assets/ are installed within bdm_jax.

Everything else is in setup.cfg. No name of ours but bdm_jax appears in site-packages.
"""

from setuptools import find_packages, setup

INSIDE = ("configs", "convert", "assets")

setup(
    packages=[*find_packages(include=["bdm_jax", "bdm_jax.*"]), *(f"bdm_jax.{name}" for name in INSIDE)],
    package_dir={f"bdm_jax.{name}": name for name in INSIDE},
    package_data={
        "bdm_jax.data.emoji": ["*.txt"],
        "bdm_jax.evaluate.claims": ["*.txt"],
        "bdm_jax.web.page": ["*.css"],
        "bdm_jax.assets": ["**/*"],
    },
)
