"""The openai SDK, current and 1.x, does with the endpoint what its users do; the checks are openai_checks.py.

python -m benchmarks.clients.openai_sdk [--url http://127.0.0.1:8000] [--model tiny] [--sdk openai]
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.clients.environments import PINS, command_line, endpoint, interpreter, run

CHECKS = Path(__file__).parent / "openai_checks.py"


def main() -> int:
    parser = command_line(__doc__)
    both = ["openai", "openai-1.x"]
    parser.add_argument("--sdk", choices=both, nargs="+", default=both, help="which of the two (default: both)")
    parser.add_argument("--only", default="", help="only checks whose names contain this")
    options = parser.parse_args()
    failures = 0
    with endpoint(options) as (url, model):
        for client in options.sdk:
            python = interpreter(client, options.venvs)
            print(f"\n{PINS[client][0]} at {url}", flush=True)
            failures += run(python, CHECKS, url, model, options.only) != 0
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
