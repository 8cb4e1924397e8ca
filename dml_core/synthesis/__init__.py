"""Synthetic embeddings: gaussian.py draws from the variation of a class (IAA), radial.py at rising intensity (SGAR).

May not live here: losses of the synthetics, which are in base_losses.py and ranking/, and random numbers without an
explicit generator.
"""
