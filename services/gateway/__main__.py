"""`python -m services.gateway`."""

from common.actor import run_process
from services.gateway.actor import Gateway

if __name__ == "__main__":
    run_process(Gateway)
