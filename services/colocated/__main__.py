"""A worker with all experts in its own process, on one GPU: no expert shards are needed beside it."""

from common.actor import Actor, run_process


def load() -> type[Actor]:
    from services.colocated.actor import ColocatedWorker

    return ColocatedWorker


if __name__ == "__main__":
    run_process("worker", load)
