"""One machine's agent: starts ranks, watches them, carries their output. Decides nothing about the cluster."""
