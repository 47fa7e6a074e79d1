"""What benchmarks of the GPU say where they cannot run: one sentence each, and no traceback; and a stream's TPOT."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engine
from benchmarks.kernels.__main__ import NOT_OPS
from common.messages import TokenChunk


@pytest.mark.parametrize("module", ["engine", "kernels", "kernels.in_step", "kernels.link"])
def test_without_a_gpu(module: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}"], env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert ran.stderr.endswith("error: this measures on a GPU, and PyTorch finds none\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--peer"], "--peer needs vLLM in this environment (0.25.1 was measured), and it is not installed: leave"),
        (["--link", "mailbox"], "and nvidia-cuda-mps-control is not installed: leave --link out"),
        (["--points", "foo"], "argument --points: 'foo' names no points: use INPUTxSTREAMS, as 1024x16"),
        (["--points", "1024x16,"], "use INPUTxSTREAMS"),
        (["--points", "1024x0"], "use INPUTxSTREAMS"),
        (["--output", "1"], "argument --output: '1' is no number of 2 or more: the first token is the prefill's"),
        (["--output", "many"], "argument --output: 'many' is no number of 2 or more"),
    ],
)
def test_what_the_engine_cannot_measure(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(engine, "run", lambda arguments: None)
    monkeypatch.setattr(sys, "argv", ["engine", *arguments])
    with pytest.raises(SystemExit) as ended:
        engine.main()
    assert ended.value.code == 2 and says in capsys.readouterr().err


class Side:
    """An engine whose prompts take 2 s, and a token `token` s."""

    def __init__(self, token: float) -> None:
        self.token = token

    def seconds(self, inputs: int, concurrency: int, outputs: int, temperature: float) -> float:
        return 2 + self.token * (outputs - 1)


def test_a_line_beside_a_peer() -> None:
    """Whether it was measured in turn or after."""
    arguments = engine.command_line().parse_args(["--rounds", "2", "--output", "11", "--peer", "after"])
    assert arguments.peer == "after" and engine.command_line().parse_args(["--peer"]).peer == "beside"
    row = engine.measure({"ours": Side(0.004)}, 1024, 8, arguments) | {"idle": [0.1], "stream": [5.0], "floor": 4e9}
    alone = engine.line(row, 4.0)
    row["vllm"] = engine.measure({"vllm": Side(0.006)}, 1024, 8, arguments)["vllm"]
    cells = [cell.strip() for cell in engine.line(row, 4.0).strip("|").split("|")]
    assert cells[:7] == ["1024 x 8", "4.00", "4.00", "5.00", "0.100", "1.00", "4.00"]
    assert cells[-4:] == ["2.000", "4096", "6.00 (1.50x)", "2.000 (1.00x)"]
    assert alone.count("|") == engine.line(row, 4.0).count("|") and "x)" not in alone


def test_sampling() -> None:
    told = engine.command_line().parse_args(["--sampling", '{"logprobs": 5, "logit_bias": [[3, 1]]}']).sampling
    assert told == {"logprobs": 5, "logit_bias": ((3, 1.0),)}
    for wrong in ("{", "[1]", '{"logprobs": "five"}', '{"log_probs": 5}'):
        with pytest.raises(argparse.ArgumentTypeError, match="no JSON of sampling parameters"):
            engine.sampling(wrong)


def test_points_and_outputs() -> None:
    assert engine.command_line().parse_args([]).output == 1024
    assert engine.command_line().parse_args(["--output", "2"]).output == 2
    assert engine.command_line().parse_args(["--points", "1024x16,8192x4"]).points == [(1024, 16), (8192, 4)]
    assert engine.command_line().parse_args([]).points[0] == (1024, 4)


def test_every_kernel_that_can_be_measured_has_cases() -> None:
    folder = Path("benchmarks/kernels")
    ops = {path.stem for path in folder.glob("*.py")} - NOT_OPS
    assert {"linear", "mla_decode"} <= ops
    assert not [op for op in sorted(ops) if "\ndef cases(" not in (folder / f"{op}.py").read_text()]


def test_a_streams_tpot_has_the_prompts_of_others_in_it() -> None:
    run = engine.Run({"a", "b"})
    run.hear([TokenChunk("a", 0, (1,))], 1.0)
    run.hear([TokenChunk("a", 1, (1,)), TokenChunk("b", 0, (1,))], 3.0)
    assert not run.done.is_set()
    run.hear([TokenChunk("a", 2, (1,), "length"), TokenChunk("b", 1, (1, 2), "length")], 3.5)
    assert run.done.is_set() and run.tokens == 6 and run.ended == 3.5
    assert run.stream_tpot() == pytest.approx((1250 + 250) / 2)
