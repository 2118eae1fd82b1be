"""How sequences share rows, micro-batches and ranks, and are still one batch.

In: sequences, or the segment ids of rows they share; a network; the Z of each part.
Out: packed rows, the arguments that keep their sequences apart, whether the network heeds them, and one Z for all.
"""
