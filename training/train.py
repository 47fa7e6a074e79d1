"""Makes models/tiny: the tokenizer, the data, the training run and the checkpoint.

    python -m training.train --out models/tiny       on one H100, about eleven minutes in all
    python -m training.train --init models/tiny --out models/tiny --minutes 6.2 --lr 2e-3       goes on from there
    python -m training.train --out models/tiny --evaluate --eval 32       measures a checkpoint again, on a CPU too
    python -m training.train --out DRY --log DRY/log.jsonl --steps 3 --tokens 2560 --workers 0 --eval 0 --quick 1

The model is transformers' DeepseekV3ForCausalLM, trained in bf16 over fp32 masters. Two things are added to it from
outside: attention within packed texts, and the update of the routers' correction biases from the experts' load, which
transformers leaves at zero. Accuracy is that of the checkpoint as written to disk and loaded again.

The committed checkpoint was made in two runs, both in training/log.jsonl: 2.45 minutes from scratch, with retrieval at
a weight of 26 and up to 8 questions a list, and 6.2 minutes on from there with the mixture as it stands in data.py.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, DeepseekV3Config, DeepseekV3ForCausalLM, GenerationConfig

from training import data
from training.optim import Optimizer
from training.packing import MAX_TEXT, Batch, Stream, encode, loader, pack
from training.tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer

BIAS_SPEED = 1e-3
LONGEST_PROMPT = 2100  # tokens of a retrieval prompt, at the end of the curriculum
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def tiny_config() -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=512, num_hidden_layers=5, first_k_dense_replace=1,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=16, moe_intermediate_size=128, n_shared_experts=1,
        num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, max_position_embeddings=4096,
        num_nextn_predict_layers=0, bos_token_id=0, eos_token_id=1, pad_token_id=2, tie_word_embeddings=False,
        scoring_func="sigmoid", topk_method="noaux_tc",
    )  # fmt: skip


def packed_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """query, key, value: [1, heads, tokens, dim]. Flash attention wants one dim for all, so values are padded."""
    boundaries, width = kwargs["boundaries"], value.size(-1)
    if query.is_cuda:
        value = F.pad(value, (0, query.size(-1) - width))
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, boundaries, boundaries, MAX_TEXT, MAX_TEXT, 0.0, True, False, scale=kwargs["scaling"]
        )[0]
        return out[None, :, :, :width], None
    text = torch.searchsorted(boundaries, torch.arange(query.size(2), dtype=torch.int32), right=True)
    allowed = (text[:, None] == text).tril()
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=kwargs["scaling"])
    return out.transpose(1, 2), None


class LoadBalancer:
    """DeepSeek-V3's balance without an auxiliary loss: overloaded experts' correction biases sink, others' rise."""

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        self.gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self.experts = model.config.n_routed_experts
        device = model.device
        self.load = [torch.zeros(self.experts, device=device) for _ in self.gates]  # since the last update
        self.window = torch.zeros(len(self.gates), self.experts, device=device)  # since the last report
        for load, gate in zip(self.load, self.gates, strict=True):
            gate.register_forward_hook(self._count(load))

    def _count(self, load: torch.Tensor) -> Any:
        ids = torch.arange(self.experts, device=load.device)

        def hook(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            load.add_((outputs[2].reshape(-1, 1) == ids).sum(0))

        return hook

    @torch.no_grad()
    def update(self, speed: float) -> None:
        loads = torch.stack(self.load)  # [gates, experts]
        change = speed * torch.sign(loads.mean(1, keepdim=True) - loads)
        for gate, row in zip(self.gates, change, strict=True):
            gate.e_score_correction_bias += row
        self.window += loads
        torch._foreach_zero_(self.load)

    def report(self) -> dict[str, Any]:
        share = self.window / self.window.sum(1, keepdim=True).clamp(min=1) * self.experts
        biases = torch.stack([g.e_score_correction_bias for g in self.gates])
        self.window.zero_()
        return {
            "load_max": [round(x, 3) for x in share.amax(1).tolist()],  # 1 is an even share
            "load_min": [round(x, 3) for x in share.amin(1).tolist()],
            "bias_range": [round(biases.min().item(), 4), round(biases.max().item(), 4)],
        }


def hidden_states(model: DeepseekV3ForCausalLM, batch: Batch) -> torch.Tensor:
    """The decoder layers over one packed batch: [tokens, hidden]."""
    inner = model.model
    x = inner.embed_tokens(batch.ids[None])
    rope = inner.rotary_emb(x, batch.positions[None])
    for layer in inner.layers:
        x = layer(x, position_embeddings=rope, attention_mask=None, use_cache=False, boundaries=batch.boundaries)
    return inner.norm(x)[0]


def token_losses(head: torch.Tensor, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(states, head).float(), targets, reduction="none")


def loss_of(model: DeepseekV3ForCausalLM, batch: Batch, losses: Any) -> torch.Tensor:
    states = hidden_states(model, batch)
    weights = batch.weights.roll(-1)  # the last token of a batch predicts its first: a prompt's, of weight zero
    return (losses(model.lm_head.weight, states, batch.ids.roll(-1)) * weights).sum() / weights.sum().clamp(min=1)


# Held-out accuracy.


def held_out_sets(count: int, seed: int) -> dict[str, list[data.Example]]:
    rng = random.Random(f"held out/{seed}")
    sets = {task: [data.draw(task, rng, True) for _ in range(count)] for task in data.SCORED if task != "retrieve"}
    for tokens in (100, 500, 1000, 2000):
        sets[f"retrieve {tokens}"] = [
            data.draw("retrieve", rng, True, lambda r, n=tokens: data.retrieval(r, n)) for _ in range(count)
        ]
    return sets


def forced_accuracy(model: DeepseekV3ForCausalLM, tokenizer: Tokenizer, sets: dict[str, list[data.Example]],
                    tokens: int) -> dict[str, float]:  # fmt: skip
    """The share of examples whose every completion token is the most likely one: greedy decoding would write them."""
    result = {}
    for task, examples in sets.items():
        right = 0
        for batch in pack((encode(tokenizer, data.learnt(e)) for e in examples), tokens, data_pad(tokenizer)):
            batch = Batch(*(x.to(model.device) for x in batch))
            picked = F.linear(hidden_states(model, batch).detach(), model.lm_head.weight).argmax(-1)
            wrong = (picked != batch.ids.roll(-1)) & (batch.weights.roll(-1) > 0)
            text = torch.searchsorted(batch.boundaries, torch.arange(tokens, device=model.device).int(), right=True)
            right -= text[wrong].unique().numel()
        result[task] = (len(examples) + right) / len(examples)
    return result


def data_pad(tokenizer: Tokenizer) -> int:
    return tokenizer.token_to_id(data.PAD)


@torch.no_grad()
def greedy_accuracy(folder: Path, tokenizer: Tokenizer, sets: dict[str, list[data.Example]],
                    device: str) -> dict[str, float]:  # fmt: skip
    """Accuracy of the checkpoint as written: loaded by transformers and decoded by its own generate."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # CPUs may be slow at bf16
    model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    plain = GenerationConfig(do_sample=False, max_new_tokens=160, eos_token_id=1, pad_token_id=2, bos_token_id=0)
    chunks = [(task, some[i : i + 64]) for task, some in sets.items() for i in range(0, len(some), 64)]
    right = dict.fromkeys(sets, 0)
    for task, examples in chunks:
        prompts = [tokenizer.encode(data.render(e.messages), add_special_tokens=False).ids for e in examples]
        longest = max(map(len, prompts))
        ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = model.generate(ids, attention_mask=mask, generation_config=plain)[:, longest:].tolist()
        texts = [tokenizer.decode(o[: o.index(1)] if 1 in o else o, skip_special_tokens=False) for o in out]
        right[task] += sum(map(data.is_right, examples, texts))
    return {task: right[task] / len(examples) for task, examples in sets.items()}


# The run.


def save(model: DeepseekV3ForCausalLM, folder: Path) -> None:
    """transformers' own files. bf16 weights; the correction biases stay fp32, as transformers loads them."""
    copy = DeepseekV3ForCausalLM(tiny_config())  # a config of its own: the trained one names our attention
    copy.load_state_dict(model.state_dict())
    for p in copy.parameters():
        p.data = p.data.bfloat16()
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=2, do_sample=True, temperature=0.6, top_p=0.95
    )
    copy.save_pretrained(folder)


def new_model(seed: int, device: str) -> DeepseekV3ForCausalLM:
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(tiny_config())
    if device == "cuda":
        for p in model.parameters():
            p.data = p.data.bfloat16()
    AttentionInterface.register("packed", packed_attention)
    model.config._attn_implementation = "packed"
    return model.to(device)


def schedule(progress: float) -> float:
    """The learning rate's factor: a short warm-up, level, then down to zero over the last three fifths."""
    return min(1.0, progress / 0.02, (1 - progress) / 0.6)


def bias_speed(progress: float) -> float:
    """Fast while the routers are young and would collapse on a few experts, then slow, then still."""
    return BIAS_SPEED * min(max(1.0, 4 - 60 * progress), 4 * (1 - progress))


def longest_prompt(progress: float) -> int:
    """The curriculum of retrieval: look-ups in short lists come first."""
    return int(200 + (LONGEST_PROMPT - 200) * min(1.0, max(0.0, progress - 0.05) / 0.2))


class Log:
    def __init__(self, path: Path, mode: str = "w") -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file: TextIO = path.open(mode)

    def write(self, **fields: Any) -> None:
        line = json.dumps(fields)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def run(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log = Log(args.log, "a" if args.evaluate else "w")
    log.write(command="python -m training.train " + " ".join(sys.argv[1:]), python=platform.python_version(),
              torch=torch.__version__, transformers=transformers.__version__,
              device=torch.cuda.get_device_name() if device == "cuda" else "cpu")  # fmt: skip
    if args.evaluate:
        evaluate(args, log, device)
        return
    if args.init:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            shutil.copy(args.init / name, args.out / name)
    else:
        save_tokenizer(train_tokenizer(args.seed), args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))

    stream = Stream(args.out / "tokenizer.json", args.tokens, args.seed)
    batches = iter(loader(stream, args.workers))  # the workers fork before CUDA is in use
    first = next(batches)
    model = new_model(args.seed, device)
    if args.init:
        model.load_state_dict(DeepseekV3ForCausalLM.from_pretrained(args.init).state_dict())
        stream.longest.value = LONGEST_PROMPT
    balancer = LoadBalancer(model)
    losses: Any = token_losses
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        losses = torch.compile(token_losses, dynamic=False)
    optimizer = Optimizer(model)
    log.write(parameters=sum(p.numel() for p in model.parameters()), tokens_a_step=args.tokens, lr=args.lr)

    quick = held_out_sets(args.quick, seed=2)
    started, step, progress, next_report = time.monotonic(), 0, 0.0, 0.0
    seen = torch.zeros((), device=device)
    steps_seen = 0
    while progress < 1:
        batch = first if step == 0 else next(batches)
        batch = Batch(*(x.to(device, non_blocking=True) for x in batch))
        loss = loss_of(model, batch, losses)
        loss.backward()
        optimizer.step(args.lr * schedule(progress))
        balancer.update(bias_speed(progress))
        seen += loss.detach()
        step, steps_seen = step + 1, steps_seen + 1
        if step <= 5 and not args.steps:
            started = time.monotonic()  # the first steps compile
        elapsed = (time.monotonic() - started) / 60
        progress = step / args.steps if args.steps else min(1.0, elapsed / args.minutes)
        if not args.init:
            stream.longest.value = longest_prompt(progress)
        if progress >= next_report or progress >= 1:
            mean = seen.item() / steps_seen
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is {mean} at step {step}")
            # With gradients on and in training mode (the model has no dropout), so that nothing is compiled again.
            accuracy = forced_accuracy(model, tokenizer, quick, args.tokens)
            torch._foreach_zero_(balancer.load)
            log.write(step=step, minutes=round(elapsed, 2), loss=round(mean, 4),
                      lr=round(args.lr * schedule(progress), 6), **balancer.report(),
                      accuracy={k: round(v, 3) for k, v in accuracy.items()})  # fmt: skip
            seen.zero_()
            steps_seen, next_report = 0, progress + args.report
            save(model, args.out)

    del batches
    log.write(step=step, tokens=step * args.tokens)
    evaluate(args, log, device)


def evaluate(args: argparse.Namespace, log: Log, device: str) -> None:
    """Writes the accuracy of the checkpoint in `args.out` to the log."""
    if args.eval:
        tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
        accuracy = greedy_accuracy(args.out, tokenizer, held_out_sets(args.eval, seed=1), device)
        log.write(greedy_held_out_accuracy=accuracy, examples_each=args.eval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder")
    parser.add_argument("--init", type=Path, help="go on from this checkpoint folder, its tokenizer included")
    parser.add_argument("--log", type=Path, default=Path("training/log.jsonl"))
    parser.add_argument("--minutes", type=float, default=8.0, help="training time, compilation and evaluation aside")
    parser.add_argument("--steps", type=int, help="train for so many steps instead")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=14, help="processes that make data")
    parser.add_argument("--eval", type=int, default=512, help="held-out examples of each task")
    parser.add_argument("--quick", type=int, default=32, help="held-out examples of each task at each report")
    parser.add_argument("--report", type=float, default=0.05, help="the share of the run between two reports")
    parser.add_argument("--evaluate", action="store_true", help="only measure the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    run(parser.parse_args())


if __name__ == "__main__":
    main()
