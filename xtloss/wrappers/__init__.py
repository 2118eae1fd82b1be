"""The wrappers that people import: count, weigh, run the network, cost, one sum.

In: a network of x-transformers and a batch.
Out: the loss.
"""
