"""How threads of the libraries wait for work. Setting: `OMP_WAIT_POLICY` of OpenMP.

By default they keep a core busy between two products, for which another process, or JAX, may be
waiting: small models then take many times as long on a machine that is not idle.
"""

from __future__ import annotations

import os


def let_threads_sleep() -> None:
    """OpenMP's threads sleep while they wait, unless the user says otherwise.

    For forward passes; before torch is imported, which reads the setting once.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
