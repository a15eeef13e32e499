"""A made-up language pair whose distribution p(target | source) is known exactly.

A source sentence is a head, items (nouns, adjective-noun pairs, bracketed clauses up to three deep) and nothing else.
Its translation is written from left to right by a probabilistic automaton:

* the head is drawn from four registers; the very last word, the tail, must name the same register;
* a clause opens in one of two genders; the word that closes it must agree, and so must particles and adjectives inside;
* a noun has two synonyms, and the choice tends to repeat the last choice made in the same clause;
* a particle may precede a noun; an adjective may precede or follow its noun, by the register's habit.

At every point the possible next words differ from each other, so a target has one derivation only: log p is a plain sum,
and membership and entropy are exact.
"""
from __future__ import annotations

import math
import random
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

HEADS, NOUNS, ADJECTIVES, CLAUSE_TYPES, REGISTERS = 3, 8, 3, 3, 4
MAX_DEPTH = 3
MIN_LENGTH, MAX_LENGTH = 5, 40
SYNONYMS = "xy"
GENDERS = "fm"

# p(register | head); the four registers are never all as likely, and head h2 hardly prefers any.
REGISTER_PROBABILITY = ((0.55, 0.25, 0.15, 0.05), (0.1, 0.1, 0.4, 0.4), (0.3, 0.3, 0.2, 0.2))
NOUN_FIRST = (0.8, 0.2, 0.5, 0.9)  # by register
KEEP_SYNONYM = 0.8
KEEP_GENDER = 0.65
PARTICLE = 0.25
# What an item of a source sentence is, and how many items a sentence and a clause hold at most.
ITEM_WEIGHTS = {"noun": 0.45, "pair": 0.25, "clause": 0.30}
MAX_ITEMS, MAX_CLAUSE_ITEMS = 6, 3

Words = Tuple[str, ...]


class State(NamedTuple):
    """Where the automaton stands: before source word `position`, in a register, within clauses.

    Attributes:
        genders: of the open clauses, outermost first; the sentence itself has the register's parity.
        synonym: the last synonym chosen (0 or 1).
        pending: what the current item still owes: "" nothing yet written, "bare" a noun without particle,
            "noun" or "adjective" the other half of a pair.
    """

    position: int = 0
    register: int = 0
    genders: Tuple[int, ...] = ()
    synonym: int = 0
    pending: str = ""


Step = Tuple[float, State]


def next_words(source: Words, state: State) -> Dict[str, Step]:
    """The words that may come next, each with its probability and the state it leads to; {} at the end of the sentence."""
    if state.position == 0:
        probabilities = REGISTER_PROBABILITY[int(source[0][1:])]
        return {f"H{r}": (p, State(1, r, (r % 2,), r % 2)) for r, p in enumerate(probabilities)}
    if state.position == len(source):
        return {f"T{state.register}": (1.0, state._replace(position=state.position + 1))}
    if state.position > len(source):
        return {}
    kind, number = source[state.position][0], source[state.position][1:]
    return {"n": _noun, "a": _pair, "o": _open, "c": _close}[kind](source, state, number)


def _synonyms(state: State, noun: str, advance: int, pending: str = "", weight: float = 1.0) -> Dict[str, Step]:
    """The two words for a noun; the synonym chosen last is the likelier."""
    steps = {}
    for synonym, letter in enumerate(SYNONYMS):
        probability = weight * (KEEP_SYNONYM if synonym == state.synonym else 1 - KEEP_SYNONYM)
        after = state._replace(position=state.position + advance, synonym=synonym, pending=pending)
        steps[f"N{noun}{letter}"] = (probability, after)
    return steps


def _noun(source: Words, state: State, noun: str) -> Dict[str, Step]:
    if state.pending == "bare":
        return _synonyms(state, noun, 1)
    steps = _synonyms(state, noun, 1, weight=1 - PARTICLE)
    steps[f"P{GENDERS[state.genders[-1]]}"] = (PARTICLE, state._replace(pending="bare"))
    return steps


def _pair(source: Words, state: State, adjective: str) -> Dict[str, Step]:
    noun = source[state.position + 1][1:]
    word = f"A{adjective}{GENDERS[state.genders[-1]]}"
    if state.pending == "noun":
        return _synonyms(state, noun, 2)
    if state.pending == "adjective":
        return {word: (1.0, state._replace(position=state.position + 2, pending=""))}
    noun_first = NOUN_FIRST[state.register]
    steps = _synonyms(state, noun, 0, pending="adjective", weight=noun_first)
    steps[word] = (1 - noun_first, state._replace(pending="noun"))
    return steps


def _open(source: Words, state: State, clause_type: str) -> Dict[str, Step]:
    steps = {}
    for gender, letter in enumerate(GENDERS):
        probability = KEEP_GENDER if gender == state.genders[-1] else 1 - KEEP_GENDER
        after = state._replace(position=state.position + 1, genders=state.genders + (gender,), synonym=gender)
        steps[f"O{clause_type}{letter}"] = (probability, after)
    return steps


def _close(source: Words, state: State, clause_type: str) -> Dict[str, Step]:
    outer = state.genders[:-1]
    after = state._replace(position=state.position + 1, genders=outer, synonym=outer[-1])
    return {f"C{clause_type}{GENDERS[state.genders[-1]]}": (1.0, after)}


def sample_source(rng: random.Random) -> Words:
    """One source sentence, all of whose translations have MIN_LENGTH to MAX_LENGTH words."""
    while True:
        source = [f"h{rng.randrange(HEADS)}"]
        for _ in range(rng.randint(1, MAX_ITEMS)):
            source += _sample_item(rng, depth=0)
        shortest = len(source) + 1
        longest = shortest + sum(_takes_particle(source, i) for i in range(len(source)))
        if MIN_LENGTH <= shortest and longest <= MAX_LENGTH:
            return tuple(source)


def _sample_item(rng: random.Random, depth: int) -> List[str]:
    kinds = [kind for kind in ITEM_WEIGHTS if kind != "clause" or depth < MAX_DEPTH]
    kind = rng.choices(kinds, [ITEM_WEIGHTS[k] for k in kinds])[0]
    if kind == "clause":
        number = rng.randrange(CLAUSE_TYPES)
        inside = [w for _ in range(rng.randint(1, MAX_CLAUSE_ITEMS)) for w in _sample_item(rng, depth + 1)]
        return [f"o{number}", *inside, f"c{number}"]
    noun = f"n{rng.randrange(NOUNS)}"
    return [noun] if kind == "noun" else [f"a{rng.randrange(ADJECTIVES)}", noun]


def _takes_particle(source: Sequence[str], position: int) -> bool:
    return source[position][0] == "n" and source[position - 1][0] != "a"


def sample_target(source: Words, rng: random.Random) -> Words:
    """One translation, drawn from p(· | source)."""
    words, state = [], State()
    while True:
        steps = next_words(source, state)
        if not steps:
            return tuple(words)
        word = rng.choices(list(steps), [p for p, _ in steps.values()])[0]
        words.append(word)
        state = steps[word][1]


def log_probability(source: Words, target: Sequence[str]) -> float:
    """log p(target | source) in nats, −inf where target is not a translation of source."""
    total, state = 0.0, State()
    for word in target:
        steps = next_words(source, state)
        if word not in steps:
            return -math.inf
        probability, state = steps[word]
        total += math.log(probability)
    return -math.inf if next_words(source, state) else total


def is_translation(source: Words, target: Sequence[str]) -> bool:
    """Whether p(target | source) > 0."""
    return log_probability(source, target) > -math.inf


def entropy(source: Words) -> float:
    """Exact entropy of p(· | source) in nats, by recursion over the automaton's states."""
    known: Dict[State, float] = {}

    def rest(state: State) -> float:
        if state not in known:
            steps = next_words(source, state).values()
            known[state] = sum(p * (rest(after) - math.log(p)) for p, after in steps)
        return known[state]

    return rest(State())


def translations(source: Words) -> Iterator[Tuple[Words, float]]:
    """All translations of a (short) source with their probabilities."""
    stack: List[Tuple[Words, float, State]] = [((), 1.0, State())]
    while stack:
        words, probability, state = stack.pop()
        steps = next_words(source, state)
        if not steps:
            yield words, probability
        for word, (p, after) in steps.items():
            stack.append((words + (word,), probability * p, after))


def sample_pairs(count: int, seed: int) -> List[Tuple[Words, Words]]:
    """`count` sentence pairs, the same for the same seed."""
    rng = random.Random(seed)
    sources = [sample_source(rng) for _ in range(count)]
    return [(source, sample_target(source, rng)) for source in sources]
