"""The wrappers that people import: count, weigh, run the network, cost, one sum."""
