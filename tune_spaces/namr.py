"""Neighborhood-adaptive multi-cluster ranking."""

from ray import tune

SPACE = {
    "namr.centers": tune.randint(2, 9),
    "namr.spacing": tune.choice(["even", "quantile"]),
    "namr.t": tune.uniform(1.0, 5.0),
    "namr.alpha": tune.loguniform(1.0, 50.0),  # distances are about 1: from all centres at once to the nearest alone
    "namr.weight": tune.loguniform(0.01, 10.0),  # published: 2; over a base that is good already, next to nothing
}
