"""The policy's log-probs and gradients, without a trace on training."""
