"""schemathesis over the whole OpenAPI document.

python -m benchmarks.clients.schemathesis_run [--url http://127.0.0.1:8000] [--cases 2000] [--seed 1]

It draws requests that the document allows and requests that it forbids, and fails on a 5xx, a status that is not
documented, an answer that does not match its schema, or a forbidden request that is taken. The one check left out is
that whatever the schema allows is taken: rules between fields (a prompt and max_tokens have to fit into the context
together) are no part of a schema, and are refused with a documented 400.

Outputs without a limit of their own end with the context: a server named by --url should have a short one
(MOECULE_MAX_CONTEXT=192).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile

from benchmarks.clients.environments import command_line, endpoint, environment, interpreter

CONTEXT = 192  # tokens
CASES_AN_EXAMPLE = 20  # at the least: each operation is tested with so many examples in each of several ways


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--cases", type=int, default=2000, help="fewest requests to draw (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(default %(default)s)")
    options = parser.parse_args()
    with endpoint(options, max_context=CONTEXT) as (url, _):
        drawn, status = run(url, options)
    if drawn < options.cases:
        print(f"{drawn} cases were drawn, fewer than {options.cases}", file=sys.stderr)
    passed = status == 0 and drawn >= options.cases
    print(f"schemathesis: {drawn} cases, seed {options.seed}: {'pass' if passed else 'FAIL'}")
    return 0 if passed else 1


def run(url: str, options: argparse.Namespace) -> tuple[int, int]:
    """(cases drawn, exit status)."""
    command = [
        interpreter("schemathesis", options.venvs).with_name("schemathesis"), "run", f"{url}/openapi.json",
        "--include-path-regex", ".",  # else it leaves out the operation that gives the document
        "--checks", "all", "--exclude-checks", "positive_data_acceptance",
        "--max-examples", str(-(-options.cases // CASES_AN_EXAMPLE)), "--seed", str(options.seed),
        "--continue-on-failure", "--request-timeout", "300", "--max-response-time", "300", "--no-color",
    ]  # fmt: skip
    drawn = 0
    # It keeps what it found in the folder it runs in.
    with (
        tempfile.TemporaryDirectory(prefix="moecule-schemathesis-") as folder,
        subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"(\d+) generated", line):
                drawn = int(found.group(1))
    return drawn, process.returncode


if __name__ == "__main__":
    sys.exit(main())
