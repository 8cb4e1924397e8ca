"""Names of sweeps: those that are made, and those that are refused."""

import re

import pytest

from pipelines.config.recipe import with_values
from pipelines.config.schema import Config
from pipelines.sweeps.records import SweepOptions
from pipelines.sweeps.sweep import default_name, resume_sweep


@pytest.mark.parametrize(
    ("space", "part"),
    [("base", "base"), ("base+sgar", "base-sgar"), ("base+../my spaces/a b.py", "base-a-b"), ("/x/mine.py", "mine")],
)
def test_a_sweep_is_named_by_its_spaces(space: str, part: str) -> None:
    name = default_name(Config(), SweepOptions(space, search="random"))
    assert re.fullmatch(rf"glyphs-{part}-random-\d+-\d+", name)
    assert with_values(Config(), {"name": name}).name == name


def test_what_is_resumed_is_a_name_and_no_path() -> None:
    with pytest.raises(ValueError, match=r"^--resume \.\./x: letters, digits"):
        resume_sweep("../x")
