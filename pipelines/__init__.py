"""The pipeline around dml_core: data, training on Ray, sweeps, tracking, serving and the command line, in wings.

A wing imports only wings on lines below its own:

    cli
    reports
    serving | sweeps
    runs
    training
    data | models
    cluster | compare
    config
    tracking, pages, files, console, kept, phases, environment

`environment` sets what must be set before Ray, Ray Tune, MLflow and torch are imported, hence is imported first.
"""

from pipelines import environment as environment
