"""Where the files bundled with a checkout lie, and reading those that a user names."""

from pathlib import Path

from bdm_jax.errors import UserError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMO = ASSETS / "demo"
EMOJI = ASSETS / "emoji"
TOKENIZERS = ASSETS / "tokenizers"


def read_bytes(path: Path, most: int, kind: str) -> bytes:
    """A user's file of at most so many bytes. Raises UserError that names it where it cannot be read or is larger."""
    try:
        with path.open("rb") as file:
            # `read` reserves what is asked for: as much as there is; of a pipe, which tells no size, up to the limit
            data = file.read((min(path.stat().st_size, most) or most) + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) > most:
        raise UserError(f"{path}: larger than {most >> 20} MiB, no {kind}")
    return data
