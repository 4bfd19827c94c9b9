"""Fits the tables of the calibrated codecs to a model. Owns the texts, the capture of KV and its sensitivity, and the fit.

May import: integrations, codecs, layout, keys, errors; torch, numpy, transformers. Only the command line imports it.
Never knows: tiers, nodes, the cluster, or where the calibration file is stored.
"""

from tiered_kv.tools.calibrate.engine import calibrate

__all__ = ["calibrate"]
