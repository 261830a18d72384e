"""Which kernels a result was taken with: a fingerprint of their sources, kept in every file of results.

facts["kernels"] = fingerprint()
"""

from __future__ import annotations

import hashlib

from sedac_cli.gpu.compile import SOURCES


def fingerprint() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]
