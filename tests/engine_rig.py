"""An engine's requests and what it told of them, gathered from its own thread."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.messages import Generate, Grammar, Sampling, TokenChunk
from common.model_config import ModelConfig
from services.gpu_worker.engine import Engine, StepOutput
from services.gpu_worker.grammar import Compiled, Constraint, Grammars

TINY = Path(__file__).parent.parent / "models" / "tiny"
SECONDS = 120.0


class Told:
    """Whoever makes the engine gives it `emit`."""

    engine: Engine

    def __init__(self) -> None:
        self.chunks: dict[str, list[TokenChunk]] = defaultdict(list)
        self.preemptions = 0
        self._changed = threading.Condition()

    def submit(self, request: Generate) -> None:
        """Where it follows a grammar, by models/tiny's tokenizer."""
        grammar = request.sampling.grammar
        self.engine.submit(request, None if grammar is None else Constraint(compiled(grammar), grammar.after))

    def emit(self, output: StepOutput) -> None:
        with self._changed:
            self.preemptions += output.stats.preemptions
            for chunks in output.chunks.values():
                for chunk in chunks:
                    self.chunks[chunk.request_id].append(chunk)
            self._changed.notify_all()

    def finish(self, request_id: str) -> str | None:
        chunks = self.chunks[request_id]
        return chunks[-1].finish if chunks else None

    def wait(self, requests: Sequence[Generate]) -> None:
        """Until all have ended. Fails if the engine crashes."""
        with self._changed:
            ended = self._changed.wait_for(
                lambda: self.engine.crashed or all(self.finish(r.request_id) for r in requests), SECONDS
            )
        assert ended and self.engine.crashed is None, self.engine.crashed


@functools.cache
def compiled(grammar: Grammar) -> Compiled:
    return asyncio.run(Grammars(str(TINY), ModelConfig.load(TINY)).constraint(grammar))._compiled


def ask(name: str, prompt: Sequence[int], **sampling: Any) -> Generate:
    return Generate(request_id=name, gateway_id="g", prompt=tuple(prompt), sampling=Sampling(**sampling))
