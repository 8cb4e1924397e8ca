"""`dml export`: a trained model as a file for other programs."""

from typing import Annotated

import typer

from pipelines.cli.arguments import Json, Run
from pipelines.cli.endings import exit_on_error, print_result
from pipelines.console import messages, stage


def export(
    run: Run,
    to: Annotated[str, typer.Option(metavar="torch|onnx", help="torch: a program of torch.export.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="A new .pt2 or .onnx; a .json comes with it.")],
    as_json: Json = False,
) -> None:
    """A trained model as a file for other programs, compared with the checkpoint on 256 pictures before it is kept.

    Example: dml export models:/dml-glyphs/1 --to onnx --out model.onnx
    """
    with exit_on_error():
        with stage(messages, "starting"):
            from pipelines.serving.export import export_model
        facts = export_model(run, to, out, messages)
    compared_on = [
        f"{facts[key]} {key.replace('_', ' ')}" for key in ("test_pictures", "random_pictures") if facts[key]
    ]
    differences = ", ".join(f"{name} {value:.1e}" for name, value in facts["largest_difference"].items())
    print_result(
        as_json,
        facts,
        f"{facts['file']}  ({facts['bytes'] / 1e6:.1f} MB)",
        f"largest difference on {' and '.join(compared_on)}: {differences}",
    )
