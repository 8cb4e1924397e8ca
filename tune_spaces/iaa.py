"""Intra-class adaptive augmentation."""

from ray import tune

SPACE = {
    "iaa.intensity": tune.loguniform(0.05, 1.5),  # published: 0.6 to 0.8, for networks trained whole
    "iaa.draws": tune.randint(1, 5),
    "iaa.beta": tune.loguniform(0.01, 1.0),  # small: classes lean on their neighbors
    "iaa.gamma": tune.uniform(0.0, 0.5),
    "iaa.neighbors": tune.choice([5, 10, 25]),  # a few to a third of the classes of a small set
    "iaa.start": tune.choice([0.0, 0.2, 0.4]),
    "iaa.update_every": tune.choice([1, 2, 4]),  # published: 4, in the code 2
}
