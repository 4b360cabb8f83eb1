"""`multipleOf`: numbers that are multiples as they are written, and as floats are divided."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from ..expressions import EMPTY, Expression, both, choice, graph, sequence, text
from ..plain import parse_plain
from .flat import Flat
from .numbers import bounded_integer, bounded_number
from .validity import in_bounds, is_multiple

MAX_RESIDUES = 1000
MAX_LISTED = 100  # where floats have to be tried, numbers with decimals stay below it


def multiples(step: float, flat: Flat, refuse: Callable[[str], None]) -> Expression | None:
    """The multiples of a step within a schema's bounds; None if there are none.

    Args:
        step: above 0.
        flat: has the bounds, and says whether there may be decimals.
        refuse: raises for what no automaton has room for.
    """
    exact = Fraction(str(step))
    whole = _whole(exact.numerator, refuse)
    integers = bounded_integer(flat.low, flat.high)
    parts = [both(parse_plain(integers), whole)] if integers is not None else []
    if exact.denominator == 1 or "number" not in flat.types:
        return parts[0] if parts else None
    decimals = 0
    while (exact * 10**decimals).denominator > 1:
        decimals += 1
    if Fraction(step) == exact:  # a sum of powers of two, with which floats divide exactly
        bounded = bounded_number(flat.low, flat.high)
        units = int(exact * 10**decimals)
        if units * decimals > MAX_RESIDUES:
            refuse(f"has multipleOf {step}, which takes too many states; use fewer decimals")
        return None if bounded is None else both(parse_plain(bounded), _decimal(units, decimals))
    if abs(Fraction(step) / exact - 1) > Fraction(1, 2**54):
        parts = []
    listed = _listed(exact, step, decimals, flat)
    return choice([*parts, *listed]) if parts or listed else None


def _whole(step: int, refuse: Callable[[str], None]) -> Expression:
    """Integers that a step divides."""
    zeros = len(str(step)) - len(str(step).rstrip("0"))
    core = step // 10**zeros
    if core > MAX_RESIDUES:
        refuse(f"has multipleOf {step}, and {MAX_RESIDUES} residues are the most; write the values as an enum")
    sign = parse_plain("-?")
    if core == 1:
        return choice([text("0"), sequence(sign, parse_plain("[1-9][0-9]*"), text("0" * zeros))])
    # Node 0 is the start, node 1 + r is behind digits with the residue r.
    edges = [(0, text(str(digit)), 1 + digit % core) for digit in range(1, 10)]
    edges += [(1 + r, text(str(digit)), 1 + (10 * r + digit) % core) for r in range(core) for digit in range(10)]
    digits = graph(core + 2, [*edges, (1, EMPTY, core + 1)])
    return choice([text("0"), sequence(sign, digits, text("0" * zeros))])


def _decimal(units: int, decimals: int) -> Expression:
    """Numbers of up to so many decimals that a step divides, which is given in units of the last one."""
    edges: list[tuple[int, Expression, int]] = []
    numbers: dict[tuple[int, int], int] = {}

    def node(residue: int, written: int) -> int:
        if (residue, written) not in numbers:
            numbers[residue, written] = len(numbers) + 2
        return numbers[residue, written]

    edges += [(0, text(str(digit)), node(digit % units, 0)) for digit in range(1, 10)]
    edges.append((0, text("0"), 1))
    edges += [(node(r, 0), text(str(d)), node((10 * r + d) % units, 0)) for r in range(units) for d in range(10)]
    edges += [(node(r, 0), text("."), node(r, 1)) for r in range(units)]
    edges.append((1, text("."), node(0, 1)))
    for written in range(1, decimals + 1):
        edges += [
            (node(r, written), text(str(d)), node((10 * r + d) % units, written + 1))
            for r in range(units)
            for d in range(10)
        ]
    end = len(numbers) + 2
    edges.append((1, EMPTY, end))
    for (residue, written), number in numbers.items():
        done = max(written - 1, 0)
        if written != 1 and residue * 10 ** (decimals - done) % units == 0:
            edges.append((number, EMPTY, end))
    return sequence(parse_plain("-?"), graph(end + 1, edges))


def _listed(exact: Fraction, step: float, decimals: int, flat: Flat) -> list[Expression]:
    """Numbers with decimals, those alone that floats take for multiples too."""
    by_decimals: dict[tuple[str, ...], list[str]] = {}
    scale = 10**decimals
    units = int(exact * scale)
    for sign in ("", "-"):
        for whole in range(MAX_LISTED):
            first = -(-whole * scale // units) * units
            found = []
            for number in range(first, (whole + 1) * scale, units):
                spelt = f"{sign}{whole}.{number % scale:0{decimals}}"
                value = float(spelt)
                if number % scale and in_bounds(value, flat) and is_multiple(value, step):
                    found.append(spelt.partition(".")[2])
            if found:
                by_decimals.setdefault(tuple(found), []).append(f"{sign}{whole}.")
    return [
        sequence(choice(list(map(text, wholes))), choice(list(map(text, behind))))
        for behind, wholes in by_decimals.items()
    ]
