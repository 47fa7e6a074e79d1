"""The gateway: HTTP, tokenizer, chat template, detokenizer, stop strings, validation."""

from common.actor import Actor, run_process


def load() -> type[Actor]:
    from services.gateway.actor import Gateway

    return Gateway


if __name__ == "__main__":
    run_process("gateway", load)
