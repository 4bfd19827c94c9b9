"""What a node can say about itself beyond its counts: why a block is a miss, and what more memory would bring.

It may import what `node` may import. It changes no block, and no store waits for it.
"""
