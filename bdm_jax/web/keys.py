"""Who asks: keys and the names of their owners."""

import hashlib
import hmac
import os
import re
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdm_jax.errors import UserError, short
from bdm_jax.images.decode import read_bytes

VARIABLE = "BDM_JAX_API_KEYS"
_LEAST = 8  # characters of a key
_MAX_FILE = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_KEY = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True)
class Keys:
    """SHA-256 of each key -> its owner's name, "" for one without. No keys: everybody may ask, as the owner ""."""

    owners: tuple[tuple[bytes, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.owners)

    def owner(self, key: str | None) -> str | None:
        """Whose key it is; None for a wrong one. Takes as long for any key of one length."""
        if not self.owners:
            return ""
        given, found = hashlib.sha256((key or "").encode("utf-8", "replace")).digest(), None
        for known, name in self.owners:
            if hmac.compare_digest(given, known):
                found = name
        return found


def parse_keys(texts: Iterable[str]) -> Keys:
    """`KEY`, or `NAME=KEY` for each of several people. Raises UserError, which shows no key."""
    owners: dict[bytes, str] = {}
    for text in texts:
        name, equals, key = text.partition("=")
        if not equals or not key or not _NAME.fullmatch(name):
            name, key = "", text
        if not _KEY.fullmatch(key) or len(key) < _LEAST:
            whose = f"of {name}" if name else f"of {len(text)} characters"
            raise UserError(f"the API key {whose}: write KEY or NAME=KEY, the key of {_LEAST} to 512 plain characters")
        known = hashlib.sha256(key.encode()).digest()
        if known in owners:
            raise UserError(f"the API key of {name or 'nobody'} is there twice: each is to be another")
        owners[known] = name
    names = [name.lower() for name in owners.values()]
    if len(names) > 1 and "" in names:
        raise UserError("several API keys: give each its owner's name, as in NAME=KEY")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two API keys are of {twice[0]}: give each another name")
    return Keys(tuple(owners.items()))


def given_keys(flags: Sequence[str], file: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
    """Those of the command line, of a file with one on each line, and of the environment, between white space.

    Raises UserError for what is no key and for a file that cannot be read.
    """
    texts = [*flags, *environment.get(VARIABLE, "").split()]
    if file is not None:
        try:
            lines = read_bytes(file, _MAX_FILE, "file of keys").decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: no text in UTF-8") from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise UserError(f"{short(str(file))}: no keys in it")
        texts += found
    return parse_keys(texts)


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key in a request's headers (names in lower case): as a bearer's, as a password, or as X-API-Key."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except ValueError:
            return None
    return headers.get("x-api-key")
