"""Models on MLX, the array library for Apple's processors: training and answers on a Mac's GPU."""
