"""Any source as a prepared TFDS set: `python -m bdm_jax.data.prepare SOURCE OUT [--language zh ...] [--beam -- ...]`.

Without --beam, this process writes the records one after the other. With it, a Beam pipeline does: on this machine or,
with Beam's own options after --, on Dataflow, Flink or Spark.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tensorflow_datasets as tfds
import tyro

from bdm_jax import command_line
from bdm_jax.data.builder import ImageText
from bdm_jax.data.select import Filters
from bdm_jax.errors import UserError


@dataclass(frozen=True)
class PrepareArgs:
    """Prepare any source as a TFDS set."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """records: TFDS folder, .tar or .array_record files (or a pattern), image folder"""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """folder that the set is written to, as image_text/1.0.0"""
    beam: bool = False
    """use a Beam pipeline; its options follow --"""
    cache: Path | None = None
    """folder for the index of tar shards (default: beside the shards)"""
    filters: Filters = Filters()


def main(args: Sequence[str] | None = None) -> int:
    """Prepare the set and print how many records were written and how many were skipped, by cause."""
    given = list(sys.argv[1:] if args is None else args)
    split = given.index("--") if "--" in given else len(given)

    def command() -> None:
        asked = command_line.parse(PrepareArgs, given[:split], prog="python -m bdm_jax.data.prepare")
        prepare(asked, beam_options=given[split + 1 :])

    return command_line.run(command)


def prepare(asked: PrepareArgs, beam_options: Sequence[str] = ()) -> None:
    """Write the set and print the counts. Raises UserError for a source that cannot be read, or without Beam."""
    if asked.beam:
        _need_beam()
    builder = ImageText(
        source=asked.source, filters=asked.filters, data_dir=asked.out, cache=asked.cache, beam=asked.beam
    )
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    if asked.beam:
        from apache_beam.options.pipeline_options import PipelineOptions

        config.beam_options = PipelineOptions(list(beam_options))
    builder.download_and_prepare(download_config=config)
    counts = "; left out: " + ", ".join(f"{n} {cause}" for cause, n in sorted(builder.left_out.items()))
    skipped = " (left out: see Beam's counters)" if asked.beam else counts if builder.left_out else ""
    print(f"{builder.info.splits['train'].num_examples} records in {builder.data_dir}{skipped}")


def _need_beam() -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise UserError(f"--beam needs the package apache-beam: pip install apache-beam ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
