"""Train one of the runs in configs/: python train.py CONFIG [--steps N] [--any.field VALUE]; `train.py --help` lists
them, `train.py CONFIG --explain` says where its arrays would lie and trains nothing.
"""

import sys
from collections.abc import Sequence
from functools import partial

from bdm_jax import command_line
from bdm_jax.errors import UserError

SESSION_OVER = 3
_STOPPED = "interrupted outside of the steps, with nothing to save: run the same command again"


def main(args: Sequence[str] | None = None) -> int:
    """Parse the arguments, run, report. Returns 0 when finished, 2 when it cannot go on (one line says why), 3 at the
    end of a session, by --minutes or a signal: the same command resumes; 130 after Ctrl-C outside of the steps.
    """
    return command_line.run(partial(_train, list(sys.argv[1:] if args is None else args)), stopped=_STOPPED)


def _train(arguments: list[str]) -> int:
    from bdm_jax import configs

    name = command_line.called("train.py")
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {name} CONFIG [options]\n       {name} CONFIG --explain\n       {name} CONFIG --help")
        print(f"\nconfigs: {', '.join(configs.names())}")
        return 0
    if not arguments or arguments[0].startswith("-"):
        instead = f" in place of {arguments[0]}" if arguments else ""
        raise UserError(f"give a config first{instead}, as in {name} CONFIG --help: {', '.join(configs.names())}")
    import tyro

    from bdm_jax.runtime.processes import initialize, is_first

    only_explain = "--explain" in arguments
    flags = [argument for argument in arguments[1:] if argument != "--explain"]
    default, marks = configs.load(arguments[0]), (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    config = command_line.parse(type(default), flags, default=default, prog=f"{name} {arguments[0]}", config=marks)
    from bdm_jax.training.config import settle
    from bdm_jax.training.loop import explain, train
    from bdm_jax.training.remote import shown

    initialize()
    config = settle(config, default)
    if only_explain:
        print(*explain(config), sep="\n")
        return 0
    finished = train(config)
    if is_first():
        over = "the session is over: run the same command again to resume"
        print(f"finished: {shown(config.run / 'export')}" if finished else over)
    return 0 if finished else SESSION_OVER
