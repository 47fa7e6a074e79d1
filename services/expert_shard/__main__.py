from common.actor import run_process
from services.expert_shard.actor import ExpertShard

run_process(lambda bus, settings: ExpertShard(bus, settings))
