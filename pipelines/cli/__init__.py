"""The command line: one module a command, which parses, calls a function of a wing below, prints and exits.

No rule about data, runs or sweeps lives here: what a command does, a Python user can call.
"""
