import subprocess
import sys
from pathlib import Path

import pytest

from dml_core import base_losses
from pipelines.config.identity import require_same
from pipelines.config.recipe import load_recipe, parse_config, parse_stored_config, recipe_names, to_yaml
from pipelines.config.sections import KNOWN_LOSSES


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipe_builds_and_survives_a_round_trip(recipe: str, tmp_path) -> None:
    config = load_recipe(recipe, [f"data.root={tmp_path}"] if recipe != "glyphs" else [])
    path = tmp_path / "again.yaml"
    path.write_text(to_yaml(config))
    assert load_recipe(str(path), []) == config
    assert parse_config(config.model_dump(exclude_none=True)) == config


@pytest.mark.parametrize("method", ["iaa", "sgar", "namr"])
def test_paper_recipes_make_their_learners(method: str) -> None:
    from pipelines.models.build import build_learner
    from pipelines.training.optimizer import build_optimizer

    networks = {"iaa": "resnet50", "sgar": "googlenet", "namr": "resnet50"}
    for data in ("cub", "cars", "sop", "inshop", "vehicleid"):
        config = load_recipe(f"{data}-{method}", ["data.root=somewhere", "data.fold=1"])
        assert config.method == [method] and config.data.name == data and config.backbone.name == networks[method]
    learner = build_learner(config, 20, read_weights=False)
    assert getattr(learner, method) is not None and learner.head[1].out_features == 512
    assert len(build_optimizer(config, learner).param_groups) > 1


def test_recipes_of_ones_own_extend_ours(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: [cub-iaa]\nepochs: 3\niaa: {draws: 5}\ndata: {root: x}\n")
    config = load_recipe(str(tmp_path / "mine.yaml"), ["seed=4"])
    assert (config.epochs, config.iaa.draws, config.iaa.neighbors, config.seed) == (3, 5, 25, 4)
    (tmp_path / "bad.yaml").write_text("extends: [cubb]\n")
    with pytest.raises(ValueError, match="it extends cubb, which is not there"):
        load_recipe(str(tmp_path / "bad.yaml"), [])


def test_default_recipe_is_glyphs_with_iaa() -> None:
    config = load_recipe("glyphs", [])
    assert config.data.name == "glyphs" and config.method == ["iaa"] and config.iaa is not None


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["optimizer.lrr=1"], r"unknown key optimizer\.lrr; did you mean optimizer\.lr\?"),
        (["worker=2"], r"unknown key worker; did you mean workers\?"),
        (["epochs=many"], r"epochs=many: .*integer"),
        (["epochs=0"], r"epochs=0: .*greater than or equal to 1"),
        (["precision=float16"], r"precision=float16: .*'float32', 'bf16' or 'float64'"),
        (["loss.name=tripplet"], r"tripplet.*triplet"),
        (["loss.bas=0.1"], r"^loss\.bas: bas is no argument of multi_similarity; did you mean base\?"),
        (["loss.name=VICRegLoss"], r"^loss\.name=VICRegLoss: needs pairs of views"),
        (["loss.name=margin", "loss.num_classes=9"], r"^loss\.num_classes cannot be set: .*loss\.beta_per_class=false"),
        (
            ["loss.name=NTXentLoss", "loss.temperature=0"],
            r"^loss\.name=NTXentLoss .*=0 cannot be computed: it is not fin",
        ),
        (["method=[sgarr]"], r"method\.0=sgarr: .*'sgar'"),
        (["method=[]", "sgar.intensity=0.2"], r"sgar\.\* cannot act"),
        (["optimizer.momentum=0.9"], r"momentum cannot act with optimizer\.name=adamw"),
        (["optimizer.gamma=0.5"], r"gamma cannot act with optimizer\.schedule=cosine"),
        (["data.root=here"], r"root cannot act on data\.name=glyphs"),
        (["data.test_fraction=0.5"], r"cannot act on data\.name=glyphs"),
        (["data.fold=4"], r"fold=4: the 4 folds are numbered from 0"),
        (["data.download=true"], r"download cannot act on data\.name=glyphs"),
        (["data.links=true"], r"links cannot act on data\.name=glyphs"),
        (["data.table=t.csv"], r"table cannot act on data\.name=glyphs"),
        (["data.name=cub", "data.root=s3://b/c"], r"root=s3://b/c: cub is read from a folder"),
        (["data.loader=spark"], r"data\.loader=spark: .*'auto', 'torch' or 'ray'"),
        (["data.name=grocery"], r"root is needed for data\.name=grocery"),
        (["workers=5", "batch.slices=4"], r"workers=5: .* batch\.slices=4 parts of the global batch of 128"),
        (["workers=2:200"], r"workers=2:200: more workers than slices: .* batch\.slices=128 parts"),
        (["workers=4:2"], r"workers=4:2: the first number"),
        (["workers=none"], r"workers=none: "),
        (["name=a/b"], r"name=a/b: "),
        (["epochs"], r"'epochs' is not key=value"),
        (["batch=3", "batch.images=2"], r"batch has a value of its own"),
        (["batch.slices=3"], r"batch\.slices=3 does not divide the global batch of 128"),
        (["iaa.start=1"], r"iaa\.start=1: .*less than 1"),
        (["method=[iaa]", "iaa.covariance=half"], r"iaa\.covariance=half: .*'diag' or 'full'"),
        (["method=[namr]", "namr.centers=9"], r"namr\.centers=9: .*less than or equal to 8"),
        (["method=[namr]", "namr.centres=3"], r"unknown key namr\.centres; did you mean namr\.centers\?"),
        (["method=[sgar,sgar]"], r"method: \[sgar, sgar\] names a method twice"),
        (["changes.6.iaa.intensity=0.2"], r"changes\.6 cannot act: .* epochs=6"),
        (["changes.2.iaa.intensty=0.2"], r"changes\.2: iaa\.intensty=0\.2"),
        (["method=[sgar]", "changes.2.sgar.count=1"], r"changes\.2: sgar\.count=1: .*greater than or equal to 2"),
        (["changes.2.sgar.intensity=1"], r"changes\.2: sgar\.intensity cannot become 1"),
        (["changes.2.optimizer.lr=1"], r"changes\.2: optimizer\.lr cannot become 1"),
        (["method=[sgar]", "changes.2.sgar.max_gap=null"], r"changes\.2: sgar\.max_gap cannot become None"),
        (["changes.2=3"], r"changes: .* is not \{EPOCH: \{KEY: VALUE\}\}"),
        (["method=[namr]", "changes.2.namr.rerank=9"], r"changes\.2: namr\.rerank cannot become 9"),
        (["backbone.frozen=true", "data.augment=crop"], r"data\.augment=crop cannot act with backbone\.frozen=true"),
        (["data.folds=3"], r"data: folds=3 cannot act without data\.fold=NUMBER"),
        (["data.fold=1", "data.validation_fraction=0.3"], r"validation_fraction cannot act with data\.fold=1"),
        (["metrics=[nmii]"], r"metrics: nmii: there is no such metric; did you mean nmi\?"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(assignments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load_recipe("glyphs", assignments)
    assert "\n" not in str(refusal.value)


def test_changes_hold_from_the_end_of_their_epoch(tmp_path) -> None:
    config = load_recipe(
        "glyphs",
        ["method=[sgar]", "changes.4.loss.alpha=3", "changes.2.sgar.intensity=0.2", "changes.4.sgar.intensity=0.3"],
    )
    assert [config.at(epoch).sgar.intensity for epoch in range(6)] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert config.at(3) == load_recipe("glyphs", ["method=[sgar]", "sgar.intensity=0.2"]) and config.at(
        4
    ).loss.arguments == {"alpha": 3}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_recipe(str(tmp_path / "again.yaml"), []) == config
    assert config.flat()["changes.4.sgar.intensity"] == 0.3


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean glyphs"):
        load_recipe("glyps", [])
    with pytest.raises(ValueError, match="no such file"):
        load_recipe("mine.yaml", [])


def test_a_choice_takes_the_recipes_settings_of_the_other_with_it() -> None:
    assert load_recipe("glyphs", ["method=[]"]).iaa is None
    config = load_recipe("grocery", ["data.root=x", "loss.name=proxy_anchor"])
    assert config.loss.arguments == {}
    assert load_recipe("grocery", ["data.name=glyphs"]).data.root is None


def test_a_users_choice_takes_the_recipes_contrary_one_with_it(tmp_path) -> None:
    """What the recipe says of what the user's own choice excludes is dropped; the rest of its section stays."""
    frozen = load_recipe("glyphs", ["backbone.frozen=true"])
    assert frozen.data.augment is None and frozen.data.image_size == 32
    assert parse_config(frozen.to_dict()) == frozen and "data.augment" not in frozen.flat()
    (tmp_path / "mine.yaml").write_text("data: {validation_fraction: 0.3}\n")
    assert load_recipe(str(tmp_path / "mine.yaml"), ["data.fold=1"]).data.fold_of == (1, 4)
    (tmp_path / "mine.yaml").write_text("data: {fold: 1, folds: 3}\n")
    assert load_recipe(str(tmp_path / "mine.yaml"), ["data.validation_fraction=0.3"]).data.fold_of is None


def test_metrics_are_by_default_those_of_the_sets_papers() -> None:
    extra = {
        recipe: load_recipe(recipe, ["data.root=x"]).extra_metrics for recipe in recipe_names() if recipe != "glyphs"
    }
    for recipe, metrics in extra.items():
        assert metrics == (("map", "cmc") if recipe.startswith(("inshop", "vehicleid")) else ()), recipe
    assert load_recipe("inshop-iaa", ["data.root=x", "metrics=[]"]).extra_metrics == ()
    assert load_recipe("glyphs", ["metrics=[ami,cmc,ami]"]).extra_metrics == ("cmc", "ami")


def test_values_are_yaml_1_2() -> None:
    config = load_recipe(
        "glyphs", ["optimizer.lr=1e-4", "workers=1:2", "method=[sgar]", "sgar.max_gap=null", "batch.images=2"]
    )
    assert config.optimizer.lr == 1e-4 and config.worker_range == (1, 2) and config.sgar.max_gap is None


def test_flat_keys_are_dotted() -> None:
    flat = load_recipe("glyphs", ["loss.base=0.2"]).flat()
    assert flat["loss.base"] == 0.2 and flat["batch.images"] == 4 and "data.root" not in flat


def test_a_part_that_is_taken_away_stays_away_in_what_is_stored() -> None:
    config = load_recipe("glyphs", ["loss.miner=null"])
    stored = parse_stored_config(config.model_dump(exclude_none=True))
    assert stored.loss.arguments == {"miner": "none"}
    assert base_losses.build(stored.loss.name, 4, 8, **stored.loss.arguments).miner is None


def test_losses_that_are_known_without_the_library_are_those_of_the_library() -> None:
    assert {*base_losses.SHORT_NAMES, *base_losses.LOSSES} >= KNOWN_LOSSES


@pytest.mark.parametrize(
    "command",
    [
        "config glyphs",
        "config grocery data.root=x",
        "recipes",
        "data list",
        "train glyphs epochz=3",
        "evaluate nothing",
    ],
)
def test_light_commands_import_no_heavy_library(command: str, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pipelines.cli.main import app\n"
        f"sys.argv = ['dml', *{command.split()!r}]\n"
        "try:\n    app()\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'torchvision', 'ray', 'mlflow', 'pandas', 'matplotlib', 'pytorch_metric_learning'}\n"
        "print('imported', sorted(heavy & sys.modules.keys()))\n"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert outcome.stdout.splitlines()[-1] == "imported []", outcome.stdout + outcome.stderr


def test_configs_that_earlier_versions_stored_are_read() -> None:
    """They held every default, also of keys that did not act and are refused today."""
    data = {"name": "grocery", "root": "x", "on_bad_image": "fail", "augment": "none", "validation_fraction": 0.2}
    stored = {"backbone": {"name": "small", "weights": "none", "frozen": True}, "data": data | {"folds": 4}}
    with pytest.raises(ValueError, match="cannot act"):
        parse_config(stored)
    config = parse_stored_config(stored)
    assert (config.data.augment, config.data.folds, config.data.validation_fraction) == (None, None, None)
    assert config.data.fractions == (0.5, 0.2)
    stored["data"] |= {"fold": 2, "folds": 3}
    assert parse_stored_config(stored).data.fold_of == (2, 3)
    glyphs = {"data": {"name": "glyphs", "augment": "shift", "loader": "ray", "validation_fraction": 0.3, "folds": 4}}
    config = parse_stored_config(glyphs)
    assert (config.data.augmentation, config.data.loader, config.data.fractions) == ("shift", "auto", (0.5, 0.3))
    require_same(config, glyphs, "runs/x")
    with pytest.raises(ValueError, match="seed=0 \\(was 1\\)"):
        require_same(config, glyphs | {"seed": 1}, "runs/x")
    counted = {"epochs": 6, "method": ["iaa"], "iaa": {"start_epoch": 1, "draws": 2}}
    iaa = parse_stored_config(counted).iaa
    assert iaa is not None and (iaa.start, iaa.draws) == (1 / 6, 2)
