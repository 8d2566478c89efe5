"""Bytes between named peers, and the only place that imports zmq. Refuses to know what the bytes mean."""
