"""schemathesis over the whole OpenAPI document: `python -m benchmarks.schemathesis_run`.

It draws requests that the document allows and requests that it forbids, and fails on a 5xx, a status that is not
documented, an answer that does not match its schema, or a forbidden request that is taken. schemathesis is best in an
environment of its own (`pip install schemathesis`); `--schemathesis` says where its command is.

The one check left out is that whatever the schema allows is taken: rules between fields (a prompt and max_tokens have
to fit into the context together) are no part of a schema, and are refused with a documented 400.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile

from benchmarks.cluster import cluster

CONTEXT = 192  # tokens: outputs without a limit of their own end soon
CASES_AN_EXAMPLE = 20  # at the least: each operation is tested with so many examples in each of several ways


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="fewest requests to draw")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url", default="", help="a server that runs; default: a cluster of its own")
    parser.add_argument("--schemathesis", default="schemathesis", help="the command")
    options = parser.parse_args()
    if options.url:
        return run(options.url, options)
    with cluster(max_context=CONTEXT) as running:
        return run(running.url, options)


def run(url: str, options: argparse.Namespace) -> int:
    command = [
        options.schemathesis, "run", f"{url}/openapi.json", "--checks", "all", "--exclude-checks",
        "positive_data_acceptance", "--max-examples", str(-(-options.cases // CASES_AN_EXAMPLE)), "--seed",
        str(options.seed), "--continue-on-failure", "--request-timeout", "60", "--no-color",
    ]  # fmt: skip
    generated = 0
    # It keeps what it found in the folder it runs in.
    with (
        tempfile.TemporaryDirectory(prefix="moecule-schemathesis-") as folder,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := re.search(r"(\d+) generated", line):
                generated = int(found.group(1))
    if generated < options.cases:
        print(f"{generated} cases were drawn, fewer than {options.cases}", file=sys.stderr)
        return 1
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
