"""The ``quark`` command: each subcommand is a module, imported when it is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import click

from quark_core import __version__
from quark_core.errors import ExitCode, QuarkError

_COMMANDS = {
    "run": "Quantize a model as a recipe says, evaluate it and write the results.",
    "plan": "Show what a recipe would do to each layer, without doing it.",
    "compare": "Run several recipes or backends on the same data and compare them.",
    "report": "Show a finished run and write its HTML report anew.",
    "list": "List the backends that are installed, and what is wrong with any.",
    "info": "Show what a backend can do.",
    "schema": "Print the JSON schema of a recipe or of a backend's configuration.",
    "init": "Write a commented recipe for a backend.",
    "formats": "List number formats, or show what one makes of some values.",
    "doctor": "Check versions, requirements and kernels.",
}
# A submodule called list would hide the builtin in this namespace.
_MODULES = {"list": "listing"}


class _LazyGroup(click.Group):
    """A group that imports a subcommand when it is needed, and lists them without."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = import_module(f"quark_core.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from quark_core.errors import did_you_mean

            hint = did_you_mean(args[0], _COMMANDS)
            raise click.UsageError(f"no command {args[0]!r}. {hint}".strip(), ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="quark_core %(version)s")
@click.option("--traceback", is_flag=True, help="Show where in the code an error arose.")
def quark(traceback: bool) -> None:
    """Quantize PyTorch models with any backend, from one recipe.

    Exit status: 0 done, 1 the run failed, 2 usage or configuration, 3 a plugin failed, 4 a rule
    matched nothing, 5 an accuracy gate was missed, 6 environment or dependency, 130 interrupted
    (the same command resumes).
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with an :class:`ExitCode`."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(args))


def _run(arguments: list[str]) -> int:
    if not sys.warnoptions:
        # Libraries warn their developers; users get our own sentences. `python -W` shows all.
        import warnings

        warnings.simplefilter("ignore")
    try:
        status = quark.main(args=arguments, prog_name="quark", standalone_mode=False)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: the same command resumes where it stopped", err=True)
        return ExitCode.INTERRUPTED
    except QuarkError as error:
        if "--traceback" in arguments:
            import traceback

            traceback.print_exception(error)
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone, as with `quark list | head -1`.
        sys.stdout = None
        return ExitCode.DONE
    return int(status) if isinstance(status, int) else ExitCode.DONE
