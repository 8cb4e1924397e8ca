"""One HTML page about a run, a sweep or a comparison: what is asked about, what is measured for it, what is drawn.

Reads what runs and sweeps have left behind; trains nothing.
"""
