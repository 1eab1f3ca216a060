"""Generated text to what clients see; sans-I/O state machines."""
