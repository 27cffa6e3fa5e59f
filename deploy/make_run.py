"""Write the keys and the configurations of all nodes of a run: for the compose file and for Kubernetes.

    python deploy/make_run.py deploy/laptop.toml OUT first second third

``[run]``, and what ``[node]`` says of training, come from the file that is named first. Of each host, OUT gets
NAME.toml and NAME.key, NAME being the host's first label, and the folder NAME for its ledger. All let each other in;
the first founds the run. Who has OUT has all keys: give each machine its own files alone.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from prime_async.config.load import config_from
from prime_async.config.template import node_toml
from prime_async.errors import ConfigError
from prime_async.transport.keys import write_key_file

CONTROL_PORT, BULK_PORT = 7700, 7701


def make_run(base: Path, out: Path, hosts: list[str], directory: str, dashboard: str) -> list[Path]:
    """The configuration files, in the order of ``hosts``.

    Raises :class:`ConfigError` if ``base`` is wrong, a host is named twice, or there is a key in ``out`` already.
    """
    document = tomllib.loads(base.read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    names = names_of(hosts)
    keys = {name: write_key_file(out / f"{name}.key").id for name in names}
    contacts = [f"{keys[name]}@{host}:{CONTROL_PORT}" for name, host in zip(names, hosts, strict=True)]
    paths = []
    for i, (name, host) in enumerate(zip(names, hosts, strict=True)):
        node: dict[str, Any] = {
            **document.get("node", {}),
            "name": name,
            "key": f"{name}.key",
            "directory": directory,
            "host": "0.0.0.0",
            "port": CONTROL_PORT,
            "bulk_port": BULK_PORT,
            "advertise": host,
            "join": [contact for contact in contacts if contact != contacts[i]] if i else [],
            "allow": [key for other, key in keys.items() if other != name],
            **({"dashboard": dashboard} if dashboard else {}),
        }
        config = config_from({"run": document["run"], "node": node})
        path = out / f"{name}.toml"
        path.write_text(node_toml(config), encoding="utf-8")
        (out / name).mkdir(exist_ok=True)
        paths.append(path)
    return paths


def names_of(hosts: list[str]) -> list[str]:
    """First labels; the whole names where those are not enough, as of addresses."""
    labels = [host.split(".")[0] for host in hosts]
    names = labels if len(set(labels)) == len(hosts) else hosts
    if len(set(names)) < len(hosts):
        raise ConfigError([f"hosts {' '.join(hosts)}: one is named twice: each node needs a host of its own"])
    return names


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="a configuration, such as deploy/laptop.toml")
    parser.add_argument("out", type=Path, help="the folder to write to")
    parser.add_argument("hosts", nargs="+", help="names that the nodes dial each other by; the first founds the run")
    parser.add_argument("--directory", default="/state", help="node.directory of all of them")
    parser.add_argument("--dashboard", default="", help='node.dashboard of all of them, such as "0.0.0.0:8080"')
    chosen = parser.parse_args()
    for path in make_run(chosen.base, chosen.out, chosen.hosts, chosen.directory, chosen.dashboard):
        print(path)


if __name__ == "__main__":
    main()
