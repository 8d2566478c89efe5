"""The side of a job that a person sees: submits it, carries its output to a terminal, reports how it ended."""
