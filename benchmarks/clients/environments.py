"""A virtual environment for each client, and what their commands share. All versions are pinned here."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cluster import ROOT, cluster

PINS: dict[str, tuple[str, ...]] = {
    "openai": ("openai==3.57.0",),
    "openai-1.x": ("openai==1.109.1",),
    "schemathesis": ("schemathesis==4.32.5",),
    "lm-eval": ("lm-eval[api]==0.4.13", "transformers==5.24.0"),
    "evalscope": ("evalscope[perf]==1.14.1",),
    "guidellm": ("guidellm==0.8.1", "torch==2.13.0"),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def interpreter(client: str, folder: Path) -> Path:
    """The Python of the client's environment, which is made in `folder` the first time: seconds to two minutes."""
    pins = PINS[client]
    place = folder / f"{client}-{hashlib.blake2b(repr(pins).encode(), digest_size=4).hexdigest()}"
    python, complete = place / "bin" / "python", place / "complete"
    if not complete.exists():
        print(f"installing {', '.join(pins)} into {place}", file=sys.stderr, flush=True)
        shutil.rmtree(place, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *pins], check=True)
        complete.touch()
    return python


def environment() -> dict[str, str]:
    """A client's: what this process was told about other endpoints and packages is kept from it."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("OPENAI_", "PYTHON"))} | OFFLINE


def run(python: Path, *arguments: str | Path, folder: Path | None = None) -> int:
    """The exit status."""
    return subprocess.run([python, *arguments], cwd=folder, env=environment()).returncode


def command_line(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running endpoint, http://HOST:PORT; default: start a cluster")
    parser.add_argument("--model", help="what the endpoint calls the model; default: the first that it names")
    tiny = ROOT / "models/tiny"
    parser.add_argument("--checkpoint", type=Path, default=tiny, help="the model's folder (default %(default)s)")
    place = Path(tempfile.gettempdir()) / "moecule-clients"
    parser.add_argument("--venvs", type=Path, default=place, help="where clients are installed (default %(default)s)")
    return parser


@contextlib.contextmanager
def endpoint(options: argparse.Namespace, **settings: object) -> Iterator[tuple[str, str]]:
    """(URL, model), of the endpoint that was named or of a cluster with `settings` that lives as long as this."""
    with contextlib.ExitStack() as stack:
        url = options.url or stack.enter_context(cluster(model=options.checkpoint, **settings)).url
        url = url.rstrip("/")
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            first = json.load(answer)["data"][0]["id"]
        yield url, options.model or first
