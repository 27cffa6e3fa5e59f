"""What deploy/ has for Prometheus and Grafana names metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final

import yaml

from prime_async.watch.metrics import exposition
from tests.processes import ROOT
from tests.watch_harness import STORY, a_board

DEPLOY: Final = ROOT / "deploy"


def test_the_grafana_dashboard_asks_for_metrics_that_a_node_has(tmp_path: Path) -> None:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    known = set(re.findall(r"^(prime_async_\w+)", exposition(a_board(tmp_path, *STORY)).decode(), re.MULTILINE))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"prime_async_\w+", target["expr"])
    }
    assert len(asked) > 10
    assert asked <= known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_no_two_panels_of_it_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]:
        place = panel["gridPos"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in lines}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_the_scrape_config_scrapes_where_the_readme_puts_the_dashboard() -> None:
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8080"]}]
    assert "metrics_path" not in job  # it is /metrics
