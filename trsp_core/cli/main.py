"""The shell: `python -m trsp_core COMMAND`. Each command is a module of `cli.commands`, loaded when it is called."""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from trsp_core import __version__
from trsp_core.cli.command import EPILOG, HELP_FLAGS, SUMMARIES
from trsp_core.cli.output import tell
from trsp_core.errors import TrspError

PROGRAM = "python -m trsp_core"


class LazyGroup(click.Group):
    """Commands of which names and summaries are known, and nothing else is loaded until one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command, list[str]]:
        name, _, words = super().resolve_command(ctx, args)
        return name, importlib.import_module(f"trsp_core.cli.commands.{name}").main, words


shell = LazyGroup(
    commands=[*(click.Command(name, short_help=summary) for name, summary in SUMMARIES.items()),
              click.Command("workbench", hidden=True)],
    help="Prune whole layers out of a language model by TRSP, and watch it happen.",
    epilog=EPILOG,
    no_args_is_help=False,
    context_settings=HELP_FLAGS,
)  # fmt: skip
click.version_option(__version__, message=f"trsp-explorer {__version__}")(shell)


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 done, 2 bad input, 3 failed, 130 stopped."""
    try:
        with shell.make_context(PROGRAM, list(sys.argv[1:] if words is None else words)) as context:
            return shell.invoke(context) or 0
    except click.exceptions.Exit as end:  # of --help and --version
        return end.exit_code
    except click.UsageError as error:
        tell(*([error.ctx.get_usage()] if error.ctx else []), f"{PROGRAM}: error: {error.format_message()}")
        return 2
    except TrspError as error:
        tell(*(f"{problem.message} {problem.remedy}" for problem in error.problems or (error,)))
        return 2
    except KeyboardInterrupt:
        tell("Stopped.")
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
