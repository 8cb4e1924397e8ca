"""One run, from the driver: train, evaluate, its record in MLflow, and a loop over a trained model.

Starts workers by a loop's name and never runs a step itself.
"""
