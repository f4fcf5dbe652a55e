"Problems and archive from outside: exact arithmetic, published records, hostile answers, invariants under random use."

import gzip
import json
import math
import random
from fractions import Fraction as F

import numpy as np
import pytest

from nash_lab.core.files import read_json, write_json
from nash_lab.discover.archive import (
    Archive,
    ArchiveConfig,
    ancestors,
    archive_from_json,
    archive_to_json,
    puct,
)
from nash_lab.discover.problems import (
    OBJECTIVES,
    PROBLEMS,
    Problem,
    State,
    autocorrelation1,
    autocorrelation2,
    circle_packing,
    code_problems,
    code_tests,
    erdos_overlap,
    json_fields,
    json_inside,
    letters,
    levels,
    near_target,
    packing_radius_sum,
    plain_numbers,
    problem_by_name,
    step_function,
    string_match,
    value_of,
)


RNG = np.random.default_rng(0)


# --- verifiers against rational arithmetic ---


def exact_erdos(h):
    h = [F(v) for v in h]
    h = [v * F(len(h), 2) / sum(h) for v in h]
    at = lambda i: (h[i], 1 - h[i]) if 0 <= i < len(h) else (0, 0)
    return max(
        sum(at(i + k)[0] * at(i)[1] for i in range(len(h))) for k in range(1 - len(h), len(h))
    ) * F(2, len(h))


def convolved(a):
    b = [F(0)] * (2 * len(a) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(a):
            b[i + j] += F(x) * F(y)
    return b


def exact_ac1(a):
    return 2 * len(a) * max(convolved(a)) / sum(map(F, a)) ** 2


def exact_ac2(a):
    y = [F(0), *convolved(a), F(0)]
    square = sum(p * p + p * q + q * q for p, q in zip(y, y[1:])) / 3
    return square / (sum(y) * max(y))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
def test_verifiers_are_exact(n):
    h, a = RNG.uniform(0.3, 0.6, n).tolist(), RNG.uniform(0, 3, n).tolist()
    assert erdos_overlap(h) == pytest.approx(float(exact_erdos(h)), rel=1e-14)
    assert autocorrelation1(a) == pytest.approx(float(exact_ac1(a)), rel=1e-14)
    assert autocorrelation2(a) == pytest.approx(float(exact_ac2(a)), rel=1e-14)


def test_values_by_hand():
    for n in (1, 5, 64):
        assert erdos_overlap([0.3] * n) == pytest.approx(0.5, abs=1e-13)
        assert (autocorrelation1([7] * n), autocorrelation2([7] * n)) == pytest.approx(
            (2, 2 / 3), abs=1e-13
        )
    assert [
        erdos_overlap(h) for h in ([1, 1, 0, 0], [0, 1, 1, 0], [0.25, 0.75, 0.75, 0.25])
    ] == pytest.approx([1, 0.5, 0.40625])
    assert [autocorrelation1([1, 2, 1]), autocorrelation1([2, 1, 2])] == pytest.approx([2.25, 2.16])
    assert [autocorrelation2([1, 2, 1]), autocorrelation2([2, 1, 2])] == pytest.approx(
        [0.680556, 0.583704], abs=1e-6
    )


@pytest.mark.parametrize(
    "f, good",
    [
        (erdos_overlap, [0.5, 0.5]),
        (autocorrelation1, [1, 1]),
        (autocorrelation2, [1, 1]),
        (packing_radius_sum, [[0.5, 0.5, 0.5]]),
    ],
)
def test_not_numbers(f, good):
    f(good), f(np.array(good)), f(tuple(good))
    for bad in (
        None,
        1,
        "a",
        b"a",
        {},
        [],
        [[]],
        [None],
        ["1"],
        [True, 0.5],
        [math.nan, 1],
        [math.inf, 1],
        [10**400, 1],
        [1j],
        np.array(["a"]),
        np.array(0.5),
        np.array([True]),
        [[[1]]],
        [0.5, [0.5]],
        np.zeros((0,)),
        [-1, 2],
        [[0.5, 0.5]],
        [[math.nan] * 3],
        [[0.5, 0.5, -0.1]],
        {0.5: 1},
        [{}],
    ):
        with pytest.raises(ValueError):
            f(bad)


@pytest.mark.parametrize("h", [[1, 0, 0], [0, 0], [1 + 1e-9, 0.5], [0, 5e-324, 0, 0]])
def test_erdos_infeasible(h):
    with pytest.raises(ValueError, match="^h: "):
        erdos_overlap(h)


def test_rounding_of_a_full_step_is_no_violation():
    "n/2 missed by an ulp must not make heights of exactly 1 infeasible"
    for n in range(6, 60, 2):
        h = np.array([0.1] * (n // 2) + [0.9] * (n // 2)) / 0.9
        h[: n // 2] = 0.1
        h = np.concatenate([h, 1 - h])
        assert 0.25 < erdos_overlap(h) <= 1


def test_packing():
    touching = [[0.25, 0.5, 0.25], [0.75, 0.5, 0.25]]
    assert packing_radius_sum(touching) == 0.5
    for bad in (
        [[0.25, 0.5, 0.25], [0.75 - 1e-9, 0.5, 0.25]],
        [[0.25, 0.5, 0.25 + 1e-9]],
        [[1.5, 0.5, 0.1]],
        [[0.5, 0.5, 0.1]] * 2,
        [[0.5, 1e308, 1e308]],
    ):
        with pytest.raises(ValueError, match="^circles: "):
            packing_radius_sum(bad)
    assert packing_radius_sum([[0.5, 0.5, 0.5 + 1e-13]]) == pytest.approx(
        0.5
    )  # within the published slack


# --- published records ---


def test_records(data):
    read = lambda name: json.loads((data / "ttt_discover" / f"{name}.json").read_text())
    assert erdos_overlap(read("ttt_erdos_sequence")["sequence"]) == pytest.approx(
        0.3808753232177187, abs=1e-13
    )
    assert autocorrelation1(read("ttt_ac1_sequence")["sequence"]) == pytest.approx(
        1.502862898255826, abs=1e-12
    )
    assert autocorrelation2(read("ttt_ac2_sequence")["sequence"]) == pytest.approx(
        0.9591797711482712, abs=1e-12
    )
    assert autocorrelation2(read("prior_ac2_sequence")["alphaevolve_v2"]) == pytest.approx(
        0.9610210777840243, abs=1e-12
    )
    known, prior = read("best_known_values"), read("prior_sequences")
    for name, h in prior["erdos"].items():
        assert erdos_overlap(h) == pytest.approx(known["erdos_min_overlap"][name], abs=1e-12)
    for name, a in prior["ac1"].items():
        assert autocorrelation1(a) == pytest.approx(known["autocorrelation_1"][name], abs=1e-12)
    for name, best in (
        ("erdos", 0.3808753),
        ("autocorrelation1", 1.5028629),
        ("autocorrelation2", 0.9610210),
    ):
        assert OBJECTIVES[name].best == best


def test_record_packing(data):
    circles = json.loads((data / "ttt_discover/circle_packing_26.json").read_text())["circles"]
    assert packing_radius_sum(circles) == pytest.approx(2.6359773947542573, abs=1e-13)
    exact = [tuple(map(F, c)) for c in circles]
    for i, (x, y, r) in enumerate(exact):
        for u, v, s in exact[:i]:
            assert (x - u) ** 2 + (y - v) ** 2 >= (r + s - F(1, 10**12)) ** 2
    p = circle_packing(26)
    assert p.reward(
        p.transition(State(), f"Here: {json.dumps(circles)}, a sum of 3.")
    ) == packing_radius_sum(circles)
    assert (
        "26 circles, expected 32"
        in circle_packing(32).transition(State(), json.dumps(circles)).note
    )


# --- nothing a model writes can raise ---


def never(code, tests):
    return False, "no"


def everything():
    return [
        *(
            step_function(o, steps=4, form=f)
            for o in ("erdos", "autocorrelation1", "autocorrelation2")
            for f in ("letters", "json")
        ),
        circle_packing(2),
        string_match("hello"),
        json_fields("x", {"a": 1, "b": [2]}),
        code_tests("x", ("assert f() == 1", "assert f() > 0"), never),
        near_target("x", (1.0, 2.0)),
        Problem(
            "explained",
            parse=str.strip,
            grade=lambda text: min(abs(int(text)), 9) / 9,
            ask=lambda state, reward: state.note,
            explain=lambda text: f"found {text}",
        ),
    ]


def hostile():
    rng, alphabet = (
        random.Random(0),
        '[]{}",:.-+eE0123456789abYZ \n\t\\u`\0\ud800é１NaNInfinitytruefalsenull',
    )
    yield from (
        "",
        "\0",
        "\ud800",
        "[" * 200_000,
        '{"a":' * 50_000,
        "9" * 10**6,
        "[" + "1," * 300_000 + "1]",
        "[1e309]",
        "[-1e309]",
        "[NaN]",
        "-Infinity",
        '{"a":1,"a":1}',
        '{"a":{"a":1,"a":2}}',
        "[0.5,0.5,0.5,1e-400]",
        "[5e-324,5e-324]",
        "[1e308,1e308]",
        "[[1e308,1,1],[1,1e308,1]]",
        "١٢٣",
        "[１]",
        "1_0",
        "0x10",
        "[true,false]",
        '["0.5"]',
        "[[0.5,0.5,NaN],[0,0,0]]",
        "[[0.5,0.5,-0.0],[0,0,0]]",
        "[-0.0,-0.0,1,1]",
        '__import__("os")._exit(1)',
        "exit()",
        '{"__class__": "x"}',
        "```",
        "``````",
        "```\n```",
        "```python\n\0```",
        "\\ud800",
        '"\\udfff"',
        '{"a": "\\ud800"}',
        "%n%s{0.__class__}",
        "a" * 10**6,
    )
    for _ in range(400):
        yield "".join(rng.choices(alphabet, k=rng.randrange(1, 60)))
    good = [
        "[0.5,0.5,0.5,0.5]",
        "yyyy",
        "[[0.25,0.5,0.25],[0.75,0.5,0.25]]",
        '{"a": 1, "b": [2]}',
        "[1.0, 2.0]",
        "hello",
    ]
    for _ in range(400):
        text = list(rng.choice(good))
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(alphabet)
        yield "".join(text)


@pytest.mark.parametrize("p", everything(), ids=lambda p: p.name)
def test_no_answer_raises(p):
    for action in hostile():
        state = p.transition(p.initial_state(), action)
        reward = p.reward(state)
        assert math.isfinite(reward) and 0 <= reward < 1e9 and reward == p.reward(state)
        assert state.solution is not None or (state.note and reward == 0)
        p.context(state).encode("utf-8")
        json.dumps([state.solution, state.note], allow_nan=False)
        assert p.transition(state, action) == state or p.name == "code"


@pytest.mark.parametrize("p", everything(), ids=lambda p: p.name)
def test_no_stored_solution_is_trusted(p):
    for solution in (
        math.nan,
        [math.nan] * 4,
        [9.0] * 4,
        "x",
        [],
        {},
        10**400,
        [10**400],
        [[1.0]],
        [None],
        True,
        {"reward": 5},
        [[0.5, 0.5, 0.5]] * 2,
    ):
        assert 0 <= p.reward(State(solution)) <= 2.7
    assert p.reward(State(None, "reward: 100")) == 0


def test_maximum_needs_the_right_answer():
    assert (
        string_match("abc").reward(State("abc")) == 1 > string_match("abc").reward(State("abcabc"))
    )
    fields = json_fields("", {"a": 1})
    many = json.dumps({"a": 1} | {f"k{i}": i for i in range(99)})
    assert fields.reward(fields.transition(State(), many)) == 0.01
    for text, reward in (('{"a": 1}', 1), ('{"a": true}', 0), ('{"a": "1"}', 0), ('{"a": 1.0}', 0)):
        assert fields.reward(fields.transition(State(), text)) == reward


def test_letters_round_trip():
    p = step_function(steps=24)
    for _ in range(200):
        text = letters(RNG.integers(0, 51, 24))
        state = p.transition(State(), text)
        if state.solution is not None:
            assert p.context(state) == text + ">" and value_of(p, state) == erdos_overlap(
                state.solution
            )
    assert levels("aY", 2, 50) == [0, 50]


def test_random_initial_states():
    for steps in (1, 2, 5, 64):
        p = step_function(steps=steps, start="random")
        starts = [p.initial_state(seed) for seed in range(20)]
        assert starts == [p.initial_state(seed) for seed in range(20)] and all(
            p.reward(s) > 0 for s in starts
        )


def test_a_claim_is_not_read():
    p = step_function(form="json")
    state = p.transition(State(), '{"heights": [0.5, 0.5], "overlap": 0.1}')
    assert state.solution is None and p.reward(state) == 0
    assert value_of(p, p.transition(State(), "overlap 0.1: [0.5, 0.5]")) == 0.5


def test_json_inside_is_linear():
    assert json_inside("x" * 10**6 + "[1]" + "y" * 10**6) == [1]


def test_by_name(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"task_id": 7, "text": "f", "test_list": ["assert 1"]}')
    needed = {
        "code": {"task": "mbpp/7", "file": str(tmp_path / "x.jsonl")},
        "json": {"prompt": "?", "fields": {"a": 1}},
        "distance": {"prompt": "?", "target": [1.0]},
    }
    for name in PROBLEMS:
        one, other = (problem_by_name(name, **needed.get(name, {})) for _ in range(2))
        assert one.initial_state() == other.initial_state() and one.context(State())
    for bad in ("", "x", ":", "os:", ":x", "nope:X", "os:path", "json:JSONDecoder", "a b:c"):
        with pytest.raises(ValueError, match="^problem "):
            problem_by_name(bad)
    with pytest.raises(ValueError, match="unexpected option 'size'"):
        problem_by_name("packing", size=3)
    with pytest.raises(ValueError, match="problem 'distance': .*missing.*'target'"):
        problem_by_name("distance", prompt="?")


class Sidon(Problem):
    "A class of version 0.1: it derives from Problem and writes its own functions"

    name = "sidon"

    def __init__(self, bound=30):
        self.bound = bound

    def parse(self, text):
        return sorted(json_inside(text))

    def grade(self, solution):
        return min(len(set(solution)), 8) / 8

    def initial_state(self, seed=0):
        return State([0])

    def context(self, state):
        return f"Extend {state.solution} below {self.bound}"


def test_a_class_can_be_a_problem():
    task = problem_by_name(f"{__name__}:Sidon", bound=9)
    state = task.transition(task.initial_state(), "[3, 1, 0, 7]")
    assert (state.solution, task.reward(state), value_of(task, state)) == ([0, 1, 3, 7], 0.5, 0.5)
    assert (
        task.context(state) == "Extend [0, 1, 3, 7] below 9"
        and task.transition(state, "no").solution is None
    )
    assert problem_by_name("nash_lab.discover.problems:StringMatch", target="a").name == "string", (
        "as a saved search may call it"
    )
    with pytest.raises(ValueError, match="has no initial_state"):
        problem_by_name("pathlib:Path")


@pytest.mark.parametrize(
    "make, names",
    [
        (lambda: step_function("erdös"), ("objective", "erdös")),
        (lambda: step_function(top=52), ("top=52",)),
        (lambda: step_function(steps=0), ("steps=0",)),
        (lambda: step_function(form="xml"), ("form", "xml")),
        (lambda: circle_packing(0), ("circles=0",)),
        (lambda: string_match(" "), ("target",)),
        (lambda: code_tests("", (), never), ("no tests",)),
        (lambda: near_target("", (1.0,), -1.0), ("scale=-1.0",)),
        (lambda: near_target("", ()), ("target",)),
        (lambda: json_fields("", {}), ("fields",)),
        (lambda: ArchiveConfig(size=0), ("ArchiveConfig.size=0",)),
        (lambda: ArchiveConfig(children=0), ("ArchiveConfig.children=0",)),
        (lambda: ArchiveConfig(c=-1.0), ("ArchiveConfig.c=-1.0",)),
        (lambda: ArchiveConfig(c=math.nan), ("ArchiveConfig.c=nan",)),
        (lambda: ArchiveConfig(bonus="x"), ("ArchiveConfig.bonus='x'",)),
    ],
)
def test_problems_that_are_none(make, names):
    with pytest.raises(ValueError) as error:
        make()
    assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    "read, text",
    [
        *(
            (lambda t: levels(t, 4, 50), t)
            for t in ("", "abc", "abcde", "abcZ", "ab d", "abcа", "abc１", "ab\0c")
        ),
        *(
            (code_tests("", ("assert 1",), never).parse, t)
            for t in ("", "``````", "x\0", "y" * 100_001)
        ),
        *(
            (json_inside, t)
            for t in (
                "[NaN]",
                "[-Infinity]",
                "[1e999]",
                '{"a": 1, "a": 2}',
                "[" * 100 + "]" * 100,
                "[" * 10**6,
                "[1] and [2]",
                "",
                "]1[",
                "[０]",
                "[" + "9" * 5000 + "]",
                "[__import__('os')]",
                "[1_000]",
                "[01]",
                "[1,]",
                "['a']",
            )
        ),
    ],
    ids=lambda v: repr(v)[:20] if isinstance(v, str) else "",
)
def test_answers_that_cannot_be_read(read, text):
    with pytest.raises(ValueError):
        read(text)


def test_lists_that_are_no_numbers():
    for bad in (
        None,
        3,
        "123",
        [],
        [True],
        ["1"],
        [None],
        [math.nan],
        [-math.inf],
        [10**400],
        [[1]],
        {"h": [1]},
        [1j],
        [1] * 10,
    ):
        with pytest.raises(ValueError, match="^h: "):
            plain_numbers(bad, 1, 9, "h")
    for bad in ([1, 2], [[1, 2], [3]], [[]], [[1], None], [[[1]]]):
        with pytest.raises(ValueError, match="^c: "):
            plain_numbers(bad, 2, 9, "c")


# --- code ---


def runner(code, tests):
    try:
        exec(f"{code}\n{tests}", {"__name__": "answer"})
    except Exception as error:
        return False, repr(error)
    return True, ""


def test_published_code_tasks(data):
    with gzip.open(data / "humaneval/HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    tasks = code_problems(data / "humaneval/HumanEval.jsonl.gz", runner)
    assert len(tasks) == 164 and tasks[3].name == "humaneval/3"
    for row, task in list(zip(rows, tasks))[:12]:
        for answer in (
            row["canonical_solution"],
            f"```python\n{row['prompt']}{row['canonical_solution']}\n```",
        ):
            assert task.reward(task.transition(task.initial_state(), answer)) == 1.0, task.name
        assert task.reward(task.transition(State(), "    return None")) == 0.0
    clean = json.loads((data / "mbpp/sanitized-mbpp.json").read_text())
    tasks = code_problems(data / "mbpp/sanitized-mbpp.json", runner)
    assert len(tasks) == 427
    for row, task in list(zip(clean, tasks))[:12]:
        assert task.reward(task.transition(State(), row["code"])) == 1.0, task.name
    assert len(code_problems(data / "mbpp/mbpp.jsonl", runner)) == 974


def test_a_code_task_by_its_number(data, tmp_path, monkeypatch):
    "In the real sandbox; what is not there is refused by name"
    monkeypatch.setenv("NASH_LAB_DATA", str(data))
    (tmp_path / "x.jsonl").write_text("")
    task = problem_by_name("code", task="mbpp/14")
    assert task.name == "mbpp/14" and "triangular prism" in task.context(State())
    right = task.transition(State(), "def find_Volume(l, b, h): return l * b * h / 2")
    wrong = task.transition(State(), "def find_Volume(l, b, h): return l * h")
    assert task.reward(right) == 1 and 0 < task.reward(wrong) < 1 and "failed" in wrong.note
    assert problem_by_name("code", task="humaneval/3").name == "humaneval/3"
    for settings, said in (
        ({"task": "mbpp/0"}, "no task 'mbpp/0' among its 974 tasks, such as mbpp/1, mbpp/2"),
        ({"task": 14}, "task=14, expected mbpp/NUMBER"),
        ({"task": "mbpp/14", "file": str(tmp_path / "gone.jsonl")}, "gone.jsonl"),
        ({"task": "mbpp/14", "file": str(tmp_path / "x.jsonl")}, "its 0 tasks, such as none"),
        ({}, "missing 1 option: 'task'"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            problem_by_name("code", **settings)
    monkeypatch.delenv("NASH_LAB_DATA")
    with pytest.raises(ValueError, match="give file=PATH, or set NASH_LAB_DATA"):
        problem_by_name("code", task="mbpp/14")


def test_code_file_errors(tmp_path):
    for text, message in (
        ('{"task_id": 1}', "x.jsonl:1: neither"),
        ("\n3", "x.jsonl:2: expected an object"),
        ("[[1]]", "x.jsonl:1: expected an object"),
        ('{"a"', "x.jsonl:1: "),
        ('{"task_id": 1, "text": "", "test_list": []}', "has no tests"),
    ):
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            code_problems(tmp_path / "x.jsonl", runner)
    with pytest.raises(OSError):
        code_problems(tmp_path / "none.jsonl", runner)


def test_partial_credit_and_notes():
    task = code_tests("f", ("assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 9"), runner)
    state = task.transition(State(), "def f(x): return x * 2 if x == 2 else x")
    assert (
        task.reward(state) == pytest.approx(2 / 3)
        and "assert f(3) == 9" in state.note
        and state.note in task.context(state)
    )


def test_a_broken_sandbox_stops_the_run():
    def broken(code, tests):
        raise OSError("no sandbox")

    with pytest.raises(OSError):
        code_tests("f", ("assert 1",), broken).transition(State(), "x = 1")


# --- archive ---


def save_archive(archive, path):
    write_json(path, archive_to_json(archive))


def load_archive(path):
    return archive_from_json(read_json(path), str(path))


def misjudged(archive, problem):
    return [node.id for node in archive.live() if problem.reward(node.state) != node.reward]


def naive_puct(R, n, m, T, c, bonus):
    rank = {i: sorted(range(len(R)), key=lambda j: (-R[j], j)).index(i) for i in range(len(R))}
    total = sum(len(R) - r for r in rank.values())
    fade = lambda i: (
        math.sqrt(1 + T) / (1 + n[i]) if bonus == "paper" else math.sqrt(1 + T / (1 + n[i]))
    )
    return [
        (R[i] if m[i] is None else m[i])
        + c * max(max(R) - min(R), 1e-6) * (len(R) - rank[i]) / total * fade(i)
        for i in range(len(R))
    ]


@pytest.mark.parametrize("bonus", ["paper", "root"])
def test_puct(bonus):
    for k in range(1, 20):
        R, n = RNG.integers(0, 5, k) / 4, RNG.integers(0, 9, k)
        m = [None if RNG.random() < 0.5 else float(RNG.random()) for _ in R]
        T, best = int(n.sum()), np.array([math.nan if x is None else x for x in m])
        assert puct(R, n, best, T, 0.7, bonus).tolist() == pytest.approx(
            naive_puct(R.tolist(), n.tolist(), m, T, 0.7, bonus), abs=1e-12
        )


CONFIGS = [
    ArchiveConfig(size=30),
    ArchiveConfig(size=9, bonus="root", count="rollouts"),
    ArchiveConfig(size=30, children_of="parent", scale="found"),
    ArchiveConfig(children=1, c=0.0),
]


def test_archive_of_rewards_at_the_ends_of_float64():
    "Spreads beyond float64 and below it: scores stay finite, the best state is chosen first"
    for rewards in ([1e308, -1e308, 0.0], [1.7e308, -1.7e308, 1e308], [1e-320, 0.0, 5e-324]):
        archive = Archive(ArchiveConfig(c=0.1))
        for i, reward in enumerate(rewards):
            archive.add(State(f"{i}"), reward)
        none = np.full(3, math.nan)
        for total in (0, 10**6):
            scores = puct(np.array(rewards), np.zeros(3, int), none, total)
            assert np.isfinite(scores).all() and scores.argmax() == 0
        assert archive.select(3)[0] == 0
        archive.update(0, [(State("child"), rewards[0] * 0.9)])
        assert 0 in archive.select(1) or archive.nodes[archive.select(1)[0]].reward > 0


@pytest.mark.parametrize(
    "cfg", CONFIGS, ids=lambda c: f"{c.size}-{c.bonus}-{c.count}-{c.children_of}"
)
def test_archive_under_random_use(cfg, tmp_path):
    rng, archive = np.random.default_rng(1), Archive(cfg)
    for i in range(4):
        archive.add(State([i]), float(i) / 10)
    assert archive.add(State([0], "note"), 9.0) is None
    for _ in range(60):
        picks = archive.select(3)
        family = {i: {i, *ancestors(archive.nodes, i)} for i in picks}
        assert picks and all(a == b or a not in family[b] for a in picks for b in picks)
        for parent in picks:
            children = [
                (State(None) if rng.random() < 0.3 else State(int(x)), round(float(x) / 1000, 3))
                for x in rng.integers(0, 1000, 5)
            ]
            before, T = [(n.visits, n.best) for n in archive.nodes], archive.total
            stored = archive.update(parent, children)
            step = 1 if cfg.count == "expansions" else 5
            assert archive.total == T + step and len(stored) <= cfg.children
            for n, (visits, best) in zip(archive.nodes, before):
                assert n.visits - visits == step * (n.id in family[parent])
                valid = [r for s, r in children if s.solution is not None]
                assert n.best == (
                    max([*valid, *([] if best is None else [best])], default=None)
                    if n.id == parent
                    else best
                )
        live = archive.live()
        assert len(live) <= cfg.size and all(n.live for n in archive.nodes if n.parent is None)
        solutions = [json.dumps(n.state.solution) for n in live]
        assert len(set(solutions)) == len(solutions) and len({n.key for n in archive.nodes}) == len(
            archive.nodes
        )
        best = max((n.reward for n in archive.nodes))
        assert max(n.reward for n in live) == best, "the best never leaves"
        if cfg.children_of == "parent":
            assert max(sum(n.parent == p.id for n in live) for p in archive.nodes) <= 2
        save_archive(archive, tmp_path / "a.json")
        again = load_archive(tmp_path / "a.json")
        assert (again.cfg, again.total, again.nodes, again.select(5)) == (
            archive.cfg,
            archive.total,
            archive.nodes,
            archive.select(5),
        )


def test_archive_files_that_are_wrong(tmp_path):
    archive, path = Archive(), tmp_path / "a.json"
    archive.add(State([0.5, 0.5]), 2.0)
    archive.update(0, [(State([0.25, 0.75, 0.75, 0.25]), 1 / 0.40625)])
    save_archive(archive, path)
    whole = path.read_text()
    for old, new in (
        ('"parent": 0', '"parent": 1'),
        ('"parent": 0', '"parent": true'),
        ('"reward": 2.0', '"reward": NaN'),
        ('"reward": 2.0', '"reward": "2"'),
        ('"id": 1', '"id": 0'),
        ("0.25", "0.26"),
        ('"visits": 1', '"visits": -1'),
        ('"total"', '"totals"'),
        (whole, ""),
        (whole, "[]"),
        (whole, whole[:-9]),
        (whole, "[" * 100_000),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match="a.json"):
            load_archive(path)
    path.write_text(whole.replace("2.4615384615384617", "2.5"))
    assert misjudged(load_archive(path), step_function()) == [1]
    path.write_text(whole)
    assert misjudged(load_archive(path), step_function()) == []


def test_archive_refuses():
    archive = Archive(ArchiveConfig(size=3))
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not finite"):
            archive.add(State(1), bad)
    archive.add(State(1), 0.0), archive.add(State(2), 0.0)
    with pytest.raises(ValueError, match="size=3: expected room"):
        archive.add(State(3), 0.0)
    with pytest.raises(ValueError, match="parent=2"):
        archive.update(2, [])
    with pytest.raises(ValueError, match="not JSON"):
        archive.update(0, [(State(math.nan), 1.0)])
    with pytest.raises(ValueError, match="empty"):
        Archive().select(1)
