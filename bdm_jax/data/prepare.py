"""Any source as a prepared TFDS set: `python -m bdm_jax.data.prepare SOURCE OUT [--language zh ...] [--beam -- ...]`.

Without --beam, this process writes the records one after the other. With it, a Beam pipeline does: on this machine or,
with Beam's own options after --, on Dataflow, Flink or Spark.
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
    """Prepare the set and print how many records were written and how many were skipped, by cause."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    own, beam_options = arguments[:split], arguments[split + 1 :]
    parser = argparse.ArgumentParser(prog="python -m bdm_jax.data.prepare", description=__doc__.split(":")[0])
    parser.add_argument("source", help="records: TFDS folder, .tar or .array_record files (or a pattern), image folder")
    parser.add_argument("out", help="folder that the set is written to, as image_text/1.0.0")
    parser.add_argument("--beam", action="store_true", help="use a Beam pipeline; its options follow --")
    parser.add_argument("--cache", type=Path, help="folder for the index of tar shards (default: beside the shards)")
    add_filters(parser)
    arguments = parser.parse_args(own)
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
    counts = "; left out: " + ", ".join(f"{n} {cause}" for cause, n in sorted(builder.left_out.items()))
    skipped = " (left out: see Beam's counters)" if arguments.beam else counts if builder.left_out else ""
    print(f"{builder.info.splits['train'].num_examples} records in {builder.data_dir}{skipped}")
    return 0


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `Filters`."""
    parser.add_argument("--language", choices=("zh", "en"), help="keep only captions in this language")
    parser.add_argument("--shortest", type=int, default=Filters.shortest, help="minimum caption length in characters")
    parser.add_argument("--longest", type=int, default=Filters.longest, help="maximum caption length in characters")
    parser.add_argument("--aesthetic", type=float, help="minimum aesthetic score")
    parser.add_argument("--side", type=int, default=Filters.side, help="minimum length of the shorter side in pixels")


def filters_of(arguments: argparse.Namespace) -> Filters:
    """The `Filters` from the options of `add_filters`."""
    return Filters(**{field.name: getattr(arguments, field.name) for field in fields(Filters)})


def _need_beam() -> None:
    try:
        import apache_beam  # noqa: F401
    except ImportError as error:
        raise UserError(f"--beam needs the package apache-beam: pip install apache-beam ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
