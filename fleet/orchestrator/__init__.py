"""Orchestrator: assigns jobs to workers, as gangs. Never touches a tensor."""
