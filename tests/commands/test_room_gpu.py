"""`sedac serve` where a GPU has no room for what is asked. A file of its own: while it runs, little is left for any other test."""

from __future__ import annotations

import json
import signal
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import python, save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing can be captured here"),
]


def served(folder, *args):
    return python("-m", "sedac_cli", "serve", "--model", folder, "--dtype", "bfloat16", "--gate", "always:2", "--port", 0,
                  "--backend", "graph", "--json", *args)  # fmt: skip


def test_no_room_is_said_and_with_shrink_there_is_some(tmp_path):
    """Caches of 16 million places, of 8 KiB each, one for the gate and one for dense: more than any GPU has, a part of which fits."""
    wide = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    folder = save_tiny(tmp_path, max_position_embeddings=2**24, **wide)
    refused = served(folder, "--max-length", 2**24)
    out, err = refused.communicate(timeout=300)
    assert (refused.returncode, out) == (3, ""), err
    assert "out of GPU memory" in err
    assert "--shrink" in err
    started = served(folder, "--max-length", 2**24, "--shrink")
    try:
        document = ""
        while not document.rstrip().endswith("}"):
            line = started.stdout.readline()
            assert line, started.stderr.read()
            document += line
        found = json.loads(document)
        assert found["engine"] == "graph"
        body = json.dumps({"prompt": "the sea", "max_tokens": 5}).encode()
        request = Request(found["url"] + "/v1/completions", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as reply:
            answer = json.load(reply)
        assert answer["usage"]["completion_tokens"] >= 1
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=60)
        assert "no room for caches of 16777216 tokens: --max-length is" in err
    finally:
        started.kill()
        started.wait()
