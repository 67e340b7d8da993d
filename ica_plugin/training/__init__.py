"""How weights enter the host's training: gradients, and everything that is hooked on a trainer."""
