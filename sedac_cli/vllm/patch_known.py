"""What vLLM's own `vllm/plugins/__init__.py` looks like, version by version: a digest of the file and one of each line.

The source patch goes into a file it knows and no other; the digests of the lines are there to show what another file changed.
`fingerprint(text)` makes an entry from the file of a further version.
"""

from __future__ import annotations

import hashlib

DIGITS = 6


def fingerprint(text: str) -> tuple[str, str]:
    """(sha256 of the file, the first digits of each line's sha256, joined)."""
    lines = (hashlib.sha256(line.rstrip().encode()).hexdigest()[:DIGITS] for line in text.splitlines())
    return hashlib.sha256(text.encode()).hexdigest(), "".join(lines)


KNOWN: dict[str, tuple[str, str]] = {
    "0.24.0": (
        "4be66190ceaee9d0465f62ade801a8e94a907d7ab9fdb0a67fa14ce87448ae9f",
        "a5fbb80511d6e3b0c427dced912d2f063e3de3b0c4ab97cde3b0c40dc812e3b0c4e94b6df89116e78d671d061274c894283230d51c2c"
        "66b658ac49f9987da11ca946e3b0c4188a62614f4be3b0c4e3b0c414868b93710f35079ce3b0c43af87fe3b0c4ab95354200b26e67c3"
        "0591d5e3b0c4de6f8b19da1b9ae59b2ddff9e3b0c44edfc7b529414103c9e3b0c4425c6a832e89da7a62ce7e50ab38e8e3b0c4f011a1"
        "b52941bf5e3de1f154fa73f0e3b0c4501dcc6ab7d820cb318032a40530d2e3b0c4c23834e3b0c4e3b0c4c46cc9c53d55a31bfc0efbab"
        "c7fecb3e359d57d7bb075da1a5677ee3b0c4fec6956427ff8985c02f85ee",
    ),
    "0.26.0": (
        "fb6e6ee432c5a4ae207aaffe4b546aca9381f56ee8498b0a3e0d9af2d289d023",
        "a5fbb80511d6e3b0c427dced912d2f537554e3b0c4ab97cde3b0c4d563178c6298eba247e3b0c40dc812e3b0c4e94b6df89116e78d67"
        "1d061274c894283230d51c2c66b658ac49f9987da11ca946a954fa32f66611cf1c62e7f1e3b0c4188a62614f4be3b0c4e3b0c414868b"
        "93710f35079ce3b0c43af87fe3b0c4ab95354200b26e67c30591d5e3b0c4de6f8b19da1b9ae59b2ddff9e3b0c44edfc7b529414103c9"
        "e3b0c4425c6a832e89da7a62ce7e50ab38e8e3b0c4f011a1b52941bf5e3de1f154fa73f0e3b0c4501dcc6ab7d820cb318032a40530d2"
        "e3b0c4c23834e3b0c4e3b0c4c46cc9c53d55a31bfc0efbabc7fecb3e359d57d7bb075da1a5677ee3b0c4fec6956427ff8985c02f85ee"
        "e3b0c4e3b0c44bfcc388ac0417c0cd2acc62e3b0c40b06e517da1d6949a450d0c4e0b1b466f05ae3b0c429e8c31e0895effbcf65737d"
        "0d5a1e8b9f2ce3b0c4237bc5a5ce7a2e8322e3b0c4bd1343baed97c7fecb35079ce3b0c4bd2e08dd18be9f50cebb049d14dcc0809ade"
        "e33d7323b5e38ce868bc85c1e3b0c4ea7876e3b0c408e6ea93598fda488ad25ce9013bb1a974358c4260e3b0c4088173faa19d6f46d4"
        "81bc0b14c5b5d0cd1c241d4bc865f7ad73fef4dd488ce8688c4260e3b0c4c112b681d61de3b0c4f2ce4c",
    ),
    "0.32.0, 0.33.0": (
        "06942d64e526c2c7407265e1903d625c4d2118d8d7fc39c616b1cc6aa6fc2c8f",
        "a5fbb80511d6e3b0c427dced912d2f537554e3b0c4ab97cde3b0c4d563178c6298eba247e3b0c40dc812e3b0c4e94b6df89116e78d67"
        "1d061274c894283230d51c2c66b658ac49f9987da11ca946a954fa32f66611cf1c62e7f1e3b0c4188a62614f4be3b0c4e3b0c414868b"
        "93710f35079ce3b0c43af87fe3b0c4ab95354200b26e67c30591d5e3b0c4de6f8b19da1b9ae59b2ddff9e3b0c44edfc7b529414103c9"
        "e3b0c4425c6a832e89da7a62ce7e50ab38e8e3b0c4f011a1b52941bf5e3de1f154fa73f0e3b0c4501dcc6ab7d820cb318032a40530d2"
        "e3b0c4c23834e3b0c4e3b0c4c46cc9c53d55a31bfc0efbabc7fecb3e359d57d7bb075da1a5677ee3b0c4fec6956427ff8985c02f85ee"
        "e3b0c4e3b0c44bfcc388ac0417c0cd2acc62e3b0c40b06e517da1d6949a450d0c4e0b1b466f05ae3b0c429e8c31e0895effbcf65737d"
        "0d5a1e8b9f2ce3b0c4237bc5a5ce7a2e8322e3b0c4bd1343baed97e3b0c4c7fecb35079ce3b0c4bd2e08dd18be9f50cebb049d14dcc0"
        "809adee33d7323b5e38ce868bc85c1e3b0c4ea7876e3b0c408e6ea93598fda488ad25ce9013bb1a974358c4260e3b0c4088173faa19d"
        "6f46d481bc0b14c5b5d0cd1c241d4bc865f7ad73fef4dd488ce8688c4260e3b0c4c112b681d61de3b0c4f2ce4c",
    ),
}
