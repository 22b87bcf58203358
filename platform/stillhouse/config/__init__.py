"""What is done to a composed config before the first stage runs: overlays, checks, messages."""
