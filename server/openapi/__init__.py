"""The OpenAPI 3.2 document of this server, as data."""
