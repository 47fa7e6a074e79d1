"""An expert shard: holds routed experts; tokens in, weighted partial sums out."""

from common.actor import Actor, run_process


def load() -> type[Actor]:
    from services.expert_shard.actor import ExpertShard

    return ExpertShard


if __name__ == "__main__":
    run_process(load)
