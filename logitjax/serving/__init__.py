"""A server with the OpenAI API."""
