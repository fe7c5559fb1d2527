"""Where the files bundled with a checkout lie."""

from pathlib import Path

ASSETS = Path(__file__).resolve().parent.parent / "assets"
DEMO = ASSETS / "demo"
EMOJI = ASSETS / "emoji"
TOKENIZERS = ASSETS / "tokenizers"
