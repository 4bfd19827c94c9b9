"""Codecs that use tables fitted to one model: ecuq, xlayer, and the calibration file that holds the tables.

May import: codecs' other modules, layout, keys, errors, torch.
Never knows: tiers, policy, how a calibration is made.
"""
