"""Everything the demonstration model is trained on and measured by, made from a seed; pure Python.

    TASKS["add"](rng) -> Example          one example of a task
    draw("add", rng, held_out=True)       one that is (not) in the held-out tenth
    retrieval(rng, tokens=2000)           a look-up in a list of about so many prompt tokens
    is_right(example, generated_text)     whether a greedy completion answers it
    conversation(rng) -> Conversation     what training sees: an example, now and then with earlier turns

A tenth of all problems is held out. Whether one is depends on a hash of its content (`Example.key`), never on a seed,
so training and benchmark agree however each of them draws. Stories and small talk have no single right answer and are
not held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from training.stories import article, story
from training.talk import SYSTEM_PROMPTS, small_talk
from training.words import ADJECTIVES, ANIMALS, CITIES, LIST_WORDS, NAMES, PLACES, THINGS

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"

SALT = "moecule-9"  # chosen so that the README's question, 47 + 85, is among the held-out ones
SCORED = ("add", "subtract", "retrieve", "reverse", "sort", "count")  # tasks with one right answer

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    task: str
    messages: tuple[Message, ...]  # ends with the user's turn
    reasoning: str
    answer: str
    key: str  # what the held-out split hashes

    @property
    def completion(self) -> str:
        """What follows the generation prompt (which ends in an opened think tag), the end token excluded."""
        return f"{self.reasoning}\n{END_THINK}\n\n{self.answer}"


@dataclass(frozen=True)
class Conversation:
    """A training text: prompt and completion alternate, and only completions are learnt."""

    task: str
    segments: tuple[tuple[str, bool], ...]  # (text, whether it is learnt)


def is_held_out(example: Example) -> bool:
    if example.task not in SCORED:
        return False
    digest = hashlib.blake2b(f"{SALT}/{example.key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 10 == 0


def is_right(example: Example, generated: str) -> bool:
    """Whether `generated` (with or without its reasoning) ends in exactly the expected answer."""
    return generated.rpartition(END_THINK)[2].replace(EOS, "").strip() == example.answer


def render(messages: tuple[Message, ...] | list[Message]) -> str:
    """The chat template in Python: the prompt up to and including the opened think tag."""
    text = BOS + "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    for message in messages:
        if message["role"] == "user":
            text += USER + message["content"]
        elif message["role"] == "assistant":
            text += ASSISTANT + message["content"].rpartition(END_THINK)[2].lstrip("\n") + EOS
    return f"{text}{ASSISTANT}{THINK}\n"


def user(content: str) -> tuple[Message, ...]:
    return ({"role": "user", "content": content},)


# Arithmetic: right to left, one line a column, so that each line is a small table look-up.

COLUMNS = ("Ones", "Tens", "Hundreds")
ADD_PHRASES = ("What is {a} + {b}?",) * 3 + (
    "{a} + {b}", "{a} + {b} = ?", "{a}+{b}", "Add {a} and {b}.", "Compute {a} + {b}.", "Calculate {a} + {b}.",
    "What is {a} plus {b}?", "What is the sum of {a} and {b}?", "How much is {a} + {b}?", "what is {a}+{b}",
    "Please add {a} and {b}.", "Can you tell me what {a} + {b} is?", "What do you get if you add {b} to {a}?",
)  # fmt: skip
SUBTRACT_PHRASES = ("What is {a} - {b}?",) * 3 + (
    "{a} - {b}", "{a} - {b} = ?", "{a}-{b}", "Subtract {b} from {a}.", "Compute {a} - {b}.", "Calculate {a} - {b}.",
    "What is {a} minus {b}?", "How much is {a} - {b}?", "what is {a}-{b}", "Take {b} away from {a}.",
)  # fmt: skip


def operand(rng: Random) -> int:
    """Up to three digits, every length often: uniform numbers would hardly ever be short."""
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 3, 3)))


def add(rng: Random) -> Example:
    a, b = operand(rng), operand(rng)
    carry, lines = 0, []
    for i in range(max(len(str(a)), len(str(b)))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x + y + carry
        lines.append(f"{COLUMNS[i]}: {x} + {y} + {carry} = {total}, write {total % 10}, carry {total // 10}.")
        carry = total // 10
    reasoning = "\n".join([*lines, f"Result: {a + b}."])
    low, high = sorted((a, b))
    prompt = rng.choice(ADD_PHRASES).format(a=a, b=b)
    return Example("add", user(prompt), reasoning, f"{a} + {b} = {a + b}", f"add {low} {high}")


def subtract(rng: Random) -> Example:
    b, a = sorted((operand(rng), operand(rng)))
    borrow, lines = 0, []
    for i in range(len(str(a))):
        x, y = a // 10**i % 10, b // 10**i % 10
        total = x - y - borrow
        lines.append(f"{COLUMNS[i]}: {x} - {y} - {borrow} = {total}, write {total % 10}, borrow {int(total < 0)}.")
        borrow = int(total < 0)
    reasoning = "\n".join([*lines, f"Result: {a - b}."])
    prompt = rng.choice(SUBTRACT_PHRASES).format(a=a, b=b)
    return Example("subtract", user(prompt), reasoning, f"{a} - {b} = {a - b}", f"subtract {a} {b}")


# Retrieval: a list of facts, and a question about one of them.

TOKENS_PER_FACT = {"code": 12, "city": 6, "place": 9}  # by the committed tokenizer, the line's end included
OVERHEAD_TOKENS = 24  # the question and the template
LIST_HEADERS = ("Here is a list.", "Read this list.", "These are the facts.", "Remember the following.", "Notes:")


@dataclass(frozen=True)
class FactList:
    facts: list[str]
    questions: list[str]
    values: list[str]


def fact_list(rng: Random, tokens: int) -> FactList:
    kind = rng.choice(("code", "code", "place", "city") if tokens < 350 else ("code", "code", "place"))
    count = max(2, (tokens - OVERHEAD_TOKENS) // TOKENS_PER_FACT[kind])
    if kind == "city":
        names = rng.sample(NAMES, min(count, len(NAMES)))
        values = [rng.choice(CITIES) for _ in names]
        facts = [f"{name} lives in {value}." for name, value in zip(names, values, strict=True)]
        return FactList(facts, [f"Where does {name} live?" for name in names], values)
    pairs = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    things = [f"{ADJECTIVES[p // len(NOUNS)]} {NOUNS[p % len(NOUNS)]}" for p in pairs]
    if kind == "code":
        values = [f"{rng.randrange(10_000):04d}" for _ in things]
        facts = [f"The code of {thing} is {value}." for thing, value in zip(things, values, strict=True)]
        return FactList(facts, [f"What is the code of {thing}?" for thing in things], values)
    values = [rng.choice(PLACES) for _ in things]
    facts = [f"The {thing} is in the {value}." for thing, value in zip(things, values, strict=True)]
    return FactList(facts, [f"Where is the {thing}?" for thing in things], values)


NOUNS = ANIMALS + THINGS


def retrieval(rng: Random, tokens: int = 1000, turns: int = 1) -> Example:
    """A question about a list of about `tokens` prompt tokens; more `turns` ask about more facts of the same list.

    The list is in the system prompt or at the head of the first question.
    """
    listed = fact_list(rng, tokens)
    text = rng.choice(LIST_HEADERS) + "\n" + "\n".join(listed.facts)
    asked = [rng.randrange(len(listed.facts)) for _ in range(turns)]
    messages: list[Message] = []
    in_system = rng.random() < 0.3
    if in_system:
        messages.append({"role": "system", "content": text})
    for turn, i in enumerate(asked):
        head = f"{text}\n\n" if turn == 0 and not in_system else ""
        messages.append({"role": "user", "content": head + listed.questions[i]})
        if turn + 1 < turns:
            messages.append({"role": "assistant", "content": listed.values[i]})
    target = asked[-1]
    return Example("retrieve", tuple(messages), listed.facts[target], listed.values[target],
                   f"retrieve {listed.facts} {listed.questions[target]}")  # fmt: skip


def retrieve(rng: Random, longest: int = 2100) -> Example:
    """Retrieval at any length, short lists as often as long ones, a few longer than `longest`."""
    if rng.random() < 0.03:
        longest = longest * 6 // 5
    tokens = int(50 * (longest / 50) ** rng.random())
    return retrieval(rng, tokens)


# Lists of words. First letters differ, so that sorting by them decides the order.


def word_list(rng: Random, longest: int = 7) -> list[str]:
    words: dict[str, str] = {}
    for word in rng.sample(LIST_WORDS, 40):
        words.setdefault(word[0], word)
    picked = list(words.values())
    return picked[: rng.randint(2, min(longest, len(picked)))]


def numbered(words: list[str]) -> str:
    return ", ".join(f"{i} {word}" for i, word in enumerate(words, 1))


def reverse(rng: Random) -> Example:
    words = word_list(rng)
    phrase = rng.choice(("Reverse the order of these words: {}.", "Reverse this list: {}.", "Write these words "
                         "backwards, last one first: {}.", "Reverse: {}.", "Please reverse the list {}."))  # fmt: skip
    backwards = ", ".join(reversed(words))
    return Example("reverse", user(phrase.format(", ".join(words))), f"{numbered(words)}. Last one first.",
                   backwards, f"reverse {words}")  # fmt: skip


def sort(rng: Random) -> Example:
    words = word_list(rng)
    phrase = rng.choice(("Sort these words: {}.", "Sort this list: {}.", "Put these words in alphabetical order: {}.",
                         "Sort alphabetically: {}.", "Please sort the list {}."))  # fmt: skip
    letters = "First letters: " + ", ".join(f"{w[0]} {w}" for w in words)
    ordered = sorted(words)
    reasoning = f"{letters}.\nIn order: " + ", ".join(f"{w[0]} {w}" for w in ordered) + "."
    return Example("sort", user(phrase.format(", ".join(words))), reasoning, ", ".join(ordered), f"sort {words}")


def count(rng: Random) -> Example:
    words = word_list(rng, longest=12)
    phrase = rng.choice(("How many words are in this list: {}?", "Count these words: {}.", "Count the words: {}.",
                         "How many words are these: {}?", "How many words do you see: {}?"))  # fmt: skip
    return Example("count", user(phrase.format(", ".join(words))), f"{numbered(words)}.", str(len(words)),
                   f"count {words}")  # fmt: skip


# Free text.


def chat(rng: Random) -> Example:
    prompt, reasoning, answer = small_talk(rng)
    return Example("chat", user(prompt), reasoning, answer, f"chat {prompt}")


STORY_PHRASES = ("Tell me a {}story about {}.", "Write a {}story about {}.", "Can you tell me a {}story about {}?",
                 "Please write a {}story about {}.", "I want to hear a {}story about {}.",
                 "tell me a {}story about {}")  # fmt: skip
STORY_WORDS = {"short ": (30, 60), "": (80, 200), "long ": (450, 1100), "very long ": (1200, 1600)}


def tell(rng: Random) -> Example:
    length = rng.choices(list(STORY_WORDS), (6, 12, 3, 1))[0]
    hero = rng.choice(ANIMALS)
    prompt = rng.choice(STORY_PHRASES).format(length, article(hero))
    reasoning = f"The user wants a {length}story about {article(hero)}."
    return Example("story", user(prompt), reasoning, story(rng, hero, rng.randint(*STORY_WORDS[length])), prompt)


TASKS: dict[str, Callable[[Random], Example]] = {
    "add": add, "subtract": subtract, "retrieve": retrieve, "reverse": reverse, "sort": sort, "count": count,
    "chat": chat, "story": tell,
}  # fmt: skip


def draw(task: str, rng: Random, held_out: bool, make: Callable[[Random], Example] | None = None) -> Example:
    """An example of `task` on the asked-for side of the split; `make` overrides how one is made."""
    if held_out and task not in SCORED:
        raise ValueError(f"no {task} is held out: it has no single right answer")
    while is_held_out(example := (make or TASKS[task])(rng)) != held_out:
        pass
    return example


# What training sees.

MIXTURE = {"add": 20, "subtract": 9, "retrieve": 45, "reverse": 8, "sort": 8, "count": 6, "chat": 12, "story": 6,
           "document": 3}  # fmt: skip
SHORT_TASKS = ("add", "subtract", "reverse", "sort", "count", "chat", "chat")


def conversation(rng: Random, longest: int = 2100) -> Conversation:
    """One training text; `longest` bounds retrieval prompts, in tokens (a curriculum raises it)."""
    task = rng.choices(list(MIXTURE), list(MIXTURE.values()))[0]
    if task == "document":
        text = story(rng, rng.choice(ANIMALS), int(40 * 15 ** rng.random()))
        return Conversation(task, ((BOS, False), (text + EOS, True)))
    if task == "retrieve":
        return several_questions(rng, longest) if rng.random() < 0.5 else learnt(
            draw(task, rng, False, lambda r: retrieve(r, longest)))  # fmt: skip
    return learnt(dress(rng, draw(task, rng, False)))


def learnt(example: Example) -> Conversation:
    return Conversation(example.task, ((render(example.messages), False), (example.completion + EOS, True)))


def dress(rng: Random, example: Example) -> Example:
    """Now and then puts a system prompt and earlier turns before an example."""
    earlier: list[Message] = []
    while rng.random() < 0.15 and len(earlier) < 8:
        turn = draw(rng.choice(SHORT_TASKS), rng, False)
        earlier += [*turn.messages, {"role": "assistant", "content": turn.answer}]
    if rng.random() < 0.12:
        earlier.insert(0, {"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    return Example(example.task, (*earlier, *example.messages), example.reasoning, example.answer, example.key)


def several_questions(rng: Random, longest: int) -> Conversation:
    """One list and several questions, each answer learnt: the same look-ups from far fewer list tokens."""
    tokens = int(50 * (longest / 50) ** rng.random())
    example = draw("retrieve", rng, False, lambda r: retrieval(r, tokens, turns=r.randint(2, 12)))
    segments: list[tuple[str, bool]] = []
    for piece in render(example.messages).split(ASSISTANT):
        answer, end, question = piece.rpartition(EOS)
        segments += [(answer + end, True)] if end else []
        segments.append((question + ASSISTANT, False))
    opened = segments.pop()[0].removesuffix(ASSISTANT)  # the piece after the last ASSISTANT is the opened think tag
    segments[-1] = (segments[-1][0] + opened, False)
    return Conversation("retrieve", (*segments, (example.completion + EOS, True)))
