"""The page allocator and the planner, driven through random arrivals, ends, aborts and preemptions without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.messages import Generate, Sampling, TokenLogprobs
from common.pages import PAGE, page_hashes
from services.gpu_worker.pace import ROUND, Pace
from services.gpu_worker.pages import PageAllocator
from services.gpu_worker.planner import Planner


def request(
    prompt: list[int], *, max_tokens: int = 8, tenant: str = "", name: str = "r", scored: bool = False,
    priority: int = 0,
) -> Generate:  # fmt: skip
    sampling = Sampling(max_tokens=max_tokens, prompt_logprobs=0 if scored else None)
    return Generate(
        request_id=name, gateway_id="g", prompt=tuple(prompt), sampling=sampling, tenant=tenant, priority=priority
    )


def planner(pages: int = 16, *, max_batch: int = 4, chunk: int = 100, prefix_cache: bool = True) -> Planner:
    return Planner(PageAllocator(pages), "m", max_batch=max_batch, pace=Pace(chunk), prefix_cache=prefix_cache)


def step(p: Planner, token: int = 7) -> list[tuple[str, int, int]]:
    """One step with a model that always says `token`; what was computed as (name, start, rows)."""
    plan = p.plan()
    p.check()
    p.advance(plan)
    p.publish(plan)
    for chunk in plan.chunks:
        if chunk.sequence.scores is not None:
            assert not chunk.scored or chunk.scored.start == len(chunk.sequence.scores)
            chunk.sequence.scores += [TokenLogprobs(-float(row), (), ()) for row in chunk.scored]
    for sequence in plan.sampled:
        assert sequence.scores is None or len(sequence.scores) == sequence.prompt_len - 1
        assert sequence.unknown
        sequence.tokens[-1] = token
    p.check()
    return [(c.sequence.request.request_id, c.start, c.rows) for c in plan.chunks]


def test_decodes_come_first_and_prefill_is_chunked():
    p = planner(chunk=100)
    p.add(request([1] * 30, name="a"))
    assert step(p) == [("a", 0, 30)]
    p.add(request([2] * 150, name="b"))
    assert step(p) == [("a", 30, 1), ("b", 0, 100)]
    assert step(p) == [("a", 31, 1), ("b", 100, 50)]
    assert step(p) == [("a", 32, 1), ("b", 150, 1)]


def test_a_step_beside_decodes_has_no_more_of_prompts_than_its_room():
    p = planner(pages=32)
    p.pace = Pace(4096, bound=0.05)
    p.add(request([1] * 30, name="a"))
    step(p)
    p.pace.learn(1, [], 0.02)
    p.pace.learn(1, [(0, 4 * ROUND)], 0.06)
    for name in "bc":
        p.add(request([2] * 300, name=name))
    assert step(p) == [("a", 30, 1), ("b", 0, ROUND)] and p.waiting == 1
    assert step(p) == [("a", 31, 1), ("b", ROUND, ROUND)]


def test_equal_prefixes_share_pages_and_the_last_token_is_computed():
    p = planner()
    prompt = list(range(2 * PAGE))
    first = p.add(request(prompt, name="a"))
    step(p), step(p)
    second = p.add(request(prompt, name="b"))
    assert ("b", PAGE, PAGE) in step(p)
    assert second.pages[0] == first.pages[0] and second.pages[1] != first.pages[1]
    assert second.cached == PAGE


def test_another_salt_shares_nothing():
    prompt = list(range(PAGE))
    assert page_hashes(prompt, "m") != page_hashes(prompt, "m", "salt") != page_hashes(prompt, "n", "salt")
    assert page_hashes(prompt + [1] * PAGE, "m")[0] == page_hashes(prompt, "m")[0]


def test_the_youngest_gives_its_pages_and_is_computed_again():
    p = planner(pages=4, prefix_cache=False)
    old = p.add(request([1] * (2 * PAGE - 1), name="old"))
    young = p.add(request([2] * (2 * PAGE - 2), name="young"))
    for _ in range(4):
        step(p)
    while young in p.running:
        step(p)
    assert old in p.running and list(p.preempted) == [young] and young.computed == 0
    kept = list(young.tokens)
    p.remove(old)
    assert step(p) == [("young", 0, 100)]
    assert young.tokens[: len(kept)] == kept


def test_a_prompt_is_scored_once_and_only_what_is_scored_is_read_from_the_cache():
    p = planner(pages=6, chunk=PAGE)
    prompt = list(range(3 * PAGE))
    step(p), p.add(request(prompt, name="plain")), step(p), step(p), step(p)
    p.remove(p.running[0])
    scored = p.add(request(prompt, name="scored", scored=True))
    assert step(p) == [("scored", 0, PAGE)] and scored.cached == 0
    assert [-score.logprob for score in scored.scores] == list(range(PAGE))
    step(p), p._preempt(scored)
    assert step(p) == [("scored", 2 * PAGE, PAGE)]
    assert [-score.logprob for score in scored.scores] == list(range(3 * PAGE - 1))


def test_a_forgotten_page_is_not_found_again_nor_what_was_computed_from_it():
    p = planner(pages=12, chunk=PAGE)
    prompt = list(range(4 * PAGE))
    done = p.add(request([9] * PAGE, name="done"))
    step(p)
    p.remove(done)
    old = p.add(request(prompt, name="old"))
    step(p), step(p)
    assert p.allocator.take_changes()[1] == [] and p.allocator.available == 12 - len(old.pages)
    known = page_hashes([9] * PAGE, "m") + page_hashes(prompt, "m")[:2]
    p.allocator.forget()
    p.check()
    assert set(p.allocator.take_changes()[1]) == set(known)
    step(p), step(p)  # two more pages of `old`, of which nobody hears
    young = p.add(request([*prompt, 1], name="young"))
    step(p)
    assert young.cached == 0 and p.allocator.take_changes()[0] == page_hashes(prompt, "m")[:1]
    p._preempt(old)  # what it computes now is as good as anyone's
    p.remove(young)
    while old.computed < 4 * PAGE:
        step(p)
    assert p.allocator.take_changes()[0] == page_hashes(prompt, "m")[1:]
    p.remove(old)
    assert p.allocator.available == 12


def test_tenants_take_turns():
    p = planner(pages=64, max_batch=1, chunk=10)
    for name in ("a1", "a2", "a3"):
        p.add(request([1] * 4, name=name, tenant="a"))
    p.add(request([2] * 4, name="b1", tenant="b"))
    order = []
    while p.waiting:
        step(p)
        order += [s.request.request_id for s in p.running]
        p.remove(p.running[0])
    assert order == ["a1", "b1", "a2", "a3"]


def test_least_recently_used_page_goes_first_and_changes_are_told():
    a = PageAllocator(2)
    (x, y) = a.allocate(2)
    a.publish(x, b"x"), a.publish(y, b"y")
    a.release([y]), a.release([x])
    assert a.take_changes() == ([b"x", b"y"], [])
    assert a.match([b"y"]) == [y]
    a.release([y])
    assert a.allocate(1) == [x] and a.take_changes() == ([], [b"x"])
    assert a.allocate(2) is None and a.match([b"y"]) == [y]


class Arrivals(RuleBasedStateMachine):
    """A worker's life without a model; `check` runs after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.planner = planner(pages=6, max_batch=3, chunk=50)
        self.names = 0

    @rule(
        length=st.integers(1, 4 * PAGE),
        shared=st.booleans(),
        out=st.integers(1, PAGE),
        tenant=st.sampled_from("abc"),
        scored=st.booleans(),
        priority=st.sampled_from((0, 0, 1)),
    )
    def arrive(self, length: int, shared: bool, out: int, tenant: str, scored: bool, priority: int) -> None:
        self.names += 1
        prompt = [1 if shared else self.names] * length
        fields = dict(max_tokens=out, tenant=tenant, name=str(self.names), scored=scored, priority=priority)
        self.planner.add(request(prompt, **fields))

    @rule()
    def forget(self) -> None:
        self.planner.allocator.forget()
        assert not any(self.planner.allocator.knows(h) for s in self.planner.sequences() for h in s.hashes)

    @rule(steps=st.integers(1, 30))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            had = any(True for _ in self.planner.sequences())
            assert bool(step(self.planner)) == had  # whoever is there, some request advances
            for s in list(self.planner.running):
                if s.outputs >= s.request.sampling.max_tokens:
                    self.planner.remove(s)

    @precondition(lambda self: any(True for _ in self.planner.sequences()))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.planner.remove(data.draw(st.sampled_from(list(self.planner.sequences()))))

    @invariant()
    def holds(self) -> None:
        self.planner.check()

    def teardown(self) -> None:
        for _ in range(10_000):
            if not step(self.planner):
                break
            for s in list(self.planner.running):
                if s.outputs >= s.request.sampling.max_tokens:
                    self.planner.remove(s)
        assert not list(self.planner.sequences()) and self.planner.allocator.owned == 0


TestArrivals = Arrivals.TestCase
TestArrivals.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@given(st.lists(st.integers(0, 3), max_size=300), st.integers(0, 300))
def test_hashes_extend_as_they_are_computed_whole(tokens: list[int], cut: int):
    from common.pages import extend_hashes

    part = page_hashes(tokens[:cut], "m")
    assert extend_hashes(part, tokens, "m") == page_hashes(tokens, "m")


if __name__ == "__main__":
    pytest.main([__file__])
