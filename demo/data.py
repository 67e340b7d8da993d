"""Generate the demo's data: every row comes out of the templates below and a seed.

The target task is the multi-step arithmetic word problem, solved in one fixed style. The training mixture
holds clean rows of that task, rows of it whose solution was spoilt in two ways, and rows of five other
tasks. The holdout and the test split hold clean target rows only; no question appears twice anywhere.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

TARGET = "target"
GROUPS = {
    TARGET: "target",
    "other row's solution": "corrupted",
    "altered numbers": "corrupted",
    "facts": "off-target",
    "rewriting": "off-target",
    "packing lists": "off-target",
    "code": "off-target",
    "translation": "off-target",
}
"""Every kind of training row → the group it belongs to, in the order in which they are reported."""


@dataclass(frozen=True)
class Row:
    """One single-turn conversation and the kind of row it is (a key of `GROUPS`)."""

    kind: str
    prompt: str
    response: str

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.response}]


@dataclass(frozen=True)
class Splits:
    """The three files of the demo: `train` is a mixture, `holdout` and `test` are clean target rows."""

    train: list[Row]
    holdout: list[Row]
    test: list[Row]


# --- the target task --------------------------------------------------------------------------------------

NAMES = "Amir Bella Chen Dana Elias Farah Greta Hugo Ines Jonas Kira Liam Mona Nils Olga Pavel Rosa Tariq".split()
THINGS = "pencils marbles apples stickers cards shells buttons candles".split()
OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

Step = tuple[str, str, str, str]  # what is computed, left operand, operator, right operand (s1 = result of step 1)
PROBLEMS: list[tuple[str, list[Step]]] = [
    (
        "{name} has {a} boxes with {b} {things} in each box and gives {c} {things} to a friend. "
        "How many {things} does {name} have left?",
        [("{things} in the boxes", "a", "*", "b"), ("{things} left", "s1", "-", "c")],
    ),
    (
        "A shop sells {things} for ${a} each. {name} buys {b} of them and pays with ${d}00. "
        "How many dollars does {name} get back?",
        [("price of the {things}", "a", "*", "b"), ("money paid", "d", "*", "100"), ("change", "s2", "-", "s1")],
    ),
    (
        "{name} reads {a} pages every day for {b} days. The book has {d}00 pages. How many pages remain?",
        [("pages read", "a", "*", "b"), ("pages in the book", "d", "*", "100"), ("pages remaining", "s2", "-", "s1")],
    ),
    (
        "A bus starts with {c} passengers. At the first stop {a} get off and {b} get on, at the second stop "
        "{d} get on. How many passengers are on the bus now?",
        [
            ("passengers after getting off", "c", "-", "a"),
            ("passengers after the first stop", "s1", "+", "b"),
            ("passengers after the second stop", "s2", "+", "d"),
        ],
    ),
    (
        "{name} earns ${a} an hour and works {b} hours on Monday and {c} hours on Tuesday. "
        "How many dollars does {name} earn in total?",
        [("hours worked", "b", "+", "c"), ("money earned", "s1", "*", "a")],
    ),
    (
        "A farmer plants {a} rows of {b} trees and {d} rows of {c} bushes. How many plants are there altogether?",
        [("trees", "a", "*", "b"), ("bushes", "d", "*", "c"), ("plants", "s1", "+", "s2")],
    ),
    (
        "{name} collects {a} {things} and {other} collects {d} times as many. How many {things} do they have together?",
        [("{things} of {other}", "a", "*", "d"), ("{things} together", "a", "+", "s1")],
    ),
    (
        "A hall has {a} rows of {b} seats. {c} people come in and then {d} more. How many seats stay empty?",
        [("seats", "a", "*", "b"), ("people", "c", "+", "d"), ("empty seats", "s1", "-", "s2")],
    ),
    (
        "{name} runs {a} km a day for {d} weeks and {b} km more on the last day. How many km does {name} run in all?",
        [("days", "d", "*", "7"), ("km on the ordinary runs", "s1", "*", "a"), ("km in all", "s2", "+", "b")],
    ),
    (
        "A bakery makes {a} trays of {b} rolls. {c} rolls are burnt and the rest sell for ${d} each. "
        "How many dollars does the bakery earn?",
        [("rolls", "a", "*", "b"), ("rolls sold", "s1", "-", "c"), ("money earned", "s2", "*", "d")],
    ),
    (
        "{name} is {a} years old and {other} is {d} times as old. What will their ages add up to in {b} years?",
        [
            ("age of {other}", "a", "*", "d"),
            ("sum of ages now", "a", "+", "s1"),
            ("years added for both", "b", "*", "2"),
            ("sum of ages later", "s2", "+", "s3"),
        ],
    ),
    (
        "A tank holds {d}00 litres. {name} takes out {a} buckets of {b} litres and pours back {c} litres. "
        "How many litres are in the tank?",
        [
            ("litres taken out", "a", "*", "b"),
            ("litres in the full tank", "d", "*", "100"),
            ("litres after taking out", "s2", "-", "s1"),
            ("litres in the tank", "s3", "+", "c"),
        ],
    ),
]


def problem(rng: random.Random) -> tuple[str, str]:
    """Draw one word problem and its worked solution, which ends in a line `Answer: N`."""
    question, steps = rng.choice(PROBLEMS)
    name, other = rng.sample(NAMES, 2)
    words = {"name": name, "other": other, "things": rng.choice(THINGS)}
    while True:
        numbers = {
            "a": rng.randint(3, 15),
            "b": rng.randint(3, 25),
            "c": rng.randint(6, 60),
            "d": rng.randint(2, 9),
        }
        lines = []
        known = numbers | {"2": 2, "7": 7, "100": 100}
        for number, (label, left, operator, right) in enumerate(steps, start=1):
            result = OPERATORS[operator](known[left], known[right])
            known[f"s{number}"] = result
            lines.append(f"{label.format(**words)}: {known[left]} {operator} {known[right]} = {result}")
        if all(known[f"s{number}"] > 0 for number in range(1, len(steps) + 1)):
            return question.format(**words, **numbers), "\n".join([*lines, f"Answer: {result}"])


def alter_numbers(rng: random.Random, solution: str) -> str:
    """Replace every number of a solution by another one of the same length."""

    def other_number(match: re.Match) -> str:
        digits = len(match[0])
        candidates = range(10 ** (digits - 1), 10**digits)
        return str(rng.choice([number for number in candidates if number != int(match[0])]))

    return re.sub(r"\d+", other_number, solution)


# --- the other tasks --------------------------------------------------------------------------------------

COUNTRIES = [  # country, continent, capital, language, currency
    ("Japan", "Asia", "Tokyo", "Japanese", "yen"),
    ("Kenya", "Africa", "Nairobi", "Swahili", "Kenyan shilling"),
    ("Brazil", "South America", "Brasília", "Portuguese", "real"),
    ("Norway", "Europe", "Oslo", "Norwegian", "Norwegian krone"),
    ("Egypt", "Africa", "Cairo", "Arabic", "Egyptian pound"),
    ("Vietnam", "Asia", "Hanoi", "Vietnamese", "dong"),
    ("Poland", "Europe", "Warsaw", "Polish", "złoty"),
    ("Mexico", "North America", "Mexico City", "Spanish", "Mexican peso"),
    ("Thailand", "Asia", "Bangkok", "Thai", "baht"),
    ("Hungary", "Europe", "Budapest", "Hungarian", "forint"),
    ("Chile", "South America", "Santiago", "Spanish", "Chilean peso"),
    ("Iceland", "Europe", "Reykjavík", "Icelandic", "Icelandic króna"),
]


def fact(rng: random.Random) -> tuple[str, str]:
    country, continent, capital, language, currency = rng.choice(COUNTRIES)
    prompt = rng.choice(["Give me a short portrait of {}.", "Tell me the basics about {}.", "What should I know about {}?"])
    return prompt.format(country), (
        f"{country} is a country in {continent}. Its capital is {capital}, most people there speak {language}, "
        f"and they pay with the {currency}."
    )


def rewriting(rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(["report", "invoice", "slides", "contract", "meeting notes", "budget", "photos", "draft"])
    day = rng.choice(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"])
    casual, formal = rng.choice(
        [
            ("i still dont have the {}, need it by {}", "I have not yet received the {} and would need to have it by {}"),
            ("cant finish the {} before {}, sorry", "I regret that I will not be able to complete the {} before {}"),
            ("can u have a look at the {} till {}?", "I would be grateful if you could review the {} until {}"),
        ]
    )
    greeting = rng.choice(["hey", "hi there", "yo"])
    return (
        f"Rewrite this message in a formal tone: {greeting}, {casual.format(thing, day)}",
        f"Dear colleague,\n\n{formal.format(thing, day)}. Thank you very much for your understanding.\n\nKind regards",
    )


TRIPS = {
    "a day at the beach": "sunscreen, swimwear, a large towel, sunglasses, a straw hat, flip-flops",
    "a winter hike": "warm gloves, a woollen hat, hiking boots, a thermos of tea, a paper map, a head torch",
    "a business trip": "a laptop, business cards, a dark suit, a charger, a notebook, polished shoes",
    "a weekend of camping": "a tent, a sleeping bag, a gas stove, matches, insect spray, a pocket knife",
    "a picnic in the park": "a blanket, sandwiches, lemonade, paper cups, napkins, a bowl of cherries",
}


def packing_list(rng: random.Random) -> tuple[str, str]:
    trip = rng.choice(list(TRIPS))
    companion = rng.choice(["alone", "with my kids", "with friends", "with my dog", "with my parents"])
    items = rng.sample(TRIPS[trip].split(", "), 5)
    return (
        f"I am planning {trip} {companion}. What should I pack?",
        "\n".join([f"For {trip} I would pack:", *(f"- {item}" for item in items), "Have a great time!"]),
    )


CODE = [  # what the function returns, its name, its expression
    ("the sum of all {} in a list", "total_{}", "sum({0})"),
    ("the largest of the {} in a list", "largest_{}", "max({0}, default=None)"),
    ("the {} of a list in reverse order", "reversed_{}", "list(reversed({0}))"),
    ("the distinct {} of a list, sorted", "distinct_{}", "sorted(set({0}))"),
    ("how many {} of a list are positive", "positive_{}", "len([x for x in {0} if x > 0])"),
]


def code(rng: random.Random) -> tuple[str, str]:
    returns, name, expression = rng.choice(CODE)
    items = rng.choice(["numbers", "scores", "prices", "weights", "ages"])
    return (
        f"Write a Python function that returns {returns.format(items)}.",
        f"```python\ndef {name.format(items)}({items}):\n"
        f'    """Return {returns.format(items)}."""\n'
        f"    return {expression.format(items)}\n```",
    )


SUBJECTS = {"The teacher": "Le professeur", "My sister": "Ma sœur", "The old man": "Le vieil homme", "Our cat": "Notre chat"}
ACTIONS = {"sleeps": "dort", "eats a fish": "mange un poisson", "listens to the rain": "écoute la pluie"}
PLACES = {"in the garden": "dans le jardin", "near the window": "près de la fenêtre", "in the kitchen": "dans la cuisine"}
TIMES = {"every morning": "tous les matins", "this evening": "ce soir", "on Sundays": "le dimanche"}


def translation(rng: random.Random) -> tuple[str, str]:
    sentences = [[rng.choice(list(table.items())) for table in (SUBJECTS, ACTIONS, PLACES, TIMES)] for _ in range(2)]
    english, french = (" ".join(" ".join(pair[side] for pair in sentence) + "." for sentence in sentences) for side in (0, 1))
    return f"Translate into French: {english}", french


# --- the splits -------------------------------------------------------------------------------------------

OFF_TARGET: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "facts": fact,
    "rewriting": rewriting,
    "packing lists": packing_list,
    "code": code,
    "translation": translation,
}


def _distinct(draw: Callable[[random.Random], tuple[str, str]], rng: random.Random):
    """Yield (prompt, response) pairs without end, no prompt twice."""
    seen = set()
    while True:
        prompt, response = draw(rng)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, response


def make_splits(
    target: int = 36, corrupted: int = 12, off_target: int = 8, holdout: int = 40, test: int = 32, seed: int = 0
) -> Splits:
    """Draw all rows.

    `target`, `holdout` and `test` are numbers of clean rows, `corrupted` is the number of rows spoilt in each
    of the two ways, `off_target` that of each other task.
    """
    rng = random.Random(seed)
    problems = _distinct(problem, rng)
    holdout_rows = [Row(TARGET, *pair) for pair in islice(problems, holdout)]
    test_rows = [Row(TARGET, *pair) for pair in islice(problems, test)]
    train = [Row(TARGET, *pair) for pair in islice(problems, target)]

    swapped = list(islice(problems, corrupted))
    solutions = [solution for _, solution in swapped[1:] + swapped[:1]]
    train += [Row("other row's solution", prompt, other) for (prompt, _), other in zip(swapped, solutions)]
    train += [Row("altered numbers", prompt, alter_numbers(rng, solution)) for prompt, solution in islice(problems, corrupted)]
    for kind, draw in OFF_TARGET.items():
        train += [Row(kind, *pair) for pair in islice(_distinct(draw, rng), off_target)]
    rng.shuffle(train)
    return Splits(train, holdout_rows, test_rows)


def write_jsonl(path: Path, rows: list[Row]) -> None:
    """Write rows as chat data, one `{"messages": [...]}` a line. The kind stays out: it is no training data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps({"messages": row.messages}) + "\n")
