"""The benchmark of the choice between loading and computing.

May import: what `tools.bench` may. Must never know: how the client decides.
"""
