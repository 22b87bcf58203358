"""Jobs that read a finished run, measure or show its models, and leave no run directory behind."""
