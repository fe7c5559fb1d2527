"""Train one of the runs in configs/: python train.py CONFIG [--steps N] [--any.field VALUE]; `train.py --help` lists
them.
"""

import sys


def main() -> int:
    """Parse the arguments, run, report; 0 when finished or at the end of a leg, 2 for bad input."""
    import tyro

    import configs
    from bdm_jax.errors import UserError
    from convert.files import FileError

    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print("usage: train.py CONFIG [options]\n       train.py CONFIG --help")
        print(f"\nconfigs: {', '.join(configs.names())}")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    try:
        default, fixed = configs.load(arguments[0]), (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
        config = tyro.cli(
            type(default), default=default, args=arguments[1:], prog=f"train.py {arguments[0]}", config=fixed
        )
        from bdm_jax.training.loop import train

        if train(config):
            print(f"finished: {config.run / 'export'}")
        else:
            print("the leg is over: run the same command again to go on")
    except (UserError, FileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
