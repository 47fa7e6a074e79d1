"""`python -m services.scheduler`."""

from common.actor import run_process
from services.scheduler.actor import Scheduler

if __name__ == "__main__":
    run_process(Scheduler)
