"""The demonstration model's data: reproducible, split by content, and right."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from training import data

TINY = Path(__file__).parent.parent / "models" / "tiny"


def question(example: data.Example) -> str:
    return example.messages[-1]["content"]


def words_of(example: data.Example) -> list[str]:
    """The words of a list task, from its key: `task ['a', 'b']`."""
    return [part.strip(" '") for part in example.key.partition("[")[2].rstrip("]").split(",")]


def test_same_seed_same_data() -> None:
    first, again = (random.Random(7) for _ in range(2))
    assert [data.conversation(first) for _ in range(50)] == [data.conversation(again) for _ in range(50)]


@pytest.mark.parametrize("task", data.SCORED)
def test_draw_keeps_to_its_side_of_the_split(task: str) -> None:
    rng = random.Random(1)
    trained = {data.draw(task, rng, held_out=False).key for _ in range(300)}
    held_out = {data.draw(task, rng, held_out=True).key for _ in range(30)}
    assert not trained & held_out


def test_a_tenth_of_additions_is_held_out_by_pair() -> None:
    def sum_of(a: int, b: int) -> data.Example:
        return data.Example("add", (), "", "", f"add {min(a, b)} {max(a, b)}")

    share = sum(data.is_held_out(sum_of(a, b)) for a in range(100) for b in range(100)) / 10_000
    assert 0.08 < share < 0.12
    assert data.is_held_out(sum_of(47, 85))


def test_free_text_has_no_held_out_side() -> None:
    with pytest.raises(ValueError, match="no story is held out"):
        data.draw("story", random.Random(0), held_out=True)


@pytest.mark.parametrize("task", ["add", "subtract"])
def test_arithmetic_is_right(task: str) -> None:
    rng = random.Random(2)
    for _ in range(500):
        example = data.TASKS[task](rng)
        left, _, right = example.answer.partition(" = ")
        a, sign, b = left.split()
        result = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert result == int(right) and a in question(example) and b in question(example)
        digits = "".join(line.partition("write ")[2][0] for line in reversed(example.reasoning.splitlines()[:-1]))
        carried = "1" if sign == "+" and example.reasoning.splitlines()[-2].endswith("carry 1.") else ""
        assert int(carried + digits) == result


@pytest.mark.parametrize("tokens", [50, 1000])
def test_retrieval_asks_for_a_listed_fact(tokens: int) -> None:
    rng = random.Random(3)
    for _ in range(20):
        example = data.retrieval(rng, tokens)
        prompt = data.render(example.messages)
        assert prompt.count(example.reasoning) == 1 and example.answer in example.reasoning


def test_word_lists_are_right() -> None:
    rng = random.Random(4)
    for _ in range(200):
        example = data.reverse(rng)
        assert example.answer.split(", ") == words_of(example)[::-1]
        example = data.sort(rng)
        assert example.answer.split(", ") == sorted(words_of(example))
        example = data.count(rng)
        assert int(example.answer) == len(words_of(example))


def test_is_right_reads_what_follows_the_reasoning() -> None:
    example = data.count(random.Random(5))
    assert data.is_right(example, example.completion + data.EOS)
    assert not data.is_right(example, f"{example.answer}\n{data.END_THINK}\n\n99")


def test_segments_make_up_the_rendered_text() -> None:
    rng = random.Random(6)
    for _ in range(20):
        talk = data.several_questions(rng, 300)
        text = "".join(part for part, _ in talk.segments)
        assert text.startswith(data.BOS) and text.endswith(data.EOS) and text.count(data.THINK) == 1
        assert text.count(data.ASSISTANT) == sum(learnt for _, learnt in talk.segments)
        assert all(part.endswith(data.EOS) == learnt for part, learnt in talk.segments)


def test_the_chat_template_renders_the_same_text() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string((TINY / "chat_template.jinja").read_text())
    rng = random.Random(8)
    for _ in range(100):
        example = data.dress(rng, data.TASKS[rng.choice(data.SHORT_TASKS)](rng))
        rendered = template.render(
            messages=example.messages, add_generation_prompt=True, bos_token=data.BOS, eos_token=data.EOS
        )
        assert rendered == data.render(example.messages)


def test_the_tokenizer_round_trips_any_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for text in (
        "héllo ✓ 日本語\n\n  x\t12345",
        "a\x00b",
        "<think>\nso\n</think>\n\n",
        data.tell(random.Random(9)).answer,
    ):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode("4821", add_special_tokens=False).ids) == 4
    assert len(tokenizer.encode(data.USER + data.THINK, add_special_tokens=False).ids) == 2
