"""What an engine's checkpoint holds: rank files, their layout, and the whole tensors behind them."""
