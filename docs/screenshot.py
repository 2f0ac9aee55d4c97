"""`python docs/screenshot.py SWEEP_FOLDER OUT.png`: MLflow's comparison of a sweep's trials, as a browser shows it.

Serves the sweep's MLflow database on a port of its own, opens the page in headless Chromium (`apt install chromium`).
It made docs/mlflow.png.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1600, 1000
LOADED_MS = 25_000
"""Time that the page is given to load all it wants; Chromium's own clock, not the wall's."""


def main(arguments: list[str]) -> int:
    """Returns the exit code; 2 with a line for what is missing."""
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        print(f"none of {', '.join(NAMES)} is on the path: apt install chromium", file=sys.stderr)
        return 2
    folder, out = Path(arguments[0]), Path(arguments[1]).absolute()
    if not (folder / "sweep.json").is_file():
        print(f"{folder}: holds no sweep.json. Give the folder of a finished sweep: out_dir/name", file=sys.stderr)
        return 2
    runs = [row["mlflow_run_id"] for row in json.loads((folder / "sweep.json").read_text())["rows"] if row["step"]]
    database = next(path for path in (folder / "mlflow.db", folder.parent / "mlflow.db") if path.is_file())
    shoot(browser, database, runs, out)
    print(out)
    return 0


def shoot(browser: str, database: Path, runs: list[str], out: Path) -> None:
    """Write what the browser shows of a comparison of `runs`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{database.absolute()}"]
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        [*command, "--workers", "1", "--host", "127.0.0.1", "--port", str(port)], env=quiet, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        experiment = _experiment_of(port, runs[0])
        query = urllib.parse.urlencode({"runs": json.dumps(runs), "experiments": json.dumps([experiment])})
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [
                    browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}",
                    f"--virtual-time-budget={LOADED_MS}", f"--screenshot={out}",
                    f"http://127.0.0.1:{port}/#/compare-runs?{query}",
                ],
                check=True, timeout=180, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def _experiment_of(port: int, run_id: str) -> str:
    """Asks until the server answers."""
    deadline = time.monotonic() + 120
    while True:
        try:
            url = f"http://127.0.0.1:{port}/api/2.0/mlflow/runs/get?run_id={run_id}"
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["run"]["info"]["experiment_id"]
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
