"""Learning rates, and margins and scales of the base losses: those of loss.name apply."""

from ray import tune

SPACE = {
    "optimizer.lr": tune.loguniform(5e-5, 2e-2),  # from heads on frozen features to small networks from scratch
    "optimizer.weight_decay": tune.loguniform(1e-5, 1e-2),
}
LOSSES = {
    "triplet": {"loss.margin": tune.uniform(0.05, 0.4)},  # distances between unit vectors are at most 2
    "contrastive": {
        "loss.pos_margin": tune.uniform(0.6, 1.0),  # cosines
        "loss.neg_margin": tune.uniform(0.2, 0.6),
    },
    "multi_similarity": {
        "loss.alpha": tune.uniform(1, 10),  # published: 2
        "loss.beta": tune.loguniform(20, 80),  # published: 40 or 50
        "loss.base": tune.uniform(0.3, 0.7),
    },
    "margin": {"loss.margin": tune.uniform(0.1, 0.3), "loss.beta": tune.uniform(0.8, 1.3)},
    "proxy_anchor": {
        "loss.margin": tune.uniform(0.05, 0.3),  # published: 0.1
        "loss.alpha": tune.loguniform(8, 64),  # published: 32
        "optimizer.loss_multiplier": tune.loguniform(3, 300),  # proxies learn faster than heads, by how much differs
    },
    "proxy_nca": {
        "loss.softmax_scale": tune.loguniform(4, 32),
        "optimizer.loss_multiplier": tune.loguniform(3, 300),
    },
}
