"""fleet as a backend of torch.distributed. `import fleet` does not import this package, and nothing else in fleet does."""
