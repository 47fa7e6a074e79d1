"""An expert shard: holds routed experts; tokens in, weighted partial sums out."""

from collections.abc import Callable

from common.actor import Actor, run_process
from common.bus import Bus
from common.settings import Settings


def load() -> Callable[[Bus, Settings], Actor]:
    from common.device import on_gpu

    def make(bus: Bus, settings: Settings) -> Actor:
        if on_gpu(settings):
            from services.expert_shard.gpu_actor import GpuExpertShard

            return GpuExpertShard(bus, settings)
        from services.expert_shard.actor import ExpertShard

        return ExpertShard(bus, settings)

    return make


if __name__ == "__main__":
    run_process("shard", load)
