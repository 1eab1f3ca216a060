"""HTTP handlers: each module's ``routes()`` gives what it serves."""
