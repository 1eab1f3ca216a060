"""SSE, WebSocket and plain JSON answers: thin, with no meaning of their own."""
