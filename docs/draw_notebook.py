"""Make python.ipynb of python.md: `python docs/draw_notebook.py`. A test holds that it was done, and runs it."""

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "python.md"


def notebook(text: str) -> dict[str, Any]:
    """Return a page as a notebook of Jupyter: its blocks of Python are cells of code, without outputs."""
    parts = re.split(r"(?ms)^```python\n(.*?)\n```$", text)  # by turns text and code
    cells = [_cell(number, part) for number, part in enumerate(parts) if part.strip()]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def _cell(number: int, text: str) -> dict[str, Any]:
    cell: dict[str, Any] = {"id": f"part-{number}", "metadata": {}, "source": text.strip().splitlines(keepends=True)}
    if number % 2 == 0:
        return {"cell_type": "markdown", **cell}
    return {"cell_type": "code", "execution_count": None, "outputs": [], **cell}


def draw() -> str:
    """Return the text of python.ipynb."""
    return json.dumps(notebook(PAGE.read_text()), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.with_suffix(".ipynb").write_text(draw())
