"""The trainer: flags, policy, losses and the loop."""
