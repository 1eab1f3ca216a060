"""People and programs in, events out: the asyncio server in front of the engine."""
