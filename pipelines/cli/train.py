"""`dml train`: one run."""

import json

from rich.console import Console

from pipelines.cli import tables
from pipelines.cli.arguments import Assignments, Json, config_of
from pipelines.cli.endings import exit_on_error
from pipelines.console import messages


def train(arguments: Assignments = None, as_json: Json = False) -> None:
    """Train, validate on held-out classes, test once at the end, and log it all to MLflow.

    Example: dml train glyphs workers=2 epochs=5 loss.name=multi_similarity name=first
    The same name again continues a run that was interrupted.
    """
    hint = ""
    with exit_on_error():
        config = config_of(arguments)
        if config.name:
            hint = "the same command again continues it"
    with exit_on_error(hint):
        from pipelines.runs.train import run_training

        outcome = run_training(config, messages)
    output = messages if as_json else Console()
    tables.trained(output, outcome)
    if as_json:
        print(json.dumps(outcome._asdict()))
