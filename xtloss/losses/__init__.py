"""What a target costs, in nats.

In: what the network returned, logits or embeddings and a head, and the targets that count.
Out: ℓ for each target, or Σ w · ℓ where head and loss are one.
"""
