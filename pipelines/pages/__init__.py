"""Templates, styles and scripts of the HTML pages, and how figures become SVG in a page's colours.

Knows nothing of runs or sweeps.
"""
