"""Ranking losses over a base loss: of synthetics by intensity (SGAR), of distances to clusters (NAMR).

Each formula is a pure function of the global batch, with a module around it for its settings and parameters.
May not live here: ranks and communication; a loss is given the gathered batch.
"""
