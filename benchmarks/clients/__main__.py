"""All clients, or those that are named, one after the other, and a table of what came out.

python -m benchmarks.clients [CLIENT ...] [--url http://127.0.0.1:8000] [--model tiny]

CLIENT: openai, openai-1.x, schemathesis, lm-eval, evalscope, guidellm. Without --url each has a cluster of its own; a
client's own command has more options. Exit status 1 if one of them did not pass.
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.clients.environments import PINS, command_line

COMMANDS: dict[str, tuple[str, ...]] = {
    "openai": ("openai_sdk", "--sdk", "openai"),
    "openai-1.x": ("openai_sdk", "--sdk", "openai-1.x"),
    "schemathesis": ("schemathesis_run",),
    "lm-eval": ("lm_eval_run",),
    "evalscope": ("load", "--tool", "evalscope"),
    "guidellm": ("load", "--tool", "guidellm"),
}


def run(client: str, handed_on: list[str]) -> tuple[bool, str]:
    """(whether it passed, its last line, which is what it found)."""
    module, *own = COMMANDS[client]
    command = [sys.executable, "-m", f"benchmarks.clients.{module}", *own, *handed_on]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode == 0, last


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("clients", metavar="CLIENT", nargs="*", help="default: all")
    options = parser.parse_intermixed_args()
    clients = vars(options).pop("clients") or list(COMMANDS)
    if unknown := set(clients) - set(COMMANDS):
        parser.error(f"no client is called {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    handed_on = [f"--{name}={value}" for name, value in vars(options).items() if value is not None]
    rows = [(client, *run(client, handed_on)) for client in clients]
    print("\n| client | passed | result |\n|---|---|---|")
    for client, passed, result in rows:
        print(f"| {PINS[client][0]} | {'yes' if passed else 'NO'} | {result} |")
    return 0 if all(passed for _, passed, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
