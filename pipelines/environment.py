"""What must be set before Ray, Ray Tune, MLflow and torch are imported. Variables that the user has set stay.

Imported by the package itself, before any of its modules can import those libraries.
"""

import gc
import os
import time

STARTED = time.time()  # of a command, which imports this first

DEFAULTS = {
    # Ray. Reports wait for the controller's next look at its workers: two seconds by default, and each look
    # costs CPU that is the workers'.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How long to wait for room for all workers before counting anew what there is room for: 60 by default.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # after Ctrl-C a thread of Ray's would start a Ray of its own
    # Ray Tune. What a killed sweep has forgotten at most, in seconds.
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # for a trial that is ended early to leave its epoch
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # tables between our own lines, whatever `verbose` says
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # MLflow. By default it tries again for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # standard output is for results
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # five processes for language models, in `dml ui`
    "GIT_PYTHON_REFRESH": "quiet",
}

for name, value in DEFAULTS.items():
    os.environ.setdefault(name, value)

# Imports make a million objects that stay: by default a fifth of their time goes into looking for garbage among them.
gc.set_threshold(100_000, 20, 100)
