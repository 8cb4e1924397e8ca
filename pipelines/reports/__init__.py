"""One HTML page about a run, a sweep or a comparison: its subject, what is measured for it, its figures.

Reads what runs and sweeps have left behind; trains nothing.
"""
