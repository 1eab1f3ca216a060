"""Tools that the server runs itself, and the loop that gives their results to the model."""
