"""Any source as a prepared TFDS set: `python -m bdm_jax.data.prepare SOURCE OUT [--language zh ...] [--beam -- ...]`.

Without --beam records are written one after the other by this process; with it a Beam pipeline does the work, on this
machine or, through Beam's own options after --, on Dataflow, Flink or Spark.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import tensorflow_datasets as tfds

from bdm_jax.data.builder import ImageText
from bdm_jax.data.select import Filters
from bdm_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the set and print how many records it has and what was left out."""
    given = list(sys.argv[1:] if argv is None else argv)
    mine, beam_options = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(prog="python -m bdm_jax.data.prepare", description=__doc__.split(":")[0])
    parser.add_argument("source", help="records, as open_source takes them")
    parser.add_argument("out", help="folder below which the set is written (image_text/1.0.0)")
    parser.add_argument("--beam", action="store_true", help="through a Beam pipeline; its options come after --")
    parser.add_argument("--cache", type=Path, help="folder for the index of tar shards")
    add_filters(parser)
    arguments = parser.parse_args(mine)
    try:
        if arguments.beam:
            _need_beam()
        filters = filters_of(arguments)
        options = {"data_dir": arguments.out, "cache": arguments.cache, "beam": arguments.beam}
        builder = ImageText(source=arguments.source, filters=filters, **options)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        if arguments.beam:
            from apache_beam.options.pipeline_options import PipelineOptions

            config.beam_options = PipelineOptions(beam_options)
        builder.download_and_prepare(download_config=config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counted = "; left out: " + ", ".join(f"{n} {cause}" for cause, n in sorted(builder.left_out.items()))
    told = " (left out: see Beam's counters)" if arguments.beam else counted if builder.left_out else ""
    print(f"{builder.info.splits['train'].num_examples} records in {builder.data_dir}{told}")
    return 0


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Options for the fields of `Filters`."""
    parser.add_argument("--language", choices=("zh", "en"), help="only captions written in it")
    parser.add_argument("--shortest", type=int, default=Filters.shortest, help="characters of a caption")
    parser.add_argument("--longest", type=int, default=Filters.longest, help="characters of a caption")
    parser.add_argument("--aesthetic", type=float, help="least aesthetic score")
    parser.add_argument("--side", type=int, default=Filters.side, help="least pixels of the shorter side")


def filters_of(arguments: argparse.Namespace) -> Filters:
    """What was given for `add_filters`."""
    return Filters(**{field.name: getattr(arguments, field.name) for field in fields(Filters)})


def _need_beam() -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise UserError(f"--beam needs the package apache-beam: pip install apache-beam ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
