"""Wire formats, sans-I/O: request JSON to a TurnRequest, events to frames."""
