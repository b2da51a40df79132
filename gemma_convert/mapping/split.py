"""Divides a plan over several processes: each source tensor belongs to one of them."""

from __future__ import annotations

from gemma_convert.mapping.plan import Plan


def split_sources(plan: Plan, count: int) -> list[frozenset[str]]:
    """The source tensors of each of `count` processes, of about equal bytes; none is in two.

    Tensors that meet in a target which is put together in memory stay together. Every process
    finds the same division.
    """
    groups = sorted(_together(plan), key=lambda group: (-_nbytes(plan, group), min(group)))
    shares: list[set[str]] = [set() for _ in range(count)]
    loads = [0] * count
    for group in groups:
        least = loads.index(min(loads))
        shares[least] |= group
        loads[least] += _nbytes(plan, group)
    return [frozenset(share) for share in shares]


def _together(plan: Plan) -> list[set[str]]:
    """The sources in groups that have no gathered target in common."""
    group_of = {name: {name} for name in plan.sources}
    first: dict[str, str] = {}
    for copy in plan.copies:
        target, name = copy.target.tensor, copy.source.tensor
        if name not in group_of or not plan.targets[target].gathered:
            continue
        one, other = group_of[first.setdefault(target, name)], group_of[name]
        if one is not other:
            one |= other
            for member in other:
                group_of[member] = one
    return list({id(group): group for group in group_of.values()}.values())


def _nbytes(plan: Plan, names: set[str]) -> int:
    return sum(plan.sources[name].spec.nbytes for name in names)
