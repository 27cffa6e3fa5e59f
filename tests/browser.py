"""A real browser for tests: Debian's chromium, driven by selenium."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

CHROMIUM: Final = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER: Final = shutil.which("chromedriver")
FLAGS: Final = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-device-scale-factor=1",
)
LOAD_S: Final = 60
MISSING: Final = (
    "" if CHROMIUM and DRIVER else "no chromium and chromedriver: `apt-get install chromium chromium-driver`"
)
"""Why there is no browser; empty: there is one."""


@contextmanager
def browser(width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A selenium driver with a profile of its own, which goes with it. Its console is kept."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        driver = Chrome(options=options, service=Service(DRIVER))
        try:
            driver.set_page_load_timeout(LOAD_S)
            yield driver
        finally:
            driver.quit()


def emulate(
    driver: Any, width: int, height: int, *, dark: bool = False, mobile: bool = False, scale: float = 1
) -> None:
    """As if the window had this size, and the system these colours."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def complaints(driver: Any) -> list[str]:
    """What the page's console holds of warnings and errors: refused scripts and styles, failed requests, exceptions."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
