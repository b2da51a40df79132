"""How much anonymous memory a conversion may take, and the size of blocks that keeps to it.

At any time about eleven blocks are in memory: read, transposed, copied by the store and on their
way to the disk. The rest is for the program itself.
"""

from __future__ import annotations

from gemma_convert.errors import UsageError

LEAST_MEMORY = 128_000_000
BLOCKS = 16


def block_bytes(memory: int | None) -> int | None:
    """Bytes of the largest block where `memory` bytes are allowed; None, the default's, for None.

    Raises UsageError for less than a conversion can do with.
    """
    if memory is None:
        return None
    if memory < LEAST_MEMORY:
        raise UsageError("--memory is too little.", expected="at least 128MB", found=memory)
    return memory // BLOCKS
