"""The scheduler: who is alive, which expert lives where, which worker gets a request."""

from common.actor import Actor, run_process


def load() -> type[Actor]:
    from services.scheduler.actor import Scheduler

    return Scheduler


if __name__ == "__main__":
    run_process("scheduler", load)
