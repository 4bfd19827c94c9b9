"""Why blocks are misses: a client's notes of its own fetches, and the records that it makes of the node's answers.

It may import what `client` may import. It moves no block, and counts as no use of any.
"""
