"""What counts, and what it weighs.

In: a batch of ids and what says which of them are real, or wanted: lens, masks, segment ids; a weighting.
Out: counted targets, w for each of them, and Z.
"""
