"""`dml train`: one run."""

from typing import Annotated

import typer

from pipelines.cli.arguments import Assignments, Json, load_config
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.cli.tables import describe_phases, describe_training
from pipelines.console import messages, stage
from pipelines.environment import STARTED

Profile = Annotated[bool, typer.Option("--profile", help="Print where the seconds went, phase by phase.")]

SwitchGradients = Annotated[
    bool, typer.Option("--switch-gradients", help="Go on with a run that was begun with other `gradients`.")
]


def train(
    arguments: Assignments = None,
    as_json: Json = False,
    profile: Profile = False,
    switch_gradients: SwitchGradients = False,
) -> None:
    """Train, validate on held-out classes, test once at the end, and log it all to MLflow.

    Example: dml train glyphs epochs=5 loss.name=multi_similarity name=first
    The same name again continues a run that was interrupted.
    """
    hint = ""
    with exit_on_error():
        from pipelines.cluster.address import require_cluster

        config = load_config(arguments)
        require_cluster()  # before imports that take seconds
        if config.name:
            hint = "the same command again continues it"
    with exit_on_error(hint):
        from pipelines.tracking.process import tracking_process

        with tracking_process() as tracker:
            with stage(messages, "starting"):
                from pipelines.runs.train import run_training

            outcome = run_training(
                config, messages, tracker=tracker, started=STARTED, switch_gradients=switch_gradients
            )
    table = [describe_phases(outcome)] if profile else []
    print_result(as_json, outcome._asdict(), *describe_training(outcome), *table)
