"Ten constants: published constructions reach the best known values; ways to cheat a verifier earn nothing."

import itertools
import json
import math
from fractions import Fraction as F
from pathlib import Path

import numpy as np
import pytest

from nash_lab.discover import constants
from nash_lab.discover.constants import (
    CapSet,
    Constant,
    CyclePower,
    DistanceRatio,
    Heilbronn,
    Kakeya,
    Kissing,
    Packing,
    PowerSum,
    SquareFreeDifferences,
    SumDifference,
    honest_float,
    plain_rows,
)
from nash_lab.discover.problems import State, problem_by_name, value_of

FIXTURES = Path(__file__).parent / "fixtures"


def digits(number, base, length):
    return [number // base**i % base for i in reversed(range(length))]


@pytest.fixture(scope="module")
def known():
    found = json.loads((FIXTURES / "constructions.json").read_text())
    rows = {name: entry["rows"] for name, entry in found.items()}
    rows["cap-8"] = [digits(n, 3, 8) for n in rows["cap-8"]]
    rows["cycle-7-5"] = [digits(n, 7, 5) for n in rows["cycle-7-5"]]
    return rows


@pytest.mark.parametrize(
    "problem, name, value",
    [
        (CapSet(8), "cap-8", 512),
        (CyclePower(7, 5), "cycle-7-5", 367),
        (Packing(32), "packing-32", 2.939572771206),
        (Heilbronn(11), "heilbronn-11", 0.036529889880),
        (DistanceRatio(16, 2), "ratio-16-2", 12.889266112),
        (DistanceRatio(14, 3), "ratio-14-3", 4.165849767),
        (PowerSum(8), "powers-8", 0.7527847),
        (SumDifference(), "sums-2003", 1.147988),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_known_constructions(known, problem, name, value):
    state = problem.transition(State(), f"Here: {json.dumps(known[name])}.")
    assert state.note == "" and value_of(problem, state) == pytest.approx(value, abs=1e-5)
    if name != "sums-2003":  # the best certified set cannot be written out
        assert problem.value(state.solution) == pytest.approx(problem.best, rel=1e-6)
    assert problem.reward(state) == pytest.approx(value ** (-1 if problem.minimise else 1), rel=1e-5)


def test_nothing_of_a_record_stands_in_a_prompt(known):
    "a prompt names the value to beat; the construction itself would be a leak"
    for problem, name in ((CapSet(8), "cap-8"), (Packing(32), "packing-32")):
        prompt = problem.context(problem.initial_state())
        assert str(problem.best) in prompt and str(known[name][0])[1:-1] not in prompt


def test_verifiers_against_the_definition():
    "each verifier once more, written from the definition, on random small sets that are mostly infeasible"
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(300):
        words = np.unique(rng.integers(0, 7, (3, 2)), axis=0).tolist()
        good = all(
            any((a - b) % 7 not in (0, 1, 6) for a, b in zip(x, y))
            for x, y in itertools.combinations(words, 2)
        )
        assert CyclePower(7, 2).reward(State(words)) == good * len(words)
        caps = np.unique(rng.integers(0, 3, (5, 3)), axis=0).tolist()
        good = not any(
            all(sum(v) % 3 == 0 for v in zip(*three)) for three in itertools.combinations(caps, 3)
        )
        assert CapSet(3).reward(State(caps)) == good * len(caps)
        vectors = np.unique(rng.integers(-2, 3, (3, 3)), axis=0).tolist()
        good = all(map(any, vectors)) and all(
            np.dot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)) < 0.5 + 1e-9
            for x, y in itertools.combinations(vectors, 2)
        )
        assert Kissing(3).reward(State(vectors)) == good * len(vectors)
        residues = np.unique(rng.integers(0, 13, 3)).tolist()
        good = not any(
            (a - b - k * k) % 13 == 0
            for a, b in itertools.permutations(residues, 2)
            for k in range(13)
        )
        one = SquareFreeDifferences(13)
        assert (one.reward(State(residues)) > 0) == good
        seen.add((good, len(residues)))
        z = rng.normal(size=(4, 2))
        powers = [abs(((z @ [1, 1j]) ** k).sum()) / abs(z @ [1, 1j]).max() ** k for k in range(1, 5)]
        assert PowerSum(4).value(z) == pytest.approx(max(powers), rel=1e-13)
    assert len(seen) > 3
    weights = rng.integers(1, 9, 6)
    rows = [[a, b, int(w)] for (a, b), w in zip(itertools.product(range(2), range(3)), weights)]
    entropies = []
    for p, q in ((1, -1), (1, 0), (0, 1), (1, 1), (1, 2)):
        mass = {}
        for a, b, w in rows:
            mass[p * a + q * b] = mass.get(p * a + q * b, 0) + w / weights.sum()
        entropies.append(-sum(m * math.log(m) for m in mass.values()))
    assert Kakeya(2).value(rows) == pytest.approx(entropies[0] / max(entropies[1:]), rel=1e-14)


def test_values_never_flatter():
    rng = np.random.default_rng(1)
    for _ in range(200):
        points = rng.uniform(size=(4, 2))
        squares = [
            sum((F(a) - F(b)) ** 2 for a, b in zip(x, y))
            for x, y in itertools.combinations(points.tolist(), 2)
        ]
        exact = max(squares) / min(squares)
        assert exact <= F(DistanceRatio(4).value(points)) < exact * (1 + F(1, 10**15))
        low, high = (honest_float(exact, up) for up in (False, True))
        assert F(low) <= exact <= F(high) and math.nextafter(low, math.inf) >= high
    assert Kakeya().value([[0, 0, 1], [0, 1, 1], [1, 0, 1]]) <= math.log(27) / math.log(27 / 4)


class Liar(float):
    def __lt__(self, other):
        return True

    __le__ = __gt__ = __ge__ = __eq__ = __lt__
    __hash__ = float.__hash__


class Shifty(list):
    "another list each time it is read"

    def __iter__(self):
        return iter([[0.0, 0.0], [1.0, 0.0]] if self.pop() else [])


def small():
    "each problem with a feasible solution of the same shape"
    return [
        (SumDifference(), [0, 1, 3, 6, 13, 17, 21]),
        (Kakeya(), [[0, 0, 1], [0, 1, 1], [1, 0, 1]]),
        (SquareFreeDifferences(65), [0, 2]),
        (CyclePower(7, 2), [[0, 0], [0, 2]]),
        (Kissing(3), [[1, 1, 0], [1, 0, 1]]),
        (PowerSum(2), [[1.0, 0.0], [0.5, 0.5]]),
        (Packing(2), [[0.25, 0.5, 0.25], [0.75, 0.5, 0.25]]),
        (Heilbronn(3), [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        (CapSet(2), [[0, 0], [0, 1]]),
        (DistanceRatio(3), [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    ]


@pytest.mark.parametrize("problem, good", small(), ids=lambda x: getattr(x, "name", ""))
def test_cheats_earn_nothing(problem, good):
    earned = problem.reward(State(good))
    assert earned > 0 and problem.reward(State(np.array(good))) == earned
    assert problem.transition(State(), json.dumps(good[::-1])).solution == sorted(good)

    def changed(value, row=-1):
        "the last entry of a row replaced"
        rows = json.loads(json.dumps(good))
        if problem.width == 1:
            rows[row] = value
        else:
            rows[row][-1] = value
        return rows

    cheats = [
        *(changed(v) for v in (math.nan, math.inf, -math.inf, 1e308, 10**16, 10**5000, 5e-324)),
        *(changed(v) for v in (True, "1", None, [1], 1j, Liar(0.1), np.float64("nan"), np.bool_(1))),
        *(None, 7, "x", [], {}, {"value": 1e9}, set(), [None], [[]], Shifty([1, 1])),
        [*good, 1.0],
        good * 600,  # too long
        [good],
    ]
    if problem.distinct:
        cheats += [good + good[:1], [good[0]] * len(good)]
    if problem.whole:
        cheats += [changed(0.5), changed(1.0 + 1e-13)]
        if not isinstance(problem, Kissing):  # a direction may be negative
            cheats.append(changed(-(10**15)))
    for cheat in cheats:
        with pytest.raises(ValueError):
            problem.value(cheat)
        assert problem.reward(State(cheat)) == 0
    for text in ("", "NaN", "[NaN]", "[1e999]", '{"value": 1e9}', "the value is 1e9", "[[[0]]]"):
        state = problem.transition(State(), text)
        assert state.solution is None and state.note and "\n" not in state.note
    claimed = problem.transition(State(), f"A record of 1e9! {json.dumps(good)}")
    assert problem.reward(claimed) == earned


def test_no_slack():
    ulp = 2.0**-53
    for problem, bad in (
        (Packing(2), [[0.25, 0.5, 0.25], [0.75 - ulp, 0.5, 0.25]]),
        (Packing(1), [[0.5, 0.5, 0.5 + ulp]]),
        (Heilbronn(3), [[0.0, 0.0], [1 + 2 * ulp, 0.0], [0.0, 1.0]]),
        (Heilbronn(3), [[0.0, 0.0], [0.5 + ulp, 0.5], [0.0, 1.0]]),
        (Kissing(2), [[10**7, 0], [5 * 10**6, 8660254]]),  # 60.000001 degrees are missed
        (SumDifference(), [0, 1, 3]),  # 7 differences of 7
    ):
        with pytest.raises(ValueError):
            problem.value(bad)
    assert Kissing(2).value([[10**7, 0], [5 * 10**6, 8660255]]) == 2


@pytest.mark.parametrize(
    "make, field",
    [
        (lambda: SquareFreeDifferences(12), "modulus=12"),
        (lambda: SquareFreeDifferences(1), "modulus=1"),
        (lambda: CapSet(10), "n=10"),
        (lambda: CapSet("8"), "n='8'"),
        (lambda: Kakeya(0), "slopes=0"),
        (lambda: CyclePower(3, 2), "cycle=3"),
        (lambda: CyclePower(7, 9), "length=9"),
        (lambda: Kissing(1), "dimension=1"),
        (lambda: PowerSum(99), "count=99"),
        (lambda: Packing(0), "circles=0"),
        (lambda: Heilbronn(2), "points=2"),
        (lambda: DistanceRatio(1), "points=1"),
    ],
)
def test_settings_are_refused(make, field):
    with pytest.raises(ValueError, match=field):
        make()


def test_by_name():
    assert len(Constant.__subclasses__()) == 10
    for made in Constant.__subclasses__():
        problem = problem_by_name(f"constants:{made.__name__}")
        assert problem.best and problem.source and problem.task in problem.context(State())
        assert problem_by_name(f"{constants.__name__}:{made.__name__}").name == problem.name
    assert problem_by_name("constants:CapSet", n=4).name == "capset-4"
    for bad in ("constants:Nope", "constant:CapSet", "constants:", "constants", ".constants:CapSet"):
        with pytest.raises(ValueError, match="^problem "):
            problem_by_name(bad)
    with pytest.raises(ValueError, match="CapSet.*unexpected option"):
        problem_by_name("constants:CapSet", size=4)
    assert plain_rows(np.array([[1, 2]]), 2, 9, True) == [(1, 2)]
