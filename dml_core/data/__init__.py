"""From files to batches: sets, their splits by class, sampling plans, decoding and views.

Lives here: what a set is (datasets.py), where its files are (files.py), where sets come from (user_sets.py,
benchmarks.py, glyphs.py), and how they become batches (sampling.py, pictures.py, transforms.py, loading.py, jpegs.py).
May not live here: models, losses, or random numbers that are not drawn from a seed.
"""
