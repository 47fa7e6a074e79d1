from __future__ import annotations

import torch

from kernels.combine_norm.naive import SlotRows
from kernels.link.layout import Region, SlabLayout
from kernels.link.triton import combine, dispatch, give_back, take, tile_rule, wait
from kernels.link.views import Peers
from kernels.quant.naive import Fp8Rows
from kernels.target import current
from tests.kernel_cases import Case


def launch(hidden: int, topk: int, tokens: int, peers: int, quantised: bool, changes: dict[str, int]) -> None:
    """Both ends of a layer."""
    layout = SlabLayout(hidden, topk, 64, 4096, peers, quantised)
    tile = tile_rule(layout, tokens) | changes
    region = Region.EVEN if tokens <= 64 else Region.PREFILL
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    rows = Fp8Rows.empty(tokens, hidden, "cpu", current().fp8) if quantised else x
    ids, weights = torch.empty(tokens, topk, dtype=torch.int32), torch.empty(tokens, topk)
    ends, one = Peers.empty(peers, 1, "cpu"), Peers.empty(1, 1, "cpu")
    slots = torch.empty(tokens, peers, dtype=torch.int32)
    dispatch(rows, ids, weights, torch.empty(256, dtype=torch.int32), ends, layout, region, slots, tile)
    take(one, layout, tokens, tile)
    experts = SlotRows(torch.empty(tokens * topk, hidden, dtype=torch.bfloat16), ids)
    give_back(experts, torch.empty(1, dtype=torch.int32), one, layout, region, tile)
    give_back(x, torch.empty(1, dtype=torch.int32), one, layout, region, tile)
    wait(ends, layout, tokens, tile)
    combine(torch.empty(tokens * peers, hidden, dtype=torch.bfloat16), slots, x, tile)


CASES = [
    Case("R1 fp8, 64 tokens, 1 peer", lambda: launch(7168, 8, 64, 1, True, {}), hot=True),
    Case("R1 fp8, 64 tokens, 8 peers, plain", lambda: launch(7168, 8, 64, 8, True, {"pdl": 0}), hot=True),
    Case("R1 fp8, 1 token, tickets", lambda: launch(7168, 8, 1, 1, True, {"ticket": 1}), hot=True),
    Case("V2-Lite bf16, 16 tokens, 2 peers", lambda: launch(2048, 6, 16, 2, False, {}), hot=True),
    Case("R1 fp8, 4096 tokens, 8 peers", lambda: launch(7168, 8, 4096, 8, True, {})),
]
