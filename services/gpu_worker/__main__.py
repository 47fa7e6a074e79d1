"""A worker: attention, router, shared expert, KV cache, batching, sampling."""

from collections.abc import Callable

from common.actor import Actor, run_process
from common.bus import Bus
from common.settings import Settings


def load() -> Callable[[Bus, Settings], Actor]:
    from common.device import on_gpu

    def make(bus: Bus, settings: Settings) -> Actor:
        if on_gpu(settings):
            from services.gpu_worker.gpu_actor import GpuWorker

            return GpuWorker(bus, settings)
        from services.gpu_worker.actor import Worker

        return Worker(bus, settings)

    return make


if __name__ == "__main__":
    run_process("worker", load)
