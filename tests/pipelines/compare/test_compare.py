"""A comparison says no more than its seeds do."""

import itertools
import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pytest
from typer.testing import CliRunner

from pipelines.cli import main
from pipelines.compare import statistics
from pipelines.compare.comparison import compare_experiments
from pipelines.compare.statistics import check_groups, choose_baseline, compare_groups, p_value
from pipelines.compare.wording import Line
from pipelines.tracking.runs import LoggedRun, start_run


def run(group: str, seed: int, value: float, **more) -> LoggedRun:
    params = {"method": "[]", "epochs": "5", "seed": str(seed), **more.pop("params", {})}
    given = {"status": "FINISHED", "started": seed, **more}
    return LoggedRun(f"{group}{seed}", f"{group}-s{seed}", "e", group, str(seed), given["status"], given["started"],
                     params, {"test/map_at_r": value})  # fmt: skip


def lines(runs: list[LoggedRun], baseline: str | None = None) -> list[Line]:
    groups, _ = statistics.group_runs(runs)
    return compare_groups(groups, choose_baseline(groups, baseline), ["test/map_at_r"])


@pytest.mark.parametrize("size", [2, 3, 6, 8])
def test_p_is_that_of_all_flips_of_signs(size: int) -> None:
    gains = np.random.default_rng(size).normal(0.4, 1, size)
    means = [abs((gains * signs).mean()) for signs in itertools.product((1, -1), repeat=size)]
    expected = np.mean(np.array(means) >= abs(gains.mean()) - 1e-12)
    assert p_value(gains) == pytest.approx(expected)
    assert p_value(np.abs(gains)) == pytest.approx(2 / 2**size)


def test_single_and_equal_values() -> None:
    assert p_value(np.ones(1)) is None and statistics.mean_interval(np.ones(1)) is None
    assert p_value(np.zeros(6)) == 1 and statistics.mean_interval(np.full(4, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(size: int) -> None:
    rng = np.random.default_rng(0)
    intervals = [statistics.mean_interval(values) for values in rng.normal(0.5, 0.1, (2000, size))]
    assert 0.935 <= np.mean([low <= 0.5 <= high for low, high in intervals]) <= 0.965


def test_a_setting_of_a_method_that_one_config_leaves_open_is_told() -> None:
    runs = [run("open", 0, 0.1, params={"method": "['sgar']"})]
    runs += [run("held", 0, 0.2, params={"method": "['sgar']", "sgar.max_gap": "0.1"}), run("plain", 0, 0.3)]
    labels = [group.label for group in statistics.group_runs(runs)[0]]
    assert labels == ["method=['sgar']", "method=['sgar'] sgar.max_gap=0.1", "method=[]"]


def test_the_least_p_is_that_of_the_config_with_most_seeds() -> None:
    seeds = {"a": 8, "b": 8, "c": 3}
    runs = [run(name, s, s, params={"embedding_dim": name}) for name, count in seeds.items() for s in range(count)]
    groups, _ = statistics.group_runs(runs)
    assert not any("can reach" in warning for warning in check_groups(groups, groups[0]))
    assert any("least possible is 0.25" in warning for warning in check_groups(groups[1:], groups[2]))
    assert statistics.least_p_value(1, 3) == 1 and statistics.least_p_value(5, 4) == pytest.approx(0.25)


def test_holm() -> None:
    made = [Line("g", "m", {}, 0, 0, None, p=p) for p in (0.01, None, 0.04, 0.03)]
    assert [line.p for line in statistics.adjust_p_values(made)] == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]


def test_two_names_for_one_config_do_not_differ() -> None:
    """The null test: 8 seeds each, 100 times."""
    rng, found = np.random.default_rng(1), 0
    for _ in range(100):
        runs = [run("one", s, rng.normal(0.45, 0.004)) for s in range(8)]
        runs += [run("other", s, rng.normal(0.45, 0.004), params={"method": "['sgar']"}) for s in range(8)]
        found += lines(runs)[1].p < 0.05
    assert found <= 10


def test_a_gain_is_found_and_paired() -> None:
    rng = np.random.default_rng(2)
    luck = rng.normal(0, 0.05, 8)  # what a seed does to both
    runs = [run("plain", s, 0.40 + luck[s]) for s in range(8)]
    runs += [run("better", s, 0.41 + luck[s] + rng.normal(0, 0.002), params={"method": "['namr']"}) for s in range(8)]
    plain, better = lines(runs)
    assert plain.gain is None and better.shared == 8 and better.group == "method=['namr']"
    assert better.p == pytest.approx(2 / 2**8) and 0.005 < better.gain_interval[0] < better.gain < 0.015
    assert better.interval[1] - better.interval[0] > 5 * (better.gain_interval[1] - better.gain_interval[0])
    assert plain.sd == pytest.approx(np.std(0.40 + luck, ddof=1))


def test_doubts_are_told() -> None:
    runs = [run("a", s, 0.4 + s) for s in (0, 1, 2)] + [run("a", 3, 0, status="FAILED")]
    runs += [run("a", 2, 0.7, started=99)]
    runs += [run("b", s, 0.5 + s, params={"epochs": "9", "method": "['iaa']"}) for s in (1, 2, 4)]
    groups, warnings = statistics.group_runs(runs)
    assert groups[0].runs["2"].started == 99
    told = "\n".join(warnings + check_groups(groups, groups[0]))
    assert "1 runs did not finish and are left out: a-s3" in told and "seed 2 comes twice in one config" in told
    assert "3 seeds; an interval needs 5" in told and "its seeds differ from the baseline's; 2 are shared" in told
    assert "another budget than the baseline: epochs=9 against 5" in told and "no difference can reach p = 0.05" in told
    assert compare_groups(groups, groups[0], ["test/map_at_r"])[1].shared == 2


def test_baseline_by_label_name_or_default() -> None:
    runs = [run("x", 0, 0.1, params={"method": "['iaa']"}), run("y", 0, 0.1)]
    groups, _ = statistics.group_runs(runs)
    assert choose_baseline(groups, None).key == "y"
    assert choose_baseline(groups, "iaa").key == "x" and choose_baseline(groups, "y-s0").key == "y"
    with pytest.raises(ValueError, match="2 configs are meant by it, one is needed: method="):
        choose_baseline(groups, "method")


def test_a_label_has_the_settings_of_a_method_that_differ_where_it_is_used() -> None:
    sgar = {"method": "['sgar']", "sgar.count": "5"}
    weak, strong = sgar | {"sgar.weight": "0.23"}, sgar | {"sgar.weight": "2.0"}
    one, _ = statistics.group_runs([run("x", 0, 0.1), run("y", 0, 0.1, params=weak)])
    assert [group.label for group in one] == ["method=[]", "method=['sgar']"]
    both, _ = statistics.group_runs(
        [run("x", 0, 0.1), *(run(p["sgar.weight"], 0, 0.1, params=p) for p in (weak, strong))]
    )
    assert [group.label for group in both][1:] == [f"method=['sgar'] sgar.weight={w}" for w in ("0.23", "2")]


def test_command_over_http(mlflow_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    mlflow.set_tracking_uri(mlflow_server.uri)
    client = mlflow.MlflowClient()
    for method, bonus in (("[]", 0.0), ("['namr']", 0.02)):
        for seed in range(6):
            params, tags = {"method": method, "seed": seed}, {"group": method, "seed": str(seed)}
            made = start_run(mlflow_server.uri, "compared", f"{method}{seed}", params, tags, "compared", "d", "s")
            client.log_metric(made, "test/map_at_r", 0.4 + bonus + 0.01 * seed + 1e-4 * (seed % 3))
            client.log_metric(made, "test/recall_at_1", 0.8 + 0.01 * seed)
            client.set_terminated(made, "FINISHED")
    found = CliRunner().invoke(main.app, ["compare", "compared", "--html", "page.html", "--json"])
    assert found.exit_code == 0, found.output
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["baseline"] == "method=[]" and len(report["lines"]) == 4 and report["warnings"] == []
    gained = next(x for x in report["lines"] if x["group"] == "method=['namr']" and x["metric"] == "test/map_at_r")
    assert gained["gain"] == pytest.approx(0.02) and gained["p"] == pytest.approx(2 / 2**6)
    page = (tmp_path / "page.html").read_text()
    assert '<th scope="row">method=[&#39;namr&#39;]</th>' in page
    assert "method=[&#x27;namr&#x27;], test/map_at_r: 44.5 % of 6 seeds" in page.split("<svg ")[1]
    addresses = re.findall(r"""(?:src|href)=["']?([^"'\s>]*)|url\(["']?([^"')]*)""", page)
    assert all("".join(found).startswith(("data:", "#")) for found in addresses) and "@import" not in page
    kept = mlflow.artifacts.load_text(f"runs:/{report['run_id']}/comparison.html")
    assert kept == page
    tree = json.loads(json.dumps(compare_experiments(["compared"], log=False).to_json()))
    assert tree | {"run_id": report["run_id"]} == report
    again = CliRunner().invoke(main.app, ["compare", "compared", "--no-log"])
    assert (
        again.exit_code == 0 and "baseline: method=[]" in again.stdout
    )  # the comparison's own run is no run to compare
    some = [run.info.run_id for run in client.search_runs([client.get_experiment_by_name("compared").experiment_id])]
    by_id = CliRunner().invoke(main.app, ["compare", *some, "--json"])
    kept_in = client.get_run(json.loads(by_id.stdout.splitlines()[-1])["run_id"]).info.experiment_id
    assert kept_in == client.get_run(made).info.experiment_id
    wrong = [["nothing"], ["compared", "--baseline", "sgar"], ["compared", "--metric", "test/none"]]
    for arguments in wrong:
        bad = CliRunner().invoke(main.app, ["compare", *arguments])
        assert bad.exit_code == 2 and bad.stderr.count("\n") == 1, bad.stderr
