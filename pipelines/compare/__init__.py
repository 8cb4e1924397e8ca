"""Is a gain real: runs grouped by config and paired by seed, intervals, p-values, their table and page.

Reads runs from MLflow; starts none.
"""
