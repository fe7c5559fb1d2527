"""Rebuild the bundled emoji data set: `python -m bdm_jax.data.emoji.render_emoji [--packages DIR] [--out DIR]`."""

import collections
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from bdm_jax import command_line
from bdm_jax.data import records
from bdm_jax.data.emoji import artwork
from bdm_jax.data.emoji.dataset import Emoji
from bdm_jax.errors import UserError
from bdm_jax.paths import EMOJI


@dataclass(frozen=True)
class RenderArgs:
    """Make the bundled emoji set."""

    packages: Path | None = None
    """node_modules folder with the packages (default: fetched by npm)"""
    out: Path = EMOJI
    """folder of the prepared set"""


def main(args: Sequence[str] | None = None) -> int:
    """Fetch the packages unless given, render, replace the prepared files in `--out`, print the counts."""

    def command() -> None:
        asked = command_line.parse(RenderArgs, args, prog="python -m bdm_jax.data.emoji.render_emoji")
        with tempfile.TemporaryDirectory() as work:
            packages = asked.packages or fetch_packages(Path(work))
            build(packages, asked.out, Path(work))
        print(summary(asked.out))

    return command_line.run(command)


def fetch_packages(folder: Path) -> Path:
    """Install the pinned packages of `artwork.VERSIONS` with npm below `folder`; returns the node_modules folder."""
    if shutil.which("npm") is None:
        raise UserError("npm is missing: install Node.js, or give the unpacked packages with --packages FOLDER")
    names = [f"{name}@{version}" for name, version in artwork.VERSIONS.items()]
    command = ["npm", "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", *names]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"npm install of {', '.join(names)} failed: {last}")
    return folder / "node_modules"


def build(packages: Path, out: Path, work: Path) -> None:
    """Prepare the set below `work` and move its files into `out`, replacing an earlier build."""
    builder = Emoji(data_dir=str(work / "prepared"), file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=packages.resolve(), try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    out.mkdir(parents=True, exist_ok=True)
    for stale in [*out.glob("emoji-train.array_record*"), out / "dataset_info.json", out / "features.json"]:
        stale.unlink(missing_ok=True)
    for path in sorted(Path(builder.data_dir).iterdir()):
        copy = _copy_records if ".array_record" in path.name else shutil.copyfile
        copy(path, out / path.name)


def _copy_records(path: Path, to: Path) -> None:
    """Copy with sorted feature keys: TFDS writes them in hash-table order, which differs between runs."""
    reader = array_record_module.ArrayRecordReader(str(path))
    writer = array_record_module.ArrayRecordWriter(str(to), "group_size:1")
    for example in map(tf_example_pb2.Example.FromString, reader.read_all()):
        writer.write(example.SerializeToString(deterministic=True))
    writer.close()
    reader.close()


def summary(folder: Path) -> str:
    """One line per style, one for the concepts and one for the size."""
    source = records.open_source(folder)
    styles, per_concept, zh_only = collections.Counter(), collections.Counter(), set()
    for index in range(len(source)):
        record = source[index]
        styles[record["style"]] += 1
        per_concept[record["id"]] += 1
        if record["zh_only"]:
            zh_only.add(record["id"])
    shared = sum(count >= 2 for count in per_concept.values())
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    lines = [f"{style}: {count} images" for style, count in sorted(styles.items())]
    lines.append(f"{len(per_concept)} concepts, {shared} in at least two styles, {len(zh_only)} zh_only")
    lines.append(f"{megabytes:.1f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
