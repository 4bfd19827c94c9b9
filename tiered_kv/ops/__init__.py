"""Operations: watching a cache and keeping its content. Owns metrics, alerts, their export, memory figures, and checkpoints.

May import: service, tiers, codecs, memory, blocks, layout, keys, config, errors, clock; numpy, msgpack, psutil, and torch, tensorboard
and wandb where they are used. Must never know: ray, actors, cluster, policy, integrations.
"""
