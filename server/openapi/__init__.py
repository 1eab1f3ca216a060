"""The OpenAPI 3.1 document of this server, as data."""
