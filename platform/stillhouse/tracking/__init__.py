"""Run records, step series, Weights & Biases, progress bars and the comparison of runs."""
