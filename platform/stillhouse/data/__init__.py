"""Data: Lightning data modules, and the sources behind them."""
