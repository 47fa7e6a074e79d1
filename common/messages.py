"""Every message on the wire: frozen, tagged msgspec Structs, encoded with msgpack.

Subjects (an id is letters, digits, `-` and `_`):

| subject                          | message -> reply                 | from -> to             |
|----------------------------------|----------------------------------|------------------------|
| moecule.v1.<kind>.<id>.beat      | one of the *Beat messages        | everyone -> everyone   |
| moecule.v1.assign                | Assign -> Assigned               | gateway -> scheduler   |
| moecule.v1.map                   | GetMap -> ExpertMap              | worker -> scheduler    |
| moecule.v1.worker.<id>.admit     | Generate -> Ok                   | gateway -> worker      |
| moecule.v1.worker.<id>.abort     | Abort                            | gateway -> worker      |
| moecule.v1.worker.<id>.resume    | Resume -> StepTokens             | gateway -> worker      |
| moecule.v1.worker.<id>.pages     | PagesChanged                     | worker -> scheduler    |
| moecule.v1.worker.<id>.allpages  | GetPages -> PagesChanged         | scheduler -> worker    |
| moecule.v1.worker.<id>.forget    | ForgetPages -> Ok                | gateway -> worker      |
| moecule.v1.gateway.<id>.tokens   | StepTokens                       | worker -> gateway      |
| moecule.v1.shard.<id>.load       | LoadPartitions -> Ok             | scheduler -> shard     |
| moecule.v1.shard.<id>.attach     | Attach -> Attached               | worker -> shard        |
| moecule.v1.shard.<id>.experts    | ExpertRows -> ExpertSums         | worker -> shard (bus)  |
| moecule.v1.shard.<id>.watch      | Watch                            | worker -> shard        |
| moecule.v1.<kind>.<id>.metrics   | GetMetrics -> Metrics            | gateway -> everyone    |

What passes the gateway's NATS door is JSON, for services of any language: services/gateway/door_messages.py.

A reply may always be `Failed`, which the bus raises as the error it names. Three numbers are never mixed:
`map_version` (which shard holds what), `boot_id` (which life of a process) and `seq` (which use of a slot).
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from common import errors
from common.settings import ID_PATTERN

SCHEMA = "moecule.v1"

State = Literal["starting", "ready", "draining"]
Role = Literal["both", "prefill", "decode"]
FinishReason = Literal["stop", "length", "abort", "error"]


def subject(kind: str, actor_id: str, verb: str) -> str:
    return f"{SCHEMA}.{kind}.{actor_id}.{verb}"


def subject_of_kind(verb: str) -> str:
    return f"{SCHEMA}.{verb}"


def new_boot_id() -> str:
    """Ordered as text: of two lives under one id the later one has the greater."""
    return f"{time.time_ns():016x}{secrets.token_hex(3)}"


MOST_LOGPROBS = 1024
MOST_GRAMMAR_BYTES = 65_536  # of a grammar's text
Id = Annotated[str, Meta(pattern=ID_PATTERN)]
Count = Annotated[int, Meta(ge=0)]


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    pass


class Ok(Message):
    pass


class Failed(Message):
    """An error as a reply; `code` is a leaf of common.errors."""

    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, error: errors.MoeculeError) -> Failed:
        return cls(code=error.code, message=error.message, param=error.param)

    def error(self) -> errors.MoeculeError:
        return errors.from_code(self.code, self.message, self.param)


# ---- heartbeats -----------------------------------------------------------------------------------------------------


class GatewayBeat(Message):
    id: str
    boot_id: str
    state: State


class SchedulerBeat(Message):
    """`map_version` is 0 while there is no map; `reason` says why the cluster cannot serve, empty when it can."""

    id: str
    boot_id: str
    state: State
    map_version: int
    reason: str = ""


class WorkerBeat(Message):
    """Tokens, steps and seconds are counted since the start, for the rates that others show. `waited`: of each
    shard that the map names, the seconds that steps stood still while it had not answered, as LinkTimes has it; none on
    a GPU. `load_done` of `load_total` bytes are read while it starts."""

    id: str
    boot_id: str
    node: str
    model: str  # fingerprint, so that actors of another checkpoint are not mixed in
    state: State
    map_version: int  # the newest map this worker has acknowledged: no later step uses an older one
    reason: str = ""  # why it cannot serve, empty when it can
    role: Role = "both"
    running: int = 0
    waiting: int = 0
    queue_limit: int = 0
    pending_tokens: int = 0  # prompt tokens admitted and not yet computed
    pages_used: int = 0
    pages_total: int = 0
    tenants: dict[str, int] = {}  # requests that each of them holds here, running ones included
    own_experts: bool = False  # it needs no shard
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    waited: tuple[tuple[str, float], ...] = ()
    load_done: int = 0
    load_total: int = 0


class ShardBeat(Message):
    """`held`: partitions loaded and served now. `load_done` of `load_total` bytes are read while it is loading.

    Counted since the start: `rows`, and the `busy_seconds` and `expert_tokens` that they took (tokens of each expert,
    over all layers); 0 and empty on a GPU, where to know them would cost a wait for the device.
    """

    id: str
    boot_id: str
    node: str
    model: str
    state: State
    map_version: int  # the version its newest LoadPartitions named
    held: tuple[int, ...] = ()
    load_done: int = 0
    load_total: int = 0
    rows: int = 0
    busy_seconds: float = 0.0
    expert_tokens: tuple[int, ...] = ()


# ---- requests and tokens --------------------------------------------------------------------------------------------


class Grammar(msgspec.Struct, frozen=True, array_like=True):
    """What the output must be: `text` is a JSON schema, a regular expression or a grammar in Lark's notation as
    llguidance reads it. Where `after` is a token's id the output is free up to and with that token (the end of the
    model's reasoning)."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    after: int | None = None


class Sampling(Message):
    """How one request is sampled. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 mean no limit.

    `seed` is always set by the gateway (random where the client gave none): the noise of the token at position i is a
    function of (seed, i) alone. `logprobs` is the number of alternatives to report, None for no logprobs at all;
    `prompt_logprobs` the same of the prompt's tokens. max_tokens 0 only scores the prompt. Penalties as kernels/sample
    has them: 0, 0 and 1 do nothing. `logit_bias` is added to the logits of these tokens.
    """

    max_tokens: Count
    temperature: Annotated[float, Meta(ge=0)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: int = 0
    min_tokens: Count = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None


class Generate(Message):
    """One request, admitted by the worker it is sent to. `prompt` are token ids.

    `tenant`: whose it is, empty where nobody is told apart. `priority`: lower is earlier, as vLLM has it. `deadline`:
    seconds that are left of it when this is sent, since the clocks of nodes differ; None: it has none. `traceparent`:
    the span that asks, as common/tracing.py writes it; empty: the request is not traced.
    """

    request_id: str
    gateway_id: Id
    prompt: tuple[int, ...]
    sampling: Sampling
    tenant: str = ""
    priority: int = 0
    deadline: float | None = None
    salt: str = ""
    traceparent: str = ""


class Assign(Message):
    """`traceparent` as in Generate."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    page_hashes: tuple[bytes, ...] = ()
    tenant: str = ""
    traceparent: str = ""


class Assigned(Message):
    worker_id: str
    worker_boot_id: str


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The logprob of the sampled token and the best alternatives, best first."""

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class TokenChunk(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one request from output index `index` on. The chunk with `finish` set is the last one.

    A token that ended the output (end of sequence, stop id) is included in `tokens` and named by `stop_token`.
    `cached_tokens`: prompt tokens that were read from the prefix cache. `prompt_logprobs`, in the first chunk of a
    request that asked for them: one a prompt token, None for the first.
    """

    request_id: str
    index: int
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    stop_token: int | None = None
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: tuple[str, str] | None = None  # (code, message) of common.errors, with finish "error"
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


class StepTokens(Message):
    """One step's tokens of all streams of one gateway."""

    worker_id: str
    boot_id: str
    chunks: tuple[TokenChunk, ...]


class Abort(Message):
    request_ids: tuple[str, ...]


class Resume(Message):
    """Ask for the tokens of a request from output index `index` on. NotFound if the worker does not know it."""

    request_id: str
    index: int


class PagesChanged(Message):
    """Page hashes a worker added to and evicted from its prefix cache. `full`: `added` is the whole set.

    `seq` counts these messages from 1 in one life of the worker; a receiver that sees a gap asks with GetPages.
    """

    worker_id: str
    boot_id: str
    seq: int
    added: tuple[bytes, ...] = ()
    evicted: tuple[bytes, ...] = ()
    full: bool = False


class GetPages(Message):
    pass


class ForgetPages(Message):
    """Empty the prefix cache: pages without an owner are free and no page's hash is known any more."""


# ---- experts --------------------------------------------------------------------------------------------------------


class ShardEntry(msgspec.Struct, frozen=True, array_like=True):
    boot_id: str
    node: str


class ExpertMap(Message):
    """partition -> shards that hold a copy. Partition p is the experts with id % partitions == p, over all layers."""

    version: int
    model: str
    partitions: int
    owners: tuple[tuple[str, ...], ...]  # [partitions] -> shard ids, sorted
    shards: dict[str, ShardEntry]  # every shard that `owners` names


class GetMap(Message):
    pass


class LoadPartitions(Message):
    """Hold these partitions from map version `version` on. Dropping what is not named is done by a later call."""

    version: int
    partitions: tuple[int, ...]


class GpuMailbox(msgspec.Struct, frozen=True, array_like=True):
    """What a worker on a GPU sets aside for its shards. `handle` and `peer` are told in the handshake alone: the
    CUDA IPC handle of the worker's reply slab, and which block of it is this shard's."""

    device: str  # the GPU's uuid
    peers: int  # blocks of the reply slab
    quantised: bool  # rows in 8 bits with their scales, else bf16
    buckets: tuple[int, ...]  # numbers of rows that the worker's decode graphs are captured for
    handle: bytes = b""
    peer: int = 0


class Attach(Message):
    """A worker asks a shard for a link. Rows are float32 [hidden] on the CPU path; on a GPU as `gpu` says."""

    worker_id: str
    worker_boot_id: str
    node: str
    layout: int  # version of the slab layout
    decode_rows: int
    prefill_rows: int
    gpu: GpuMailbox | None = None


class Attached(Message):
    """`socket`: name of the shard's abstract Unix socket for a mailbox, empty when the link is the bus. `handle`
    and `device`, in a GPU's handshake: the CUDA IPC handle of the worker's request slab, and the GPU's uuid."""

    boot_id: str
    layout: int
    socket: str = ""
    handle: bytes = b""
    device: str = ""


class ExpertRows(Message):
    """The bus link's rows: `x` float32 [rows, hidden], `ids` int32 [rows, topk] (-1: not for this shard),
    `weights` float32 [rows, topk]."""

    worker_id: str
    boot_id: str  # the life of the shard this is meant for
    layer: int
    rows: int
    x: bytes
    ids: bytes
    weights: bytes


class ExpertSums(Message):
    """`sums` float32 [rows, hidden], already multiplied by the gate weights."""

    boot_id: str
    sums: bytes


# ---- telemetry ------------------------------------------------------------------------------------------------------


class Watch(Message):
    """Tell, as a child of the span `traceparent`, what you did from now until the same comes with `ends`."""

    traceparent: str
    ends: bool = False


class GetMetrics(Message):
    pass


class Metrics(Message):
    """One actor's metrics in the Prometheus text format."""

    text: str


_decoder = msgspec.msgpack.Decoder(
    Ok | Failed | GatewayBeat | SchedulerBeat | WorkerBeat | ShardBeat | Generate | Assign | Assigned | StepTokens
    | Abort | Resume | PagesChanged | GetPages | ForgetPages | ExpertMap | GetMap | LoadPartitions | Attach | Attached
    | ExpertRows | ExpertSums | Watch | GetMetrics | Metrics
)  # fmt: skip
_encoder = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """Raises msgspec.DecodeError (ValidationError included) on anything that is not one of these messages."""
    try:
        return _decoder.decode(data)
    except UnicodeDecodeError as error:  # msgspec lets it through as it is
        raise msgspec.DecodeError(str(error)) from error
