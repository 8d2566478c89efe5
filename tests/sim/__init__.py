"""A whole cluster out of its pure cores, over a seeded bad network, a disk that refuses and processes that die: simulation.py."""
