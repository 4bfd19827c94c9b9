"""Calibrate: fits the tables of the calibrated codecs to a model. Owns the texts, the capture of KV and its sensitivity, and the fit.

May import: integrations, codecs, layout, keys, errors; torch, numpy, transformers. Imported by the command line only.
Never knows: tiers, service, cluster; where the file that it makes is kept.
"""

from tiered_kv.calibrate.engine import calibrate

__all__ = ["calibrate"]
