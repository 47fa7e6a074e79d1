from common.actor import run_process
from services.gpu_worker.actor import Worker

run_process(Worker)
