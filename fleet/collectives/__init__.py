"""Tensors between ranks: schedules, the wire format, kernels and the communicator. Knows no orchestrator and no job."""
