"""Train one of the runs in configs/: python train.py CONFIG [--steps N] [--any.field VALUE]; `train.py --help` lists
them, `train.py CONFIG --explain` says where its arrays would lie and trains nothing.
"""

import sys

SESSION_OVER = 3


def main() -> int:
    """Parse the arguments, run, report. Returns 0 when finished, 2 when it cannot go on (one line says why), 3 at the
    end of a leg, by --minutes or a signal: the same command goes on.
    """
    import tyro

    import configs
    from bdm_jax.errors import UserError
    from bdm_jax.runtime.processes import initialize, is_first

    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        print("usage: train.py CONFIG [options]\n       train.py CONFIG --explain\n       train.py CONFIG --help")
        print(f"\nconfigs: {', '.join(configs.names())}")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    only_explain = "--explain" in arguments
    arguments = [argument for argument in arguments if argument != "--explain"]
    try:
        default, fixed = configs.load(arguments[0]), (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
        config = tyro.cli(
            type(default), default=default, args=arguments[1:], prog=f"train.py {arguments[0]}", config=fixed
        )
        from bdm_jax.training.loop import explain, train

        initialize()
        if only_explain:
            for line in explain(config):
                print(line)
            return 0
        finished = train(config)
        if is_first():
            over = "the leg is over: run the same command again to go on"
            print(f"finished: {config.run / 'export'}" if finished else over)
        return 0 if finished else SESSION_OVER
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
