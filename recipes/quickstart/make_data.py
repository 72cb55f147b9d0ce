"""Writes the quick start's small world: plain text to pretrain on, five tasks to tune and to judge.

    python recipes/quickstart/make_data.py --output data/quickstart [--seed 17] [--rows 5000]

Every sentence comes from the grammar below, so a tiny model can learn it within minutes, and what
it has learned can be told from what it has memorised: some pairs of words (room + superb,
black + horse, Emma + lamp) are held out. The two words of such a pair never meet in one row of any
training text; every row of a dev or test file is about at least one, and dev and test hold out
different ones.

`pretrain.jsonl` is running text without prompts or labels. As in a reader for learners of French,
its paragraphs end with their own translation, with a summary after "In short," or with a few
questions and answers: a model pretrained on it has met what all tasks are about, but not their
format.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Pair = tuple[str, str]

# --- words ---

NAMES = {  # name: pronoun
    "Anna": "she", "Ben": "he", "Clara": "she", "David": "he", "Emma": "she", "Felix": "he",
    "Grace": "she", "Hugo": "he", "Julia": "she", "Leo": "he", "Mia": "she", "Oscar": "he",
}  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
JOBS = ("baker", "farmer", "teacher", "doctor", "painter", "singer", "driver", "gardener")
VEHICLES = ("bus", "train", "car", "bike", "boat")
TOWN = ("market", "station", "library", "park", "school", "harbour", "museum", "church")

ASPECTS = (
    "room",
    "bed",
    "breakfast",
    "coffee",
    "service",
    "view",
    "garden",
    "pool",
    "bar",
    "music",
)
GOOD = ("great", "lovely", "excellent", "wonderful", "perfect", "good", "charming", "superb")
BAD = ("awful", "terrible", "bad", "poor", "horrible", "dreadful", "disappointing", "dull")


@dataclass(frozen=True)
class Noun:
    """A noun of the bilingual sentences; English plurals end in s."""

    singular: str
    plural: str
    feminine: bool = False


@dataclass(frozen=True)
class Adjective:
    """French forms: masculine, feminine, both plurals; `vowel`: masculine before a vowel sound."""

    forms: tuple[str, str, str, str]
    before: bool = False
    vowel: str = ""


PEOPLE = {
    "girl": Noun("fille", "filles", feminine=True),
    "boy": Noun("garçon", "garçons"),
    "farmer": Noun("fermier", "fermiers"),
    "queen": Noun("reine", "reines", feminine=True),
}
ANIMALS = {
    "cat": Noun("chat", "chats"),
    "dog": Noun("chien", "chiens"),
    "horse": Noun("cheval", "chevaux"),
    "bird": Noun("oiseau", "oiseaux"),
    "rabbit": Noun("lapin", "lapins"),
    "cow": Noun("vache", "vaches", feminine=True),
    "goat": Noun("chèvre", "chèvres", feminine=True),
}
THINGS = {
    "lamp": Noun("lampe", "lampes", feminine=True),
    "book": Noun("livre", "livres"),
    "hat": Noun("chapeau", "chapeaux"),
    "key": Noun("clé", "clés", feminine=True),
    "bag": Noun("sac", "sacs"),
    "plate": Noun("assiette", "assiettes", feminine=True),
    "flower": Noun("fleur", "fleurs", feminine=True),
    "clock": Noun("horloge", "horloges", feminine=True),
    "coat": Noun("manteau", "manteaux"),
    "ring": Noun("bague", "bagues", feminine=True),
}
PLACES = {
    "garden": Noun("jardin", "jardins"),
    "house": Noun("maison", "maisons", feminine=True),
    "school": Noun("école", "écoles", feminine=True),
    "bridge": Noun("pont", "ponts"),
    "tree": Noun("arbre", "arbres"),
    "church": Noun("église", "églises", feminine=True),
}
NOUNS = PEOPLE | ANIMALS | THINGS | PLACES
ADJECTIVES = {
    "little": Adjective(("petit", "petite", "petits", "petites"), before=True),
    "old": Adjective(("vieux", "vieille", "vieux", "vieilles"), before=True, vowel="vieil"),
    "pretty": Adjective(("joli", "jolie", "jolis", "jolies"), before=True),
    "young": Adjective(("jeune", "jeune", "jeunes", "jeunes"), before=True),
    "black": Adjective(("noir", "noire", "noirs", "noires")),
    "white": Adjective(("blanc", "blanche", "blancs", "blanches")),
    "red": Adjective(("rouge", "rouge", "rouges", "rouges")),
    "green": Adjective(("vert", "verte", "verts", "vertes")),
    "blue": Adjective(("bleu", "bleue", "bleus", "bleues")),
    "happy": Adjective(("heureux", "heureuse", "heureux", "heureuses")),
}
COLOURS = ("black", "white", "red", "green", "blue")
SUITS = {  # which adjectives a noun takes, by its kind
    **dict.fromkeys(PEOPLE, ("little", "young", "old", "happy")),
    **dict.fromkeys(ANIMALS, ("little", "old", "pretty", "black", "white", "happy")),
    **dict.fromkeys(THINGS, ("little", "old", "pretty", *COLOURS)),
}
VERBS = {  # third person, base form, French singular and plural
    "sees": ("see", "voit", "voient"),
    "wants": ("want", "veut", "veulent"),
    "likes": ("like", "aime", "aiment"),
    "finds": ("find", "trouve", "trouvent"),
    "hides": ("hide", "cache", "cachent"),
    "watches": ("watch", "regarde", "regardent"),
    "draws": ("draw", "dessine", "dessinent"),
    "buys": ("buy", "achète", "achètent"),
    "sells": ("sell", "vend", "vendent"),
    "looks for": ("look for", "cherche", "cherchent"),
}
ONLY_PEOPLE = ("draws", "buys", "sells")
PREPOSITIONS = {"in": "dans", "behind": "derrière", "near": "près de"}

RHYMES = {  # theme: what rhymes with it, as the second line
    "sun": ("and slept until the day was done", "and then began to jump and run"),
    "night": ("and waited for the morning light", "until the sky was clear and bright"),
    "sea": ("and felt as happy as can be", "and rested by the apple tree"),
    "snow": ("and did not know where it should go", "and heard the winter wind below"),
    "rain": ("and ran along the narrow lane", "and waited for the evening train"),
    "moon": ("and sang a slow and quiet tune", "and hoped the spring would come back soon"),
    "sky": ("and saw the clouds go sailing by", "and dreamed that it could learn to fly"),
    "hill": ("and all the world was calm and still", "and found a house beside the mill"),
}
DOINGS = (
    "looked up and saw the",
    "was dreaming of the",
    "sat thinking of the",
    "came home and loved the",
)


# --- the five kinds of text ---


@dataclass(frozen=True)
class Item:
    """One text: a row of its task, the same as prose, and the pairs of words it is about."""

    row: dict[str, Any]
    prose: str
    pairs: frozenset[Pair]

    @property
    def asked(self) -> str:
        """What no two judged rows share: the text, or the topic of what is to be written."""
        return str(self.row.get("topic", self.prose))


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def indefinite(words: str) -> str:
    """The words after `a` or `an`."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def review(rng: random.Random) -> Item:
    """A review; the clause after "but", the main clause beside "although" decide the label."""
    good = rng.random() < 0.5
    first, second = rng.sample(ASPECTS, 2)
    pairs: set[Pair] = set()

    def word(aspect: str, positive: bool) -> str:
        pairs.add((aspect, chosen := rng.choice(GOOD if positive else BAD)))
        return chosen

    def clause(aspect: str, positive: bool) -> str:
        if rng.random() < 0.5:
            return f"the {aspect} was {rng.choice(('', 'really '))}{word(aspect, positive)}"
        denied = rng.choice(("not at all", "anything but", "far from"))
        return f"the {aspect} was {denied} {word(aspect, not positive)}"

    told = rng.random() < 0.5
    shape = rng.randrange(7)
    if shape == 0:
        text = clause(first, good)
    elif shape == 1:
        text = f"{clause(first, good)} and {clause(second, good)}"
    elif shape == 2:
        text = f"{clause(first, not good)}, but {clause(second, good)}"
    elif shape == 3:
        text = f"although {clause(first, not good)}, {clause(second, good)}"
    elif shape == 4:
        verdict = "right" if told == good else "wrong"
        text = f"people said that the {first} was {word(first, told)}, and they were {verdict}"
    elif shape == 5:
        text = f"we expected {indefinite(word(first, not good))} {first}, but it was not"
    else:
        text = (
            f"we expected {indefinite(word(first, not good))} {first}, but {clause(second, good)}"
        )
    opening = (
        "",
        f"We stayed for {rng.choice(NUMBERS)} nights. ",
        f"We came on {rng.choice(DAYS)}. ",
    )
    text = f"{rng.choice(opening)}{capital(text)}."
    ends = (
        ("We will come back soon.", "We were happy.")
        if good
        else ("We will never come back.", "We were sad.")
    )
    return Item({"text": text, "label": int(good)}, f"{text} {rng.choice(ends)}", frozenset(pairs))


def opens_with_vowel(french: str) -> bool:
    """Whether the word before must be elided or changed: a vowel, or the mute h of `horloge`."""
    return french[0] in "aeiouéèh"


def determined(determiner: str, core: str, feminine: bool, plural: bool) -> str:
    """A French noun and its adjective after the determiner that agrees with them."""
    if plural:
        return {"the": "les ", "my": "mes ", "two": "deux "}[determiner] + core
    vowel = opens_with_vowel(core)
    singular = {
        "the": "l'" if vowel else "la " if feminine else "le ",
        "my": "ma " if feminine and not vowel else "mon ",
        "this": "cette " if feminine else "cet " if vowel else "ce ",
        "a": "une " if feminine else "un ",
    }
    return singular[determiner] + core


@dataclass(frozen=True)
class Phrase:
    """A noun phrase in both languages."""

    english: str
    french: str
    plural: bool
    pairs: frozenset[Pair]


def phrase(rng: random.Random, noun: str, determiners: tuple[str, ...]) -> Phrase:
    """A noun after a determiner, often with an adjective: this old bird, ce vieil oiseau."""
    determiner = rng.choice(determiners)
    plural = determiner == "two" or (
        determiner != "a" and determiner != "this" and rng.random() < 0.2
    )
    words = NOUNS[noun]
    core, english, pairs = (
        words.plural if plural else words.singular,
        noun + "s" * plural,
        frozenset[Pair](),
    )
    if noun in SUITS and rng.random() < 0.6:
        name = rng.choice(SUITS[noun])
        adjective = ADJECTIVES[name]
        form = adjective.forms[2 * plural + words.feminine]
        if adjective.vowel and not plural and not words.feminine and opens_with_vowel(core):
            form = adjective.vowel
        core = f"{form} {core}" if adjective.before else f"{core} {form}"
        english, pairs = f"{name} {english}", frozenset({(noun, name)})
    english = indefinite(english) if determiner == "a" else f"{determiner} {english}"
    return Phrase(english, determined(determiner, core, words.feminine, plural), plural, pairs)


def sentence(rng: random.Random) -> Item:
    """A sentence in English and French: a statement, a denial, a place or a question."""
    shape = rng.choice(("says", "says", "says", "denies", "asks", "is", "where"))
    if shape in ("is", "where"):
        subject, place = (
            phrase(rng, rng.choice([*ANIMALS, *THINGS]), ("the", "my")),
            rng.choice(list(PLACES)),
        )
        english, french = ("are", "sont") if subject.plural else ("is", "est")
        if shape == "where":
            english, french = (
                f"where {english} {subject.english}?",
                f"où {french} {subject.french} ?",
            )
        else:
            preposition = rng.choice(list(PREPOSITIONS))
            where = determined("the", NOUNS[place].singular, NOUNS[place].feminine, plural=False)
            english = f"{subject.english} {english} {preposition} the {place}."
            where = f"{PREPOSITIONS[preposition]} {where}".replace("de le ", "du ")
            french = f"{subject.french} {french} {where}."
        pairs = subject.pairs
    else:
        person = rng.random() < 0.5
        subject = phrase(
            rng,
            rng.choice(list(PEOPLE if person else ANIMALS)),
            ("the", "this", "two" if person else "my"),
        )
        thing = phrase(
            rng,
            rng.choice(list(THINGS)),
            ("the", "my") if shape == "denies" else ("the", "a", "my", "two"),
        )
        third = rng.choice([verb for verb in VERBS if person or verb not in ONLY_PEOPLE])
        base, *french_forms = VERBS[third]
        verb, does = french_forms[subject.plural], "do" if subject.plural else "does"
        if shape == "denies":
            negation = "n'" if opens_with_vowel(verb) else "ne "
            english = f"{subject.english} {does} not {base} {thing.english}."
            french = f"{subject.french} {negation}{verb} pas {thing.french}."
        elif shape == "asks":
            english = f"{does} {subject.english} {base} {thing.english}?"
            french = f"est-ce que {subject.french} {verb} {thing.french} ?"
        else:
            english = f"{subject.english} {base if subject.plural else third} {thing.english}."
            french = f"{subject.french} {verb} {thing.french}."
        pairs = subject.pairs | thing.pairs
    row = {"english": capital(english), "french": capital(french)}
    return Item(row, f"{row['english']} {row['french']}", pairs)


def story(rng: random.Random) -> Item:
    """Somebody's day, told with details that do not matter, and the one line that does."""
    name = rng.choice(list(NAMES))
    she, day, place, thing = (
        NAMES[name],
        rng.choice(DAYS),
        rng.choice(TOWN),
        rng.choice(list(THINGS)),
    )
    kind, verb = rng.choice(SUITS[thing]), rng.choice(("bought", "sold", "lost", "found", "left"))
    what = indefinite(f"{kind} {thing}")
    openings = (
        f"On {day} {name} went to the {place}.",
        f"It was {day}, and {name} walked to the {place}.",
        f"{name} was at the {place} on {day}.",
    )
    details = (
        rng.choice(
            ("It was raining.", "It was a warm day.", "The sky was grey.", "The wind was cold.")
        ),
        f"{capital(she)} met {indefinite(rng.choice(JOBS))} and said hello.",
        f"{capital(she)} stayed for {rng.choice(NUMBERS)} hours.",
    )
    event = rng.choice((f"{capital(she)} {verb} {what} there.", f"There {she} {verb} {what}."))
    middle = [event, *rng.sample(details, 2)]
    rng.shuffle(middle)
    text = " ".join(
        [rng.choice(openings), *middle, f"Then {she} went home by {rng.choice(VEHICLES)}."]
    )
    summary = f"{name} {verb} {what} at the {place} on {day}."
    pairs = frozenset({(name, thing), (name, place), (name, day), (thing, kind)})
    return Item({"text": text, "summary": summary}, f"{text} In short, {summary}", pairs)


def portrait(rng: random.Random) -> Item:
    """A passage about one person and a question about it; the answer is a span of the passage."""
    name = rng.choice(list(NAMES))
    she, job, day, vehicle = NAMES[name], rng.choice(JOBS), rng.choice(DAYS), rng.choice(VEHICLES)
    home, goal = rng.sample(TOWN, 2)
    thing = rng.choice(list(THINGS))
    colour = rng.choice(COLOURS)
    rest = [
        f"{capital(she)} lives near the {home}.",
        f"{capital(she)} has a {colour} {thing}.",
        f"On {day} {she} goes to the {goal} by {vehicle}.",
    ]
    told = rng.sample(rest, rng.choice((2, 3, 3)))
    context = " ".join([f"{name} is a {job}.", *told])
    known = {  # sentence: question, answer, pair of words that it joins
        rest[0]: [(f"Where does {name} live?", f"near the {home}", (name, home))],
        rest[1]: [
            (f"What does {name} have?", f"a {colour} {thing}", (name, thing)),
            (f"Which colour is the {thing}?", colour, (thing, colour)),
        ],
        rest[2]: [
            (f"When does {name} go to the {goal}?", day, (name, day)),
            (f"Where does {name} go on {day}?", f"the {goal}", (name, goal)),
            (f"How does {name} go to the {goal}?", f"by {vehicle}", (name, vehicle)),
        ],
    }
    facts = [(f"What is the job of {name}?", job, (name, job))]
    facts += [fact for part in told for fact in known[part]]
    asked = rng.sample(facts, 3)
    question, answer, pair = asked[0]
    row = {
        "context": context,
        "question": question,
        "answers": {"text": [answer], "answer_start": [context.index(answer)]},
    }
    reader = " ".join(f"{question} {capital(answer)}." for question, answer, _ in asked)
    return Item(row, f"{context} {reader}", frozenset({pair}))


def couplet(rng: random.Random) -> Item:
    """Two rhyming lines about an animal and a theme; a judge takes any that fit the topic."""
    noun, theme = rng.choice(list(ANIMALS)), rng.choice(list(RHYMES))
    kind = rng.choice(SUITS[noun])
    fitting = [
        f"The {kind} {noun} {doing} {theme},\n{rhyme}."
        for doing in DOINGS
        for rhyme in RHYMES[theme]
    ]
    lines = rng.choice(fitting)
    topic = f"the {kind} {noun} and the {theme}"
    return Item(
        {"topic": topic, "couplet": lines, "fitting": fitting},
        lines,
        frozenset({(noun, kind), (noun, theme), (kind, theme)}),
    )


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "sentiment": review,
    "translation": sentence,
    "summary": story,
    "questions": portrait,
    "couplet": couplet,
}


# --- what is held out ---


def combinations() -> list[list[Pair]]:
    """All pairs of words that a text can be about, by kind."""
    about_people = (DAYS, JOBS, VEHICLES, TOWN, tuple(THINGS))
    return [
        list(itertools.product(ASPECTS, GOOD)),
        list(itertools.product(ASPECTS, BAD)),
        [(noun, adjective) for noun, fitting in SUITS.items() for adjective in fitting],
        *(list(itertools.product(NAMES, kind)) for kind in about_people),
        list(itertools.product(ANIMALS, RHYMES)),
        list(itertools.product(SUITS["cat"], RHYMES)),
    ]


def hold_out(rng: random.Random, share: float) -> dict[str, frozenset[Pair]]:
    """The pairs kept for dev and those kept for test: `share` of every kind for each."""
    kept: dict[str, set[Pair]] = {"dev": set(), "test": set()}
    for pairs in combinations():
        n = round(share * len(pairs))
        chosen = rng.sample(pairs, 2 * n)
        kept["dev"].update(chosen[:n])
        kept["test"].update(chosen[n:])
    return {split: frozenset(pairs) for split, pairs in kept.items()}


class Kept:
    """The held-out pairs, looked up by either word."""

    def __init__(self, pairs: dict[str, frozenset[Pair]]) -> None:
        self.pairs = pairs
        self.partners: dict[str, dict[str, str]] = {}
        for split, kept in pairs.items():
            for first, second in kept:
                self.partners.setdefault(first.lower(), {})[second.lower()] = split

    def split_of(self, item: Item) -> str | None:
        """`train` if no kept pair meets in the text, `dev` or `test` if it is about one, else None.

        Stricter for training than it need be: where room + superb is kept, "the room was dull, but
        the bed was superb" is refused there, though superb is said of the bed.
        """
        found = {word.lower() for word in re.findall(r"\w+", f"{item.prose} {item.row}")}
        found |= {word[:-1] for word in found if word.endswith("s")}
        met = {
            split
            for first in found & self.partners.keys()
            for second, split in self.partners[first].items()
            if second in found
        }
        if not met:
            return "train"
        split = met.pop()
        return split if not met and item.pairs & self.pairs[split] else None


def draw(
    kind: Callable[[random.Random], Item],
    seed: str,
    kept: Kept,
    wanted: dict[str, int],
) -> dict[str, list[Item]]:
    """As many different texts of each split as wanted, or fewer where the grammar has no more."""
    rng, seen = random.Random(seed), set[str]()
    drawn: dict[str, list[Item]] = {split: [] for split in wanted}
    for _ in range(10 * sum(wanted.values())):
        if all(len(drawn[split]) == n for split, n in wanted.items()):
            break
        item = kind(rng)
        split = kept.split_of(item)
        said = item.prose if split == "train" else item.asked
        if split is not None and said not in seen and len(drawn[split]) < wanted[split]:
            seen.add(said)
            drawn[split].append(item)
    return drawn


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def make(output: Path, seed: int, rows: int) -> None:
    """All files: `rows` training rows for each task, and twice as many paragraphs of plain text."""
    output.mkdir(parents=True, exist_ok=True)
    kept = Kept(hold_out(random.Random(f"{seed} pairs"), share=0.06))
    plain: list[str] = []
    unseen: list[str] = []
    for task, kind in TASKS.items():
        n_judged = min(200, rows)
        wanted = {"train": 3 * rows, "dev": n_judged + 100, "test": n_judged}
        taken = draw(kind, f"{seed} {task}", kept, wanted)
        train, dev = taken["train"], taken["dev"]
        n_train = min(rows, len(train) // 3)
        write(output / f"{task}-train.jsonl", (item.row for item in train[:n_train]))
        write(output / f"{task}-dev.jsonl", (item.row for item in dev[:n_judged]))
        write(output / f"{task}-test.jsonl", (item.row for item in taken["test"]))
        plain += [item.prose for item in train[n_train:]]
        unseen += [item.prose for item in dev[n_judged:]]
    random.Random(f"{seed} order").shuffle(plain)
    write(output / "pretrain.jsonl", ({"text": text} for text in plain))
    write(output / "heldout.jsonl", ({"text": text} for text in unseen))


def main() -> None:
    """Reads the command line and writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--output", type=Path, default=Path("data/quickstart"), help="folder to write to"
    )
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--rows", type=int, default=6000, help="training rows for each task")
    given = parser.parse_args()
    make(given.output, given.seed, given.rows)


if __name__ == "__main__":
    main()
