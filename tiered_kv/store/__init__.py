"""Store: the store machine, which decides in which tiers blocks are, and the engine, which carries its instructions out.

May import: policy, tiers.base, blocks, keys, clock. The machine imports no tiers; the engine gets its tiers as arguments.
Never knows: ray, concrete tiers, models.
"""
