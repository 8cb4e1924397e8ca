"""Deep metric learning in plain PyTorch, in the order of the data; learner.py is the whole of one training step.

Lives here: data, backbones, heads, synthesis, base losses, ranking and retrieval, for use in any training loop.
May not live here: Ray, MLflow, config files, variables of the shell, or imports of pipelines and tune_spaces. Only
gather.py speaks to other processes.
"""
