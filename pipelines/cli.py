"""The command line. Results go to standard output, progress and messages to standard error.

Exit codes: 0 done, 1 the run failed, 2 bad input, 130 stopped by Ctrl-C. Heavy imports wait for the command.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipelines import cli_data, cli_demo, cli_export, cli_report, cli_search, cli_submit, tables
from pipelines.console import Assignments, Json, in_words, messages, stop

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Train image embeddings that retrieve unseen classes, on one machine or a Ray cluster.",
)
app.add_typer(cli_data.app, name="data")
app.command()(cli_search.embed)
app.add_typer(cli_search.app, name="index")
app.command()(cli_report.report)
app.command()(cli_demo.demo)
app.command()(cli_export.export)
app.command()(cli_submit.submit)


def _config(arguments: list[str] | None) -> Any:
    """RECIPE (default glyphs) and key=value in any order."""
    from pipelines.recipe import load

    arguments = arguments or []
    named = [a for a in arguments if "=" not in a]
    if len(named) > 1:
        raise ValueError(f"one recipe, not {len(named)}: {', '.join(named)}")
    return load(named[0] if named else "glyphs", [a for a in arguments if "=" in a])


@app.command()
def train(arguments: Assignments = None, as_json: Json = False) -> None:
    """Train, validate on held-out classes, test once at the end, and log it all to MLflow.

    Example: dml train glyphs workers=2 epochs=5 loss.name=multi_similarity name=first
    The same name again continues a run that was interrupted.
    """
    hint = ""
    with in_words():
        config = _config(arguments)
        if config.name:
            hint = "the same command again continues it"
    with in_words(hint):
        from pipelines import jobs

        outcome = jobs.train(config, messages)
    output = messages if as_json else Console()
    tables.trained(output, outcome)
    if as_json:
        print(json.dumps(outcome._asdict()))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="An MLflow run id, a checkpoint folder, or models:/NAME@ALIAS")],
    assignments: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Test metrics of a trained model, on its own test classes or on other data.

    Example: dml evaluate models:/dml-glyphs/1 workers=2
    """
    with in_words():
        from pipelines import jobs
        from pipelines.recipe import assigned

        found = jobs.evaluate(run, assigned(assignments or []), messages)
    output = messages if as_json else Console()
    tables.evaluated(output, found)
    if as_json:
        print(json.dumps(found))


@app.command()
def tune(
    arguments: Assignments = None,
    space: Annotated[str | None, typer.Option(help="base, iaa, sgar, namr, all, joined by +; or FILE.py")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Points to try; of a grid, points on each range.")] = 32,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at a time. Default: as many as fit.")] = None,
    search: Annotated[
        str | None, typer.Option(help="optuna (TPE), random or grid", show_default="optuna; with pbt random")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="asha: what falls behind is ended early; none; pbt: settings change on the way")
    ] = "asha",
    folds: Annotated[int, typer.Option(min=1, help="Train each point with so many choices of validation classes.")] = 1,
    final_seeds: Annotated[int, typer.Option(min=1, help="Tested runs of the winner, and of the defaults.")] = 5,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Go on with a sweep that was interrupted.")] = None,
    as_json: Json = False,
) -> None:
    """Search settings on validation classes; then test the winner and the defaults once, over the same seeds.

    Example: dml tune grocery --space namr --samples 32 data.root=GroceryStoreDataset name=sweep
    """
    with in_words():
        from pipelines import tune as t

        if resume:
            given = arguments or ["storage=runs"]
            if space or len(given) > 1 or not given[0].startswith("storage="):
                raise ValueError(f"--resume {resume} takes all else from the sweep; only storage=FOLDER may go with it")
            go = partial(t.resume, resume, given[0].removeprefix("storage="))
            hint = f"dml tune --resume {resume} goes on"
        else:
            if space is None:
                raise ValueError("--space NAME is needed: base, iaa, sgar, namr, all, joined by +; or FILE.py")
            # Trials beside each other, not workers: results do not depend on it, and nothing is sent between them.
            given = [a for a in arguments or [] if a.startswith("workers=")]
            config = _config([*(arguments or []), *([] if given else ["workers=1"])])
            search = search or ("random" if schedule == "pbt" else "optuna")
            options = t.Options(space, samples, concurrent, search, schedule, folds, final_seeds)
            go = partial(t.begin, config, options)
            hint = "dml tune --resume NAME goes on, NAME being the sweep's"
    with in_words(hint):
        outcome = go(messages)
    output = messages if as_json else Console()
    tables.tuned(output, outcome)
    if as_json:
        print(json.dumps(outcome._asdict()))


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="MLflow run ids and experiments", metavar="RUN|EXPERIMENT...")],
    baseline: Annotated[
        str | None, typer.Option(help="Part of a config's label, or a run of it. Default: the one without methods.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Default: test/recall_at_1 and test/map_at_r.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with every run as a point.")] = None,
    log: Annotated[bool, typer.Option(help="Keep the page and the numbers in MLflow.")] = True,
    as_json: Json = False,
) -> None:
    """Whether a gain is real: mean, interval and paired difference over seeds, by config.

    Example: dml compare glyphs --baseline method=[] --html gain.html
    """
    from pipelines import compare as c

    with in_words():
        from pipelines.tracking import default_uri, keep_page, prepare, read_runs

        uri = default_uri(Path.cwd())
        prepare(uri)
        found = c.comparison(read_runs(uri, runs), " ".join(runs), baseline, metric or c.METRICS)
        lines = [line._asdict() for line in found.lines]
        report: dict[str, Any] = {"baseline": found.baseline, "warnings": found.warnings, "lines": lines}
        if html:
            html.write_text(found.page)
        if log:
            texts = {"comparison.html": found.page, "comparison.json": json.dumps(report, indent=1)}
            report["run_id"] = keep_page(uri, found.experiment, "comparison", texts)
    output = messages if as_json else Console()
    tables.comparison(output, found.baseline, lines, found.warnings)
    if as_json:
        print(json.dumps(report))


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes. Example: dml recipes"""
    from pipelines.recipe import RECIPES
    from pipelines.recipe import recipes as names

    lines = {name: (RECIPES / f"{name}.yaml").read_text().splitlines()[0].lstrip("# ") for name in names()}
    if as_json:
        print(json.dumps(lines))
    else:
        for name, line in lines.items():
            print(f"{name:<16} {line}")


@app.command()
def config(arguments: Assignments = None, as_json: Json = False) -> None:
    """Print the full config of a recipe with key=value on top, checked. Example: dml config glyphs batch.images=8"""
    with in_words():
        from pipelines.recipe import to_yaml

        made = _config(arguments)
    print(json.dumps(made.model_dump(exclude_none=True)) if as_json else to_yaml(made), end="\n" if as_json else "")


@app.command()
def ui(port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 5000) -> None:
    """Serve MLflow's page over the runs of this folder. Example: dml ui --port 5001"""
    with in_words():
        from pipelines.tracking import default_uri, prepare, shown

        uri = default_uri(Path.cwd())
        if uri.startswith("http"):
            print(f"the runs are on the server {shown(uri)}")
            return
        prepare(uri)
    messages.print(f"MLflow on http://127.0.0.1:{port}  (Ctrl-C ends it)")
    command = ["server", "--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with in_words():
        code = subprocess.run([sys.executable, "-m", "mlflow", *command]).returncode
        if code:
            stop(1, f"failed: MLflow's server ended with {code}; is port {port} taken? --port chooses another")


if __name__ == "__main__":
    app()
