"""Self-supervised generative assisted ranking."""

from ray import tune

SPACE = {
    "sgar.intensity": tune.loguniform(0.02, 0.5),  # at 0.5 the fifth synthetic is 2.5 norms away: in other classes
    "sgar.count": tune.randint(3, 8),
    "sgar.margin": tune.loguniform(0.005, 0.2),  # N - 1 margins must fit into the cosine that the last step loses
    "sgar.max_gap": tune.choice([None, 0.05, 0.1, 0.2]),
    "sgar.scale": tune.loguniform(8, 64),
    "sgar.gate": tune.uniform(-0.1, 0.6),
    "sgar.weight": tune.loguniform(0.02, 2.0),  # published: 0.23
    "sgar.ratio_anchor": tune.uniform(0.0, 1.0),
}
