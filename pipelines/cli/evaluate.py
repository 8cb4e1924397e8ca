"""`dml evaluate`: test metrics of a trained model."""

from pipelines.cli.arguments import Json, KeyValues, Run
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.cli.tables import describe_evaluation
from pipelines.console import messages


def evaluate(run: Run, assignments: KeyValues = None, as_json: Json = False) -> None:
    """Test metrics of a trained model, on its own test classes or on other data.

    Example: dml evaluate models:/dml-glyphs/1
    """
    with exit_on_error():
        from pipelines.config.recipe import parse_assignments
        from pipelines.runs.evaluate import evaluate_run

        evaluation = evaluate_run(run, parse_assignments(assignments or []), messages)
    print_result(as_json, evaluation, *describe_evaluation(evaluation))
