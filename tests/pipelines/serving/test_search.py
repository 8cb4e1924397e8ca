"""From a trained model to vectors in a file, an index of them, and the answer to a picture."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pyarrow import parquet

from dml_core.retrieval.neighbors import nearest
from dml_core.retrieval.structure import index_vectors, query_vectors
from pipelines.cluster.session import open_cluster
from pipelines.data.sets import load_splits
from pipelines.models.checkpoint import read_config
from pipelines.models.embedder import Embedder
from pipelines.serving.index import open_index
from tests.pipelines.conftest import ROWS, answer, dml, refused

pytestmark = pytest.mark.usefixtures("tracked_folder", "without_ray")


def columns(file: Path) -> dict[str, np.ndarray]:
    table = parquet.read_table(file)
    return {name: np.stack(table[name].to_numpy()) for name in ("vector", "structure")}


def test_what_is_in_the_file(exact, vectors: Path, pictures: Path) -> None:
    frame = pd.read_parquet(vectors)
    assert [*frame.columns] == ["id", "path", "label", "vector", "structure"] and frame["id"].tolist() == [*range(ROWS)]
    folders = frame["path"].str.rpartition("/")[0]
    assert frame["label"].fillna("").tolist() == folders.tolist() and frame["label"].isna().sum() == ROWS // 50
    np.testing.assert_allclose(np.linalg.norm(np.stack(frame["vector"]), axis=1), 1, rtol=1e-6)
    expected = Embedder(Path(exact[2].checkpoint)).vectors([(pictures / path).read_bytes() for path in frame["path"]])
    for name, values in expected.items():
        np.testing.assert_allclose(np.stack(frame[name]), values, atol=1e-5)
    opened = parquet.ParquetFile(vectors)
    assert str(opened.schema_arrow.field("vector").type) == "fixed_size_list<element: float>[128]"
    assert [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)] == [256, 44]
    about = json.loads(opened.schema_arrow.metadata[b"dml"])
    config = read_config(Path(exact[2].checkpoint)).model_dump(exclude_none=True)
    assert about["root"] == str(pictures) and about["config"] == json.loads(json.dumps(config))


def test_one_worker_and_a_table_make_the_same_file(exact, vectors: Path, pictures: Path, tmp_path: Path) -> None:
    frame = pd.read_parquet(vectors)
    frame[["path", "label"]].to_csv(pictures / "table.csv", index=False)
    given = [
        "embed",
        exact[2].checkpoint,
        "--images",
        pictures / "table.csv",
        "--out",
        f"file://{tmp_path}/one.parquet",
    ]
    assert answer(*given, "workers=1")["left_out"] == 0
    one, two = parquet.read_table(tmp_path / "one.parquet"), parquet.read_table(vectors)
    assert one.equals(two)
    for name, values in columns(vectors).items():
        assert columns(tmp_path / "one.parquet")[name].tobytes() == values.tobytes()


def test_flat_index_is_the_exact_ranking(vectors: Path, tmp_path: Path) -> None:
    answer("index", "build", vectors, "--out", tmp_path / "plain")
    made = answer("index", "build", vectors, "--out", tmp_path / "aware", "--structure", "--shard-rows", "120")
    assert [shard["rows"] for shard in made["shards"]] == [100, 100, 100]
    z, s = (torch.from_numpy(values) for values in columns(vectors).values())
    for name, structure, query, gallery in (
        ("plain", None, z, z),
        ("aware", None, z, z),
        ("aware", s, query_vectors(z, s), index_vectors(z)),
    ):
        index = open_index(tmp_path / name)
        expected = nearest(query.double(), [(0, gallery.double())], 20)
        found = index.search(z, 20, structure)
        assert torch.equal(found.id, expected.position)
    distance = (s[0].double() * (z[0].double() - z[found.id[0]]).square()).sum(1).sqrt()
    np.testing.assert_allclose(found.score[0], distance, atol=1e-3)
    with pytest.raises(ValueError, match="not built with --structure"):
        open_index(tmp_path / "plain").search(z, 20, s)
    for arguments, message in (
        ((z[:3] / 0,), "vectors: 3 of 3 rows are not finite in float32, row 0 first"),
        ((z[0],), r"vectors: shape .* but the index needs \(Q, \d+\); one query is vectors\[None\]"),
        ((z, 0), "k=0"),
        ((z, 5, s[:2]), "structure: 2 rows for 300 vectors"),
        ((z, 5, s * float("nan")), "structure: 300 of 300 rows are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(*arguments)


def test_a_picture_finds_itself(index: Path, vectors: Path, pictures: Path) -> None:
    rows = parquet.read_table(vectors, columns=["id", "path", "label"]).to_pylist()
    shutil.copytree(index, index.parent / "moved")  # the model goes with it
    for row in (rows[0], rows[123]):
        image = pictures / row["path"]
        aware = answer("index", "search", index.parent / "moved", "--image", image, "-k", "5")
        plain = answer("index", "search", index, "--image", image, "--plain")
        assert aware["ranking"] == "structure-aware" and len(aware["hits"]) == 5 and len(plain["hits"]) == 10
        first = {"place": 1, **row}
        assert aware["hits"][0].pop("distance") < 2e-3 and aware["hits"][0] == first
        assert plain["hits"][0].pop("similarity") == pytest.approx(1, abs=1e-5) and plain["hits"][0] == first
    printed = dml("index", "search", index, "--image", image)
    assert printed.exit_code == 0 and row["path"] in printed.stdout and "distance" in printed.stdout
    assert all(0 < aware["milliseconds"][part] < 10_000 for part in ("embed", "search"))
    assert " ms, searched in " in printed.stdout


def imports_of(*commands: list[str | Path]) -> set[str]:
    """Run commands of dml in one new process. Return which of the heavy libraries it has imported."""
    program = (
        "import json, sys\n"
        "from pipelines.cli.main import app\n"
        "commands, modules = json.loads(sys.argv[1]), sys.argv[2]\n"
        "for command in commands:\n"
        "    sys.argv = ['dml', *command]\n"
        "    try:\n        app()\n"
        "    except SystemExit as end:\n        assert not end.code\n"
        "print(*sys.modules, sep='\\n', file=open(modules, 'w'))\n"
    )
    heavy = {"torch", "PIL", "ray", "mlflow", "torchvision", "pytorch_metric_learning", "timm", "scipy", "sklearn"}
    heavy |= {"matplotlib", "torch._dynamo"}
    with tempfile.NamedTemporaryFile("r") as modules:
        lines = json.dumps([[str(word) for word in command] for command in commands])
        subprocess.run([sys.executable, "-c", program, lines, modules.name], check=True, stdout=subprocess.DEVNULL)
        return heavy & {*modules.read().split()}


def test_a_search_imports_only_what_embeds_a_picture(index: Path, pictures: Path) -> None:
    image = next(pictures.glob("*/*.png"))
    assert imports_of(["index", "search", index, "--image", image]) == {"torch", "PIL"}


def test_one_worker_needs_neither_ray_nor_what_trains(exact, pictures: Path, vectors: Path, tmp_path: Path) -> None:
    run, embedded = exact[1].checkpoint, tmp_path / "here.parquet"
    embed = ["embed", run, "--images", pictures, "--out", embedded, "data.on_bad_image=skip"]
    build = ["index", "build", embedded, "--out", tmp_path / "index", "--kind", "ivf"]
    assert imports_of(["evaluate", run], embed, build) <= {"torch", "PIL"}
    assert all((values == columns(vectors)[name]).all() for name, values in columns(embedded).items())
    with open_cluster(read_config(Path(run)), None):
        answer("index", "build", embedded, "--out", tmp_path / "by_ray", "--kind", "ivf")
    index, by_ray = open_index(tmp_path / "index"), open_index(tmp_path / "by_ray")
    assert index.about == by_ray.about and index.items([7, 0]) == by_ray.items([7, 0])
    assert index.about.trained_on == "cpu"  # tests see no GPU


def test_index_of_a_run_embeds_its_own_set(exact, tmp_path: Path) -> None:
    made = answer("index", "build", exact[2].run_id, "--out", tmp_path / "index", "--kind", "hnsw", "workers=1")
    splits = load_splits(read_config(Path(exact[2].checkpoint)))
    assert made["rows"] == len(splits.train.whole)
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {"shard-00000.faiss", "items.parquet", "index.json", "model"}
    items = open_index(tmp_path / "index").items([made["rows"] - 1, 0])
    labels = [splits.train.whole.class_names[label] for label in splits.train.whole.labels[[-1, 0]]]
    assert [item.label for item in items] == labels and [item.path for item in items] == [None, None]


def test_what_is_wrong_with_an_index_is_told(index: Path, pictures: Path, tmp_path: Path) -> None:
    image = next(pictures.glob("*.png"))
    ask = ["--image", image]
    assert "there is no index.json in it" in refused("index", "search", tmp_path, *ask)
    shutil.copytree(index, tmp_path / "index")
    about, shard = tmp_path / "index" / "index.json", tmp_path / "index" / "shard-00000.faiss"
    told = about.read_text()
    about.write_text(told.replace("shard-00000.faiss", "../index/shard-00000.faiss"))
    assert "shards.0.name='../index/shard-00000.faiss'" in refused("index", "search", tmp_path / "index", *ask)
    about.write_text(told)
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert "missing or damaged; its sha256" in refused("index", "search", tmp_path / "index", *ask)
    shutil.copy(index / "shard-00000.faiss", shard)
    fingerprint = json.loads(told)["fingerprint"]
    about.write_text(told.replace(fingerprint, "0" * 64))
    assert "not the model that embedded the items" in refused("index", "search", tmp_path / "index", *ask)
    about.write_text(told)
    (tmp_path / "index" / "model" / "learner.safetensors").write_bytes(b"")
    assert "not a whole checkpoint folder" in refused("index", "search", tmp_path / "index", *ask)
    assert "-k 0: must be at least 1" in refused("index", "search", index, *ask, "-k", "0")
    assert "--image nowhere.png: No such file" in refused("index", "search", index, "--image", "nowhere.png")
    broken = next(pictures.rglob("broken.png"))
    assert f"--image {broken}: not a picture" in refused("index", "search", index, "--image", broken)


def test_bad_input_of_embed(exact, vectors: Path, tmp_path: Path) -> None:
    run, new = ["embed", exact[2].checkpoint], ["--out", tmp_path / "new.parquet"]
    (tmp_path / "climbs.csv").write_text("path\n../secret.png")
    assert "nothing: not a checkpoint folder, and unknown" in refused("embed", "nothing", *new)
    assert "no such folder" in refused(*run, "--images", "nowhere", *new)
    assert f"data.table={Path.cwd()}/none.csv: cannot be read" in refused(*run, "--images", "none.csv", *new)
    assert "1 paths lead out of the root" in refused(*run, "--images", tmp_path / "climbs.csv", *new)
    assert "it exists already" in refused(*run, "--out", vectors)
    assert "not a name that ends with .parquet" in refused(*run, "--out", tmp_path / "vectors")
    assert "unknown key data.rot" in refused(*run, *new, "data.rot=x")
    assert [*tmp_path.iterdir()] == [tmp_path / "climbs.csv"]


def test_bad_input_of_index_build(exact, vectors: Path, index: Path, tmp_path: Path) -> None:
    table = parquet.read_table(vectors)
    parquet.write_table(table.drop_columns(["structure"]), tmp_path / "plain.parquet")
    parquet.write_table(table.drop_columns(["vector"]).replace_schema_metadata(), tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("path,label")
    made, new = ["index", "build", vectors], ["--out", tmp_path / "new"]
    assert "--kind flatt: there is no such kind; did you mean flat?" in refused(*made, *new, "--kind", "flatt")
    assert "--nlist 9 cannot act on --kind flat" in refused(*made, *new, "--nlist", "9")
    assert "--nlist 999: a shard of 300 rows" in refused(*made, *new, "--kind", "ivf", "--nlist", "999")
    assert "--shard-rows 0: must be at least 1" in refused(*made, *new, "--shard-rows", "0")
    assert "workers cannot act" in refused(*made, *new, "workers=2")
    assert "it exists already" in refused(*made, "--out", index)
    assert "is not at" in refused(*made, *new, "--model", exact[1].checkpoint)
    assert "no structure embeddings" in refused("index", "build", tmp_path / "plain.parquet", *new, "--structure")
    missing = "not a file of dml embed: no column vector, no metadata of its model"
    assert missing in refused("index", "build", tmp_path / "other.parquet", *new)
    assert "cannot be read" in refused("index", "build", tmp_path / "text.parquet", *new)
    assert "cannot be read" in refused("index", "build", tmp_path / "none.parquet", *new)
    assert not (tmp_path / "new").exists()
