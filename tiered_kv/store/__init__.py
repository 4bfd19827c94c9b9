"""Store: the pure machine that decides where blocks are, and the engine that carries its instructions out.

May import: policy, tiers.base, blocks, keys, clock (the machine: no tiers at all; the engine is given its tiers).
Never knows: ray, concrete tiers, models.
"""
