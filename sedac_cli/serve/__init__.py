"""`sedac serve`: an OpenAI-compatible server around the eager engine, for machines without vLLM. Needs the extra `serve`."""
