"""The command line: `dml` and its commands, one module each.

Results go to standard output, progress and messages to standard error. Exit codes: 0 done, 1 the run failed, 2 bad
input, 130 stopped by Ctrl-C. Heavy imports wait inside the commands.
"""

import atexit
import os
import sys

import typer

from pipelines.cli import compare, data, demo, embed, evaluate, export, index, recipes, report, submit, train, tune, ui
from pipelines.cli.endings import describe_ending

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train image embeddings that retrieve unseen classes, on one machine or a Ray cluster.",
)
app.add_typer(data.app, name="data")
app.add_typer(index.app, name="index")
for command in (
    *(train.train, evaluate.evaluate, tune.tune, compare.compare, report.report),
    *(embed.embed, demo.demo, export.export, submit.submit, recipes.recipes, recipes.config, ui.ui),
):
    app.command()(command)


def main() -> None:
    """Run a command, and end its process when all that was to be done at its end is done.

    Freeing what was imported, object by object, takes a second where torch is among it; the system does it at once.
    """
    code: str | int | None = 1

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))

    atexit.register(end)  # the first to be registered is called last
    try:
        app()
    except SystemExit as exit_:
        code = exit_.code
        raise
    except BrokenPipeError:  # who reads has read enough: `dml config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (Exception, KeyboardInterrupt) as error:  # beside what commands do, such as printing their results
        code, line = describe_ending(error)
        print(line, file=sys.stderr)
