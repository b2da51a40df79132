"""Processes that find one another under `jax.distributed`: by flags, or by their environment.

What they exchange goes through the key-value store of JAX's coordination service, to which
`jax._src.distributed` is the only way (Orbax goes it too).
"""

from __future__ import annotations

from gemma_convert.engine.processes import Processes
from gemma_convert.errors import UsageError


def connect(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool
) -> Processes:
    """The processes that the arguments name; without arguments one by itself.

    `coordinator` is the HOST:PORT where process 0 listens; `detect` asks JAX to find all of this in
    the environment of a TPU pod, SLURM or MPI. No device is touched. Raises UsageError for
    arguments that contradict each other, or lead nowhere.
    """
    given = (coordinator, processes, process)
    if given == (None, None, None) and not detect:
        return Processes()
    _check(coordinator, processes, process, detect)
    import jax
    from jax._src import distributed

    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise not_joined(error) from error
    state = distributed.global_state
    return Processes(state.client, state.process_id, state.num_processes)


def not_joined(error: BaseException) -> UsageError:
    """What the user is told when JAX does not bring the processes together."""
    return UsageError(
        "The processes cannot be joined.",
        found=str(error)[:500],
        do="start all of them with one --coordinator; or --distributed, where JAX knows the "
        "cluster",
    )


def _check(
    coordinator: str | None, processes: int | None, process: int | None, detect: bool
) -> None:
    if detect and (coordinator, processes, process) != (None, None, None):
        raise UsageError(
            "--distributed finds the other processes in the environment.",
            do="leave out --coordinator, --processes and --process",
        )
    if detect:
        return
    if coordinator is None or processes is None or process is None:
        raise UsageError("--coordinator, --processes and --process belong together.")
    if not coordinator.rpartition(":")[2].isdecimal() or ":" not in coordinator[1:]:
        raise UsageError(
            "--coordinator is where process 0 listens.",
            expected="HOST:PORT, the same for all processes",
            found=coordinator,
        )
    if not 0 <= process < processes:
        raise UsageError(
            "--process is the number of this process.",
            expected=f"0 to {processes - 1}",
            found=process,
        )
