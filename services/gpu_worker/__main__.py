"""A worker: attention, router, shared expert, KV cache, batching, sampling."""

from common.actor import Actor, run_process


def load() -> type[Actor]:
    from services.gpu_worker.actor import Worker

    return Worker


if __name__ == "__main__":
    run_process(load)
