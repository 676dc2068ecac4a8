"""Parameters, memory, FLOPs and time of a YAML, from its real parts on tensors without values."""
