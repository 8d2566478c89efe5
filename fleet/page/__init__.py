"""The page of a cluster, for people: what the orchestrator shows of itself in a browser."""
