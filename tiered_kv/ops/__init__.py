"""Operations: monitoring a cache and saving its content. Owns metrics, alerts, their export, memory figures, and checkpoints.

May import: service, tiers, codecs, memory, blocks, layout, keys, config, errors, clock; numpy, msgpack, psutil; and inside functions
torch, tensorboard and wandb. Must never know: ray, actors, cluster, policy, integrations.
"""
