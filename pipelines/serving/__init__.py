"""A trained model at work: embed pictures, build and search an index, show a demo page, export to other formats.

Knows nothing of training or of sweeps.
"""
