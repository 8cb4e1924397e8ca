"""The command line: `dml` and its commands, one module each.

Results go to standard output, progress and messages to standard error. Exit codes: 0 done, 1 the run failed, 2 bad
input, 130 stopped by Ctrl-C. Heavy imports wait inside the commands.
"""

import typer

from pipelines.cli import compare, data, demo, embed, evaluate, export, index, recipes, report, submit, train, tune, ui

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
