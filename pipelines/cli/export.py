"""`dml export`: a model that leaves."""

import json
from typing import Annotated

import typer
from rich.console import Console

from pipelines.cli.arguments import Json
from pipelines.cli.endings import exit_on_error
from pipelines.console import messages


def export(
    run: Annotated[str, typer.Argument(help="An MLflow run id, a checkpoint folder, or models:/NAME@ALIAS")],
    to: Annotated[str, typer.Option(metavar="torch|onnx", help="torch: a program of torch.export.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="A new .pt2 or .onnx; a .json comes with it.")],
    as_json: Json = False,
) -> None:
    """A trained model as a file for other programs, compared with the checkpoint on 256 pictures before it is kept.

    Example: dml export models:/dml-glyphs/1 --to onnx --out model.onnx
    """
    with exit_on_error():
        from pipelines.serving.export import export_model

        made = export_model(run, to, out, messages)
    checked = [f"{made[kind]} {kind.replace('_', ' ')}" for kind in ("test_pictures", "random_pictures") if made[kind]]
    largest = ", ".join(f"{name} {value:.1e}" for name, value in made["largest_difference"].items())
    told = f"{made['file']}  ({made['bytes'] / 1e6:.1f} MB)\nlargest difference on {' and '.join(checked)}: {largest}"
    (messages if as_json else Console()).print(told, highlight=False, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(made))
