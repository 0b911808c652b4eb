"""A controller and a reward for aisp-local."""
