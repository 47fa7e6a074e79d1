"""The command line of the actors: what it names, what it takes, what it says of faults, and that it starts nothing."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from common.cli import read_settings
from common.errors import ConfigError
from common.settings import PREFIX, Settings, bounds, form
from tests.conftest import REPO

ACTORS = ["gateway", "scheduler", "gpu_worker", "expert_shard"]
NAMES = [field.name for field in dataclasses.fields(Settings)]


def run(actor: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": "", "COLUMNS": "200"} | {PREFIX + name: text for name, text in environ.items()}
    command = [sys.executable, "-m", f"services.{actor}", *arguments]
    return subprocess.run(command, cwd=REPO, env=environ, capture_output=True, text=True, timeout=30)


def leaves(arguments: list[str], environ: dict[str, str] | None = None) -> int:
    with pytest.raises(SystemExit) as left:
        read_settings(arguments, environ or {})
    assert isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize("actor", ACTORS)
def test_help_names_every_setting_within_80_columns_whatever_the_variables_hold(actor: str):
    done = run(actor, "--help", PORT="no port")
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stdout.startswith(f"usage: python -m services.{actor} ")
    text = " ".join(done.stdout.split())
    for field in dataclasses.fields(Settings):
        default = int(field.default) if isinstance(field.default, bool) else field.default
        values = ", ".join(filter(None, (form(field.name), bounds(field.name))))
        variable = f"{PREFIX}{field.name.upper()}: {values}; default {default if default != '' else 'empty'}"
        assert f"{field.metadata['doc']} {variable}" in text
        assert f"--{field.name.replace('_', '-')} " in text
        assert field.metadata["unit"] in variable


def test_a_narrow_terminal_gets_narrow_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "60")
    assert leaves(["--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_the_settings_in_force_and_where_each_is_from():
    done = run("gpu_worker", "--settings", "--max-batch", "8", "--pin", LINK="BUS", MAX_BATCH="no number", PROT="1")
    assert done.returncode == 0
    assert done.stderr == "moecule: MOECULE_PROT is no setting; did you mean MOECULE_PORT? (ignored)\n"
    rows = [re.split(" {2,}", line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == [PREFIX + name.upper() for name in NAMES]
    found = {name: tuple(row[1:]) for name, row in zip(NAMES, rows, strict=True)}
    assert found["link"] == ("bus", "environment")
    assert (found["max_batch"], found["pin"]) == (("8", "option"), ("1", "option"))
    assert found["port"] == ("8000", "default")


def test_without_an_option_they_are_those_of_the_environment():
    assert read_settings([], {}) == Settings()
    assert read_settings([], {"MOECULE_PORT": "9000"}) == Settings(port=9000)
    with pytest.raises(ConfigError, match="MOECULE_PORT is 'x'"):
        read_settings([], {"MOECULE_PORT": "x"})


def test_every_setting_is_an_option_that_wins_over_its_variable():
    others = {"device": "cpu", "link": "bus", "log_level": "error", "body_limit": "2048", "cors_origins": "*"}
    others |= {"weights": "random", "kv_cache": "fp8", "gpu_memory": "0.5", "traces_ratio": "0.5"}
    others["traces"] = "http://127.0.0.1:4318"
    for field in dataclasses.fields(Settings):
        text = others.get(field.name, str(1 - field.default) if isinstance(field.default, bool) else "2")
        read = read_settings([f"--{field.name.replace('_', '-')}", text], {PREFIX + field.name.upper(): "?"})
        assert read == Settings.from_env({PREFIX + field.name.upper(): text})
        assert getattr(read, field.name) != field.default


def test_a_switch_needs_no_value():
    assert read_settings(["--pin", "--port", "1"], {}) == Settings(pin=True, port=1)
    assert read_settings(["--prefix-cache=off"], {}) == Settings(prefix_cache=False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--prot", "8001"], "--prot is no option; did you mean --port?"),
        (["--kv_pages=3"], "--kv_pages is no option; did you mean --kv-pages?"),
        (["--setting"], "--setting is no option; did you mean --settings?"),
        (["--qqqqqqqq"], "--qqqqqqqq is no option"),
        (["--mode", "x"], "--mode is no option; did you mean --model?"),
        (["port=1"], "'port' is no option: give settings as --name value"),
        (["--port", "http"], "--port is 'http': use a whole number"),
        (["--port", "0"], "--port is 0: use from 1 to 65535"),
        (["--drain-seconds", "-1"], "--drain-seconds is -1: use from 0 to 86400 s"),
        (["--pin", "perhaps"], "--pin is 'perhaps': use 1 or 0"),
        (["--link", "wire"], "--link is 'wire': use one of auto, mailbox, bus"),
        (["--id", "a.b"], "--id is 'a.b': use 1 to 64 letters, digits, - and _"),
    ],
)
def test_a_faulty_option_is_named(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    assert leaves(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[0]) == ("", f"moecule: {sentence}")


@pytest.mark.parametrize("actor", ACTORS)
def test_a_faulty_option_ends_every_actor_with_2_and_a_faulty_variable_with_78(actor: str):
    assert run(actor, "--port", "x").returncode == 2
    done = run(actor, PORT="x")
    assert (done.returncode, done.stderr) == (78, "moecule: MOECULE_PORT is 'x': use a whole number\n")


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["--nats", "--check"], 2)])
def test_a_line_of_the_procfile_says_how_it_is_used(arguments: list[str], code: int):
    command = [sys.executable, "-m", "common.supervisor", *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert "use: python -m common.supervisor services.<actor>" in (done.stdout if code == 0 else done.stderr)
