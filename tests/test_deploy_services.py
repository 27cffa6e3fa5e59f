"""What runs a node as a service: files that their own checkers accept, and that agree with each other."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from prime_async.cli import EXIT_USAGE, app, main
from prime_async.config.contact import Contact
from prime_async.config.load import load_config
from prime_async.config.schema import NodeSettings
from prime_async.config.spec import run_id
from prime_async.errors import ConfigError, PrimeAsyncError
from prime_async.plan import Setup, recommend
from prime_async.transport.keys import read_key_file
from prime_async.work.sizes import estimate_memory, named_size, parameter_count

DEPLOY = Path(__file__).parent.parent / "deploy"
LIMIT_S = 120.0
GRACE_S, LEAVE_WITHIN_S = 300, 240
GIB = 2**30


def tool(name: str) -> str:
    """Beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


def check(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def fails(*command: str | Path) -> bool:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    return done.returncode != 0


def manifests() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes" / "prime-async.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_run", DEPLOY / "make_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- their own checkers ---------------------------------------------------------------------------------------------


def test_hadolint_accepts_the_dockerfile_and_would_not_accept_a_bad_one(tmp_path: Path) -> None:
    check(tool("hadolint"), DEPLOY / "Dockerfile")

    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && sudo true\n")
    assert fails(tool("hadolint"), tmp_path / "Dockerfile")


def test_the_compose_file_is_what_its_specification_says(tmp_path: Path) -> None:
    schema = ("--builtin-schema", "vendor.compose-spec")
    check(tool("check-jsonschema"), *schema, DEPLOY / "compose.yaml")

    bad = (DEPLOY / "compose.yaml").read_text(encoding="utf-8").replace("read_only: true", "read_only: [perhaps]")
    (tmp_path / "compose.yaml").write_text(bad)
    assert fails(tool("check-jsonschema"), *schema, tmp_path / "compose.yaml")


def test_the_manifests_are_what_kubernetes_takes(tmp_path: Path) -> None:
    path = DEPLOY / "kubernetes" / "prime-async.yaml"
    check(tool("kubernetes-validate"), "--strict", path)

    (tmp_path / "bad.yaml").write_text(path.read_text(encoding="utf-8").replace("replicas: 3", "replicas: three"))
    assert fails(tool("kubernetes-validate"), "--strict", tmp_path / "bad.yaml")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (apt install systemd)")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """With a program that is on this machine in the place of ours."""
    text = (DEPLOY / "systemd" / "prime-async.service").read_text(encoding="utf-8")
    unit = tmp_path / "prime-async.service"
    unit.write_text(text.replace("/opt/prime-async/bin/prime-async", sys.executable))
    assert "prime-async.service" not in check("systemd-analyze", "verify", "--man=no", unit)

    unit.write_text(text.replace("Restart=on-failure", "Restart=now-and-then"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert "now-and-then" in done.stderr


# --- that they agree ------------------------------------------------------------------------------------------------


def test_all_wait_longer_for_a_node_than_it_takes_to_leave() -> None:
    pod = manifests()["StatefulSet"]["spec"]["template"]["spec"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"].values()
    unit = (DEPLOY / "systemd" / "prime-async.service").read_text(encoding="utf-8")

    assert pod["terminationGracePeriodSeconds"] == GRACE_S
    assert {service["stop_grace_period"] for service in services} == {f"{GRACE_S // 60}m"}
    assert f"TimeoutStopSec={GRACE_S}\n" in unit
    commands = [pod["containers"][0]["args"], *(s["command"] for s in services)]
    assert {tuple(command[2:]) for command in commands} == {("--leave-within", str(LEAVE_WITHIN_S))}
    assert f"--leave-within {LEAVE_WITHIN_S}\n" in unit
    assert GRACE_S - LEAVE_WITHIN_S >= 60


def test_the_unit_starts_what_its_comment_installs_and_does_not_start_again_over_a_wrong_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the commands of the comment are ones that there are: `init` makes the configuration that the unit names."""
    unit = (DEPLOY / "systemd" / "prime-async.service").read_text(encoding="utf-8")
    (init,) = re.findall(r"^#   /opt/prime-async/bin/(prime-async init .*)$", unit, re.MULTILINE)
    (invite,) = re.findall(r"/opt/prime-async/bin/(prime-async invite [^`]*)`", unit)

    monkeypatch.setattr(sys, "argv", init.replace("/etc/prime-async", str(tmp_path)).split())
    with pytest.raises(SystemExit, match=r"\A0\Z"):
        main()

    config = load_config(tmp_path / "node.toml")
    assert str(config.node.directory) == "/var/lib/prime-async"
    assert "StateDirectory=prime-async\n" in unit
    assert "ExecStart=/opt/prime-async/bin/prime-async run /etc/prime-async/node.toml " in unit
    app.parse_args(invite.split()[1:], exit_on_error=False, print_error=False)
    assert f"RestartPreventExitStatus={EXIT_USAGE}\n" in unit


def test_the_dashboard_of_the_compose_file_is_seen_by_its_own_machine_alone() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    (address,) = re.findall(r"^#   python deploy/make_run.py .* --dashboard (\S+)$", text, re.MULTILINE)

    published = [p for service in yaml.safe_load(text)["services"].values() for p in service.get("ports", [])]
    assert published == [f"127.0.0.1:8080:{address.rpartition(':')[2]}"]


def test_nothing_runs_as_root() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"^USER (\d+):\d+$", dockerfile, re.MULTILINE)
    context = manifests()["StatefulSet"]["spec"]["template"]["spec"]["securityContext"]

    assert int(user) == context["runAsUser"] == context["fsGroup"] > 0
    assert context["runAsNonRoot"] is True


def test_ports_and_probes_are_those_of_the_program(maker: ModuleType) -> None:
    container = manifests()["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    served = {port["name"]: port["port"] for port in manifests()["Service"]["spec"]["ports"]}
    exposed = re.findall(r"^EXPOSE (.*)$", (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[0]

    assert ports == served == {"control": maker.CONTROL_PORT, "bulk": maker.BULK_PORT, "dashboard": 8080}
    assert set(map(int, exposed.split())) == set(ports.values())
    probed = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {probe["port"] for probe in probed.values()} == {"dashboard"}
    assert [probed[name]["path"] for name in probed] == ["/healthz", "/healthz", "/readyz"]


def test_the_image_has_the_torch_that_the_package_asks_for() -> None:
    pyproject = (DEPLOY.parent / "pyproject.toml").read_text(encoding="utf-8")
    (wanted,) = re.findall(r'"(torch>=[^"]*)"', pyproject)

    assert f'"{wanted}"' in (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


# --- a run for them -------------------------------------------------------------------------------------------------


def test_make_run_writes_nodes_of_one_run_that_know_each_other(tmp_path: Path, maker: ModuleType) -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    hosts = list(services)

    paths = maker.make_run(DEPLOY / "laptop.toml", tmp_path, hosts, "/state", "")

    configs = [load_config(path) for path in paths]
    assert len({run_id(config.run) for config in configs}) == 1
    assert [(c.node.name, c.node.advertise, c.node.host) for c in configs] == [(h, h, "0.0.0.0") for h in hosts]
    keys = [read_key_file(config.node.key).id for config in configs]
    assert configs[0].node.join == ()
    assert Contact.parse(configs[1].node.join[0]) == Contact.parse(f"{keys[0]}@first:7700")
    assert [set(config.node.allow) for config in configs] == [set(keys) - {key} for key in keys]
    for name, path in zip(hosts, paths, strict=True):
        assert services[name]["command"][1] == f"/config/{path.name}"
        assert [v.split(":")[0] for v in services[name]["volumes"]] == [
            f"./three/{name}.toml", f"./three/{name}.key", f"./three/{name}"
        ]  # fmt: skip
        assert (tmp_path / name).is_dir()


def test_make_run_fits_the_names_of_the_pods(tmp_path: Path, maker: ModuleType) -> None:
    service, pods = manifests()["Service"]["metadata"]["name"], manifests()["StatefulSet"]["spec"]["replicas"]
    name = manifests()["StatefulSet"]["metadata"]["name"]
    dashboard = "0.0.0.0:8080" if "dashboard" in NodeSettings.model_fields else ""

    paths = maker.make_run(
        DEPLOY / "laptop.toml", tmp_path, [f"{name}-{i}.{service}" for i in range(pods)], "/state", dashboard
    )

    assert [path.name for path in paths] == [f"{name}-{i}.toml" for i in range(pods)]
    assert load_config(paths[1]).node.advertise == f"{name}-1.{service}"


def test_make_run_tells_addresses_apart_and_refuses_a_host_twice_and_other_nodes_keys(
    tmp_path: Path, maker: ModuleType
) -> None:
    paths = maker.make_run(DEPLOY / "laptop.toml", tmp_path, ["10.77.0.1", "10.77.0.2"], "/state", "")
    assert [path.name for path in paths] == ["10.77.0.1.toml", "10.77.0.2.toml"]
    before = (tmp_path / "10.77.0.1.key").read_bytes()

    with pytest.raises(ConfigError, match="one is named twice"):
        maker.make_run(DEPLOY / "laptop.toml", tmp_path, ["first", "first"], "/state", "")
    with pytest.raises(PrimeAsyncError, match=r"10\.77\.0\.1\.key"):
        maker.make_run(DEPLOY / "laptop.toml", tmp_path, ["10.77.0.1", "10.77.0.2"], "/state", "")
    assert (tmp_path / "10.77.0.1.key").read_bytes() == before


# --- configurations for cards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "card_gib", "setup"),
    [
        ("card-24gb.toml", 23.5, {"step_s": 8, "up_mbit": 20, "down_mbit": 20}),
        ("card-80gb.toml", 79.0, {"step_s": 4, "up_mbit": 500, "down_mbit": 500}),
    ],
)
def test_a_card_holds_what_its_configuration_needs_and_the_comment_says_so(
    name: str, card_gib: float, setup: dict[str, float]
) -> None:
    config, text = load_config(DEPLOY / name), (DEPLOY / name).read_text(encoding="utf-8")
    size, run, micro = named_size(config.run.model), config.run, config.node.micro_batch_size
    needs = estimate_memory(size, micro, run.sequence_length).device_bytes / GIB
    twice = estimate_memory(size, 2 * micro, run.sequence_length).device_bytes / GIB
    fixed = 16 * parameter_count(size) / GIB

    assert needs < 0.75 * card_gib
    assert twice > 0.95 * card_gib  # so no larger power of two
    assert f"together {needs:.1f} GiB" in text
    assert f"would be {twice:.1f} GiB" in text
    assert f"{fixed:.1f} GiB\n" in text
    assert f"{needs - fixed:.1f} GiB\n" in text

    best, _ = recommend(Setup(parameters=parameter_count(size), nodes=4, rtt_ms=100.0, cores=4, **setup))
    chosen = (run.mode, run.fragments, run.round.inner_steps, run.exchange.codec)
    assert (best.choice.mode, best.choice.fragments, best.choice.inner_steps, best.choice.codec) == chosen
