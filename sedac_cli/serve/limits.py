"""What the server gives to clients at most: one place for every bound, so that no client can take it all.

limits = Limits(max_queue=128, request_timeout=60)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Times in seconds, sizes in bytes. A row is one sequence to generate: a request has prompts x n of them."""

    max_queue: int = 64
    """Rows that wait; one more is answered 429."""
    max_batch: int = 8
    """Rows that run together."""
    max_batch_tokens: int = 16384
    """Prompt and new tokens of a batch, padding included: bounds the KV cache. A single row may exceed it."""
    batch_wait: float = 0.005
    """How long a first row waits for company."""
    max_new_tokens: int = 2048
    """Per row; a request for more is refused."""
    request_timeout: float = 300.0
    """From the arrival of a request to its end."""
    max_body: int = 4_000_000
    head_timeout: float = 10.0
    """For a request's head to arrive after the connection was opened."""
    body_timeout: float = 30.0
    send_timeout: float = 30.0
    """For a client to take what it is sent."""
    max_connections: int = 1000
    grace: float = 10.0
    """For running requests to end after the server was told to stop."""
