"""What a target costs, in nats: ℓ from logits, or Σ w · ℓ where head and loss are one."""
